"""A model behind an OpenAI-compatible endpoint, and the judge that it can be."""

from __future__ import annotations

import json
import os
import queue
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation.judges.base import (
    HARM,
    Done,
    Item,
    JudgeUnavailable,
    Verdict,
    judge_all,
    options_of,
    verdict_of,
)
from safepatch_jax.evaluation.judges.rubric import EXPECTED, messages_of, parse
from safepatch_jax.runtime.workers import Workers

API_KEY = "SAFEPATCH_API_KEY"
_TRIES = 4
_CONCURRENCY = 8
_OPTIONS = ("model", "concurrency")
_RUBRIC_TOKENS = 16  # of a reply

Messages = Sequence[Mapping[str, str]]


class Client:
    """A model behind an OpenAI-compatible endpoint, asked at temperature 0.

    Args:
      text: URL?model=NAME, the URL up to and without /chat/completions; &concurrency=N sends at
        most N requests at a time instead of 8.
      timeout: seconds a request may take.

    The environment variable SAFEPATCH_API_KEY, where set, is sent as bearer token, and never shown.
    No redirect is followed: the key would go where the user did not send it.

    Attributes:
      name: 'endpoint:' and the text, less the number of requests at a time.

    Raises:
      ValueError: not an http or https URL, no model, another option, a key that none can be, or the
        package openai is absent.
    """

    def __init__(self, text: str, *, timeout: float = 60.0):
        url, _, query = text.partition("?")
        _check_url(url)
        options = options_of(query, _OPTIONS, f"endpoint:{text}")
        if "model" not in options:
            raise ValueError(f"endpoint:{text}: which model? Write endpoint:{url}?model=NAME")
        self._model = options["model"]
        self.name = without_concurrency(f"endpoint:{text}")
        self._concurrency = _positive(options.get("concurrency", str(_CONCURRENCY)), self.name)
        self._client, self._headers, self._errors = _open_client(url, timeout)

    def ask(self, messages: Messages, max_tokens: int) -> str:
        """Return the reply to a conversation, or what the server said where that is none; '' where
        a model only thought.

        Raises:
          ValueError: the server refuses the request.
          JudgeUnavailable: no answer in several tries.
        """
        try:
            response = self._client.chat.completions.with_raw_response.create(
                model=self._model,
                messages=messages,
                max_tokens=max_tokens,
                temperature=0,
                extra_headers=self._headers,
            )
        except self._errors as error:
            raise self._explained(error) from None
        text = response.http_response.text
        try:
            reply = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            reply = text
        return reply.strip() if isinstance(reply, str) else ""

    def ask_all(
        self,
        conversations: Sequence[Messages],
        max_tokens: int,
        done: Callable[[int, str], None],
    ) -> None:
        """Ask several conversations at a time; `done` gets the number and the reply of each as soon
        as it is there, in the calling thread.

        After an error, nothing more is asked, and replies under way still reach `done`. SIGTERM
        waits for the requests under way.

        Raises:
          ValueError, JudgeUnavailable: the first error, as of `ask`.
        """
        # Replies come through a queue, not from futures: the main thread waits here without a lock
        # of Python's, and SIGTERM may raise in it at any moment (see `Workers`).
        replies: queue.SimpleQueue[tuple[int, str | None]] = queue.SimpleQueue()
        errors: list[BaseException] = []

        def ask_one(number: int, messages: Messages) -> None:
            reply = None
            try:
                if not errors:
                    reply = self.ask(messages, max_tokens)
            except BaseException as error:
                errors.append(error)
            finally:
                replies.put((number, reply))

        with Workers(self._concurrency) as workers:
            for number, messages in enumerate(conversations):
                workers.submit(ask_one, number, messages)
            for _ in conversations:
                number, reply = replies.get()
                if reply is not None:
                    done(number, reply)
        if errors:
            raise errors[0]

    def _explained(self, error: Any) -> Exception:
        """Return what to raise for an error of the package openai."""
        status = getattr(error, "status_code", None)
        if status is None:
            cause = error.__cause__ or error
            problem = _without_key(str(cause)) or type(cause).__name__
        else:
            problem = f"HTTP {status} {_without_key(error.response.text)}"
            if status < 500 and status not in (408, 409, 429):
                return ValueError(f"{self.name}: {problem}. Check URL, model and {API_KEY}.")
        return JudgeUnavailable(
            f"{self.name}: no answer in {_TRIES} tries ({problem}). Answers and what was judged so "
            "far are kept; the same command resumes there."
        )


class Endpoint(Client):
    """A judge: a general model that says one word by a rubric of our own. Arguments and errors: see
    `Client`."""

    tells_refusals, expected = True, EXPECTED

    def judge(
        self, items: Sequence[Item], about: str = HARM, done: Done | None = None
    ) -> list[Verdict]:
        def ask(items: Sequence[Item], done: Done) -> None:
            self.ask_all(
                [messages_of(item.prompt, item.answer, about) for item in items],
                _RUBRIC_TOKENS,
                lambda k, reply: done(k, verdict_of(parse(reply), reply)),
            )

        return judge_all(self, items, about, done, ask)


def without_concurrency(text: str) -> str:
    """Return a judge's text without the option that no reply depends on."""
    place, mark, query = text.partition("?")
    options = [option for option in query.split("&") if not option.startswith("concurrency=")]
    return place + mark + "&".join(options)


def _open_client(url: str, timeout: float) -> tuple[Any, dict[str, Any], type[Exception]]:
    """Return a client of the package openai, headers of each request, and the class of its
    errors."""
    try:
        import openai  # optional, and slow to import
    except ImportError:
        raise ValueError(
            f"endpoint:{url} is asked through the package openai, which is not installed: "
            "pip install openai"
        ) from None
    key = _key()
    client = openai.OpenAI(
        base_url=url,
        # Without a key the package would send that of OPENAI_API_KEY, which is for another server.
        api_key=key or "none",
        timeout=timeout,
        max_retries=_TRIES - 1,
        http_client=openai.DefaultHttpxClient(follow_redirects=False),
    )
    return client, {} if key else {"Authorization": openai.Omit()}, openai.APIError


def _key() -> str:
    key = os.environ.get(API_KEY, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{API_KEY} holds characters that no key has")
    return key


def _without_key(text: str) -> str:
    # Masked before the text is cut, so that no part of a key stays at its end.
    if key := _key():
        text = text.replace(key, "***")
    return text[:300]


def _check_url(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    web = parts.scheme in ("http", "https") and parts.hostname
    if not web or parts.username or parts.fragment:
        raise ValueError(
            "An endpoint is an http or https URL without user or password, such as "
            "endpoint:https://HOST/v1?model=NAME; the key goes into the environment variable "
            f"{API_KEY}"
        )


def _positive(text: str, where: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{where}: concurrency must be a whole number, 1 at least, got {text!r}")
    return int(text)
