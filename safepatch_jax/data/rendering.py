"""Chat templates, rendered in a process of their own: see `render_child`."""

from __future__ import annotations

import atexit
import datetime
import json
import pathlib
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from safepatch_jax.runtime import libraries
from safepatch_jax.runtime.limits import limit, too_much
from safepatch_jax.runtime.reading import Refused

# What a template that writes today's date is given: a day that does not change, so that a run which
# is resumed tomorrow has the same prompts. Llama 3.1's templates fall back to it themselves.
DATE = "2024-07-26"
_LIMITS = ("SECONDS", "MEGABYTES", "CHARACTERS")


class NotRendered(ValueError):
    """A chat template refuses a conversation, or fails on it."""


def check_date(text: str) -> str:
    """Return a date of the form YYYY-MM-DD. Raises ValueError if it is none."""
    try:
        if datetime.date.fromisoformat(text).isoformat() == text:
            return text
    except ValueError:
        pass
    raise Refused(f"a date is written YYYY-MM-DD, such as {DATE}, got {text!r:.40}")


def render(
    tokenizer: Any,
    messages: Sequence[Mapping[str, Any]],
    *,
    generate: bool = False,
    resume: bool = False,
    date: str = DATE,
    template: str = "",
    variables: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """Return a conversation in a tokenizer's chat template, as `apply_chat_template` gives it.

    Args:
      tokenizer: Hugging Face's.
      messages: each with role and content.
      generate: with the opening of an answer after it.
      resume: the last message is left open.
      date: YYYY-MM-DD, that of a template which writes today's.
      template: Jinja text, in place of the tokenizer's own.
      variables: that the template is given besides, such as enable_thinking.

    Raises:
      NotRendered: the template refuses the conversation, or fails on it.
      ValueError: it takes more time, memory or text than `LIMITS` allow.
    """
    special = {name: _plain(value) for name, value in tokenizer.special_tokens_map.items()}
    arguments = {
        **variables,
        "conversations": [list(messages)],
        "chat_template": template or tokenizer.get_chat_template(),
        "add_generation_prompt": generate,
        "continue_final_message": resume,
        **special,
    }
    return _ask({"arguments": arguments, "date": date})["text"]


def variables_of(template: str) -> list[str]:
    """Return the names that a template reads, in order. Raises as `render`."""
    return _ask({"read": template, "date": DATE})["names"]


def _ask(request: Mapping[str, Any]) -> dict[str, Any]:
    limits = {name.lower(): limit(f"TEMPLATE_{name}") for name in _LIMITS}
    answer = _child.ask({**request, "limits": limits})
    if "limit" in answer:
        raise Refused(
            f"a chat template needs {too_much('TEMPLATE_' + answer['limit'])}. It may be hostile: "
            "look at it, or take that of the model's maker"
        )
    if "error" in answer:
        raise NotRendered(answer["error"])
    return answer


def _plain(token: Any) -> Any:
    return [str(x) for x in token] if isinstance(token, list | tuple) else str(token)


class _Child:
    """The process that renders for this one; started at the first use, and again after its end."""

    def __init__(self):
        self._process: subprocess.Popen | None = None
        self._errors: Any = None
        self._lock = threading.Lock()

    def start(self) -> None:
        """Start it if it does not run; it takes a second to be ready, in which others may work."""
        if self._process is not None and self._process.poll() is None:
            return
        libraries.refuse_missing("Chat templates", "jinja2")
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, str(pathlib.Path(__file__).with_name("render_child.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            start_new_session=True,  # Ctrl-C is for this process; the other ends with it
        )
        atexit.register(self.stop)

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        with self._lock:
            self.start()
            try:
                self._process.stdin.write(json.dumps(request).encode() + b"\n")
                self._process.stdin.flush()
                line = self._process.stdout.readline()
            except BrokenPipeError:
                line = b""
            except BaseException:  # an answer that nobody waits for must not be the next one
                self.stop()
                raise
            if line.endswith(b"\n"):
                return json.loads(line)
            return {"limit": self._cause()}

    def _cause(self) -> str:
        """Say for what limit the process ended."""
        code = self._process.wait()
        self._process = None
        if code == -signal.SIGPROF:
            return "SECONDS"
        self._errors.seek(0)
        text = self._errors.read()[-2000:].decode(errors="replace").strip()
        if "MemoryError" in text or code in (-signal.SIGKILL, -signal.SIGSEGV, -signal.SIGABRT):
            return "MEGABYTES"
        raise Refused(
            f"the process that renders chat templates ended ({code}): "
            f"{text.rpartition(chr(10))[2]:.300}. Is the package transformers in order?"
        )


_child = _Child()
prepare = _child.start
