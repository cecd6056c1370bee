"""What a cell of a table holds: a text, or a conversation. Nothing else becomes a text in silence.

Errors here say what a cell holds; `placed` adds of which file, row and column.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import decimal
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from safepatch_jax.runtime.reading import Refused

Turns = tuple[tuple[str, str], ...]  # (role, text) of each message
# Names of columns whose cells are conversations.
CONVERSATIONS = ("messages", "conversations", "conversation")
_SPEAKERS = {  # OpenAI's and Hugging Face's names, ShareGPT's names
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}
_EXACT = 1 << 53  # floats below it hold every whole number
_KINDS = {bool: "true or false", dict: "an object", list: "a list", tuple: "a list"}
_ENCODED = re.compile(r'\s*\[\s*\{\s*"(role|content|from|value)"\s*:')
_PRINTED = re.compile(r"\s*\[\s*\{\s*'(role|content|from|value)'\s*:")


@dataclasses.dataclass(frozen=True)
class Conversation:
    """A conversation in which something is asked.

    Attributes:
      turns: what stands before the last message of the user: a system message or none, then the
        user's and the assistant's in turn.
      prompt: the last message of the user.
      answer: the assistant's after it, '' where there is none.
    """

    turns: Turns
    prompt: str
    answer: str


@contextlib.contextmanager
def placed(source: Any, row: int, column: str) -> Iterator[None]:
    """Say in an error of the block where it arose; rows are counted from 1."""
    try:
        yield
    except Refused:
        raise
    except ValueError as error:
        raise Refused(f"{source}: row {row}, column {column!r:.100}: {error}") from error


def twice(names: Iterable[str]) -> list[str]:
    """Return the names that occur more than once."""
    return [name for name, count in collections.Counter(names).items() if count > 1]


def text(value: Any) -> str:
    """Return a cell as stripped text.

    A missing cell (None, NaN) is the empty text. A number is written as one would: 42, and 42 for
    the float 42.0 too, since pandas makes floats of whole numbers where other cells are missing;
    0.5. Bytes are UTF-8.

    Raises:
      ValueError: another kind of value, an infinite number, or no valid Unicode.
    """
    numpy = sys.modules.get("numpy")  # who has a value of it has it; to import it takes time
    if numpy and isinstance(value, numpy.generic):
        value = value.item()
    if value is None:
        return ""
    if isinstance(value, float | decimal.Decimal):
        return _number(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, bytes):
        value = _decoded(value)
    if not isinstance(value, str):
        kind = _KINDS.get(type(value), f"a value of type {type(value).__name__}")
        raise ValueError(
            f"it holds {kind}, where a text is needed. Write one text a cell, or name another "
            "column: FILE?prompt=COLUMN&answer=COLUMN."
        )
    check_unicode(value)
    return value.strip()


def check_unicode(value: str) -> None:
    """Raise ValueError if a text holds half of a surrogate pair, which JSON can write."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = ascii(value[error.start])
        raise ValueError(
            f"it holds {half}, half of a character. Write the text anew, with the whole character."
        ) from error


def _number(value: float | decimal.Decimal) -> str:
    if math.isnan(value):
        return ""
    if math.isinf(value):
        raise ValueError(f"it holds the number {value}. Write a text, or leave the cell empty.")
    return str(int(value)) if value == int(value) and abs(value) < _EXACT else str(value)


def _decoded(value: bytes) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError as error:
        raise ValueError("it holds bytes that are no UTF-8 text.") from error


def category(value: Any) -> str:
    """Return a category: a text; of an object of true and false, as in BeaverTails, the names that
    are true, and of a list its texts, with '; ' between."""
    if isinstance(value, Mapping):
        if not all(isinstance(holds, bool | None) for holds in value.values()):
            raise ValueError(
                "it holds an object whose values are not true or false. Write the category's name."
            )
        value = [name for name, holds in value.items() if holds]
    if isinstance(value, list):
        return "; ".join(filter(None, map(text, value)))
    return str(value) if isinstance(value, bool) else text(value)


def answer(value: Any) -> str:
    """Return an answer: a text, or that of a conversation of one assistant's message (TRL's
    `chosen`). Raises ValueError as `text`."""
    messages = _messages(value)
    if messages is None:
        if isinstance(value, list):
            raise ValueError(
                f"it holds a list of {len(value)}, where one answer is needed. Write a row for "
                "each answer, or the one to be used."
            )
        return text(value)
    if len(messages) == 1 and messages[0][0] == "assistant":
        return messages[0][1]
    if not messages:
        return ""
    raise ValueError(
        f"it holds a conversation of {len(messages)} messages, where one answer is needed. Give "
        "one message of the assistant, or the conversation as the column of the prompt."
    )


