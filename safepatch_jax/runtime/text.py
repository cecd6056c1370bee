"""What may be printed or written of a text that comes from a file or a server.

Names, keys and replies of others can hold escape sequences, line breaks that forge a line of ours,
megabytes, or a key that a server echoes. Everything printed passes `printable`, everything written
`redacted`.
"""

from __future__ import annotations

import re

MOST = 2000  # characters of a message
_PART = 8  # characters of a secret that are enough to be hidden
_MASK = "***"
# Control characters of C0 and C1, marks that turn the direction of writing, line and paragraph
# separators, halves of surrogate pairs.
_UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_secrets: set[str] = set()


def hide(secret: str) -> None:
    """Keep a secret, and parts of it, out of everything that this process prints or writes."""
    if secret:
        _secrets.add(secret)


def redacted(text: str) -> str:
    """Return a text in which secrets, and their parts of 8 characters or more, are masked."""
    for secret in _secrets:
        text = _without(text, secret)
    return text


def _without(text: str, secret: str) -> str:
    if len(secret) <= _PART:
        return text.replace(secret, _MASK)
    parts = {secret[i : i + _PART] for i in range(len(secret) - _PART + 1)}
    if not any(part in text for part in parts):
        return text
    shown, i = [], 0
    while i < len(text):
        end = i
        while text[end : end + _PART] in parts:  # the parts overlap in all but one character
            end += 1
        if end > i:
            shown.append(_MASK)
            i = end + _PART - 1
        else:
            shown.append(text[i])
            i += 1
    return "".join(shown)


def printable(text: str, most: int = MOST, line_break: str = "\\n") -> str:
    """Return a text as one line that cannot steer a terminal or forge another line.

    Args:
      text: any.
      most: characters; of a longer text the beginning is shown, and how much more there is.
      line_break: stands for a line break; one with spaces after it keeps the lines of a long text,
        indented.
    """
    # Masked before it is cut, so that no part of a secret stays at the end.
    text = redacted(text)
    if more := len(text) - most:
        if more > 0:
            text = f"{text[:most]} ... and {more:,} more characters"
    return _UNSAFE.sub(lambda match: _escaped(match[0], line_break), text)


def _escaped(character: str, line_break: str) -> str:
    if character == "\n":
        return line_break
    return ascii(character)[1:-1]
