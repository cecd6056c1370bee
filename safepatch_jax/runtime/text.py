"""What may be printed or written of a text that comes from a file or a server.

Names, keys and replies of others can hold escape sequences, line breaks that forge a line of ours,
megabytes, or a key that a server echoes. Everything printed passes `printable`, everything written
`redacted`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

MOST = 2000  # characters of a message
_PART = 8  # characters of a secret that are enough to be hidden
_MASK = "***"
_USER = re.compile(r"(?<=//)[^\s/?#]*@")  # and password, in a URL
_secrets: set[str] = set()


def hide(secret: str) -> None:
    """Keep a secret, and parts of it, out of everything that this process prints or writes.

    One shorter than 8 characters is no secret, and may be a part of any word.
    """
    if len(secret) >= _PART:
        _secrets.add(secret)


def redacted(text: str) -> str:
    """Return a text in which secrets, and their parts of 8 characters or more, are masked."""
    hidden: set[int] = set()  # positions
    for secret in _secrets:
        for start in range(len(secret) - _PART + 1):
            hidden.update(_positions(text, secret[start : start + _PART]))
    if not hidden:
        return text
    shown = []
    for i, character in enumerate(text):
        if i not in hidden:
            shown.append(character)
        elif i - 1 not in hidden:
            shown.append(_MASK)
    return "".join(shown)


def without_user(text: str) -> str:
    """Return a text in which user and password of URLs are masked."""
    return _USER.sub(f"{_MASK}@", text)


def _positions(text: str, part: str) -> Iterator[int]:
    """Yield the positions of all characters that belong to an occurrence of a part."""
    at = text.find(part)
    while at >= 0:
        yield from range(at, at + len(part))
        at = text.find(part, at + 1)


def printable(text: str, most: int = MOST, line_break: str = "\\n") -> str:
    """Return a text as one line that cannot steer a terminal or forge another line.

    Args:
      text: any.
      most: characters; of a longer text its beginning and its end are shown (an error's end says
        how to fix it), and how much more there is.
      line_break: stands for a line break; one with spaces after it keeps the lines of a long text,
        indented.
    """
    # Masked before it is cut, so that no part of a secret stays at the end.
    text = redacted(text)
    if (more := len(text) - most) > 0:
        end = most // 5
        text = f"{text[: most - end]} ... {more:,} more characters ... {text[len(text) - end :]}"
    return "".join(c if c.isprintable() else _escaped(c, line_break) for c in text)


def _escaped(character: str, line_break: str) -> str:
    if character == "\n":
        return line_break
    return ascii(character)[1:-1]