def conversation(value: Any) -> Conversation | None:
    """Return what a cell of a prompt holds if it is a conversation: a list of messages
    {"role", "content"}, or {"from", "value"} as in ShareGPT; also as a text of JSON.

    The content of a message is a text, or a list of parts {"type": "text", "text"}.

    Raises:
      ValueError: roles that are not known or out of turn, pictures or calls, no message of the
        user, an empty message before the last of the user.
    """
    messages = _messages(value)
    if messages is None:
        return None
    if not messages:
        return Conversation((), "", "")
    if messages[0] == ("system", ""):
        messages = messages[1:]
    first = messages[:1] if messages[:1] and messages[0][0] == "system" else []
    spoken = messages[len(first) :]
    for number, (role, _) in enumerate(spoken):
        expected = ("user", "assistant")[number % 2]
        if role != expected:
            raise ValueError(
                f"message {len(first) + number + 1} is the {role}'s, where the {expected}'s is "
                "needed: after a system message or none, user and assistant speak in turn, and the "
                "user begins."
            )
    if not spoken:
        raise ValueError("it holds a conversation in which the user says nothing.")
    after = spoken[-1][1] if len(spoken) % 2 == 0 else ""
    asked = len(spoken) - 1 - (len(spoken) + 1) % 2
    turns = tuple(first + spoken[:asked])
    if empty := [number for number, (_, content) in enumerate(turns, 1) if not content]:
        raise ValueError(f"message {empty[0]} of the conversation is empty.")
    return Conversation(turns, spoken[asked][1], after)


def _messages(value: Any) -> list[tuple[str, str]] | None:
    """Return (role, text) of each message; None where a cell is no conversation."""
    if isinstance(value, str):
        if _PRINTED.match(value):
            raise ValueError(
                "it holds a conversation as Python or NumPy prints it, which cannot be read again. "
                "Write the table as .jsonl or .parquet."
            )
        value = _parsed(value)
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return None
    if not all(isinstance(message, Mapping) for message in value):
        return None
    messages = []
    for number, message in enumerate(value, 1):
        try:
            messages.append(_message(message))
        except ValueError as error:
            raise ValueError(f"message {number}: {error}") from error
    return messages


def _parsed(value: str) -> Any:
    """Return the messages that a text of JSON holds (a cell of CSV cannot hold a list), or the
    text."""
    if not _ENCODED.match(value):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"it begins as a conversation in JSON and is none ({error}). Is it cut off?"
        ) from error


def _message(message: Mapping[str, Any]) -> tuple[str, str]:
    role, content = message.get("role"), message.get("content")
    if role is None:
        role, content = message.get("from"), message.get("value")
    name = role.strip().lower() if isinstance(role, str) else role
    if not isinstance(name, str) or name not in _SPEAKERS:
        raise ValueError(
            f"the role is {role!r:.60}; those known are system, user (human) and assistant (gpt)."
        )
    if message.get("tool_calls"):
        raise ValueError("it holds calls of tools. Leave such conversations out.")
    return _SPEAKERS[name], _content(content)


def _content(content: Any) -> str:
    """Return the text of a message's content."""
    if not isinstance(content, list):
        return text(content)
    parts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text":
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise ValueError(f"it holds a part of type {kind!r:.60}; only text can be read.")
        if not isinstance(part.get("text"), str):
            raise ValueError("it holds a part of type 'text' without a text.")
        parts.append(part["text"])
    return text("".join(parts))


def key(prompt: str, turns: Sequence[Sequence[str]] = ()) -> str:
    """Return a text that two prompts share only if what stands before them is the same too; that
    of a prompt alone is the prompt."""
    return json.dumps([*turns, ["user", prompt]], ensure_ascii=False) if turns else prompt


def talk(prompt: str, turns: Turns = ()) -> str | Turns:
    """Return what is put to a model: a prompt, or (role, text) of each message where others stand
    before it."""
    return (*turns, ("user", prompt)) if turns else prompt


def transcript(prompt: str, turns: Sequence[Sequence[str]] = ()) -> str:
    """Return a prompt as a person or a judge reads it, with what stands before it."""
    if not turns:
        return prompt
    lines = [f"{role}: {content}" for role, content in (*turns, ("user", prompt))]
    return "\n\n".join(lines)
