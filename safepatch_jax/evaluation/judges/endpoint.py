"""A model behind an OpenAI-compatible endpoint, and the judge that it can be."""

from __future__ import annotations

import asyncio
import json
import os
import queue
import threading
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation.judges import formats
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
from safepatch_jax.evaluation.judges.phrases import refusal_apart
from safepatch_jax.evaluation.judges.rubric import EXPECTED, messages_of, parse
from safepatch_jax.runtime.limits import limit, too_much
from safepatch_jax.runtime.reading import reason
from safepatch_jax.runtime.text import hide, printable, redacted
from safepatch_jax.runtime.workers import Workers

API_KEY = "SAFEPATCH_API_KEY"
_TRIES = 4
_CONCURRENCY = 8
_RUBRIC_TOKENS = 16  # of a reply

Messages = Sequence[Mapping[str, str]]


class Client:
    """A model behind an OpenAI-compatible endpoint, asked at temperature 0.

    Args:
      text: URL?model=NAME, the URL up to and without /chat/completions; &concurrency=N sends at
        most N requests at a time instead of 8.
      timeout: seconds in which a server must send something.

    The environment variable SAFEPATCH_API_KEY, where set, is sent as bearer token, and never shown
    or written. No redirect is followed: the key would go where the user did not send it. A request
    and its repetitions end after ENDPOINT_SECONDS of `LIMITS`, however slowly a server sends.

    Attributes:
      name: 'endpoint:' and the text, less the number of requests at a time.

    Raises:
      ValueError: not an http or https URL, no model, another option, a key that none can be, or the
        package openai is absent.
    """

    known_options = ("model", "concurrency")

    def __init__(self, text: str, *, timeout: float = 60.0):
        url, _, query = text.partition("?")
        _hide_values(query, self.known_options)
        _check_url(url)
        options = options_of(query, self.known_options, f"endpoint:{text}")
        if "model" not in options:
            raise ValueError(f"endpoint:{text}: which model? Write endpoint:{url}?model=NAME")
        self._options, self._model = options, options["model"]
        self.name = without_concurrency(f"endpoint:{text}")
        self._concurrency = _positive(options.get("concurrency", str(_CONCURRENCY)), self.name)
        self._connection = _Connection(url, timeout)

    def ask(self, messages: Messages, max_tokens: int) -> str:
        """Return the reply to a conversation, or what the server said where that is none; '' where
        a model only thought.

        Raises:
          ValueError: the server refuses the request.
          JudgeUnavailable: no answer in several tries.
        """
        request = {"model": self._model, "messages": messages, "max_tokens": max_tokens}
        try:
            text = self._connection.complete(request)
        except TimeoutError:
            raise self._unavailable(too_much("ENDPOINT_SECONDS")) from None
        except Exception as error:  # a server's bytes may raise anything in the packages below
            raise self._explained(error) from None
        try:
            reply = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            reply = text
        return redacted(reply).strip() if isinstance(reply, str) else ""

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
        """Return what to raise for an error of the package openai, or of what it rests on."""
        status = getattr(error, "status_code", None)
        if status is None:
            return self._unavailable(_shown(reason(_root(error))))
        problem = f"HTTP {status} {_shown(error.response.text)}"
        if status < 500 and status not in (408, 409, 429):
            return ValueError(f"{self.name}: {problem}. Check URL, model and {API_KEY}.")
        return self._unavailable(problem)

    def _unavailable(self, problem: str) -> JudgeUnavailable:
        return JudgeUnavailable(
            f"{self.name}: no answer in {_TRIES} tries ({problem}). Answers and what was judged so "
            "far are kept; the same command resumes there."
        )


class Endpoint(Client):
    """A judge: a general model that says one word by a rubric of our own, or, with &format=NAME, a
    served judge of GUARDS, which gets the conversation alone. Other arguments and errors: see
    `Client`."""

    known_options = (*Client.known_options, "format")
    tells_content = True

    def __init__(self, text: str, *, timeout: float = 60.0):
        super().__init__(text, timeout=timeout)
        name = self._options.get("format", "")
        if name and name not in formats.GUARDS:
            raise ValueError(
                f"{self.name}: format is {name!r}, expected one of {', '.join(formats.GUARDS)}, or "
                "none for the rubric"
            )
        self._guard = formats.GUARDS.get(name)
        self.tells_refusals = self._guard is None or self._guard.tells_refusals
        self.expected = self._guard.expected if self._guard else EXPECTED

    def judge(
        self, items: Sequence[Item], about: str = HARM, done: Done | None = None
    ) -> list[Verdict]:
        def ask(items: Sequence[Item], done: Done) -> None:
            self.ask_all(
                [self._messages(item, about) for item in items],
                self._guard.max_new if self._guard else _RUBRIC_TOKENS,
                lambda k, reply: done(k, self._read(items[k], reply, about)),
            )

        return judge_all(self, items, about, done, ask)

    def _messages(self, item: Item, about: str) -> list[dict[str, str]]:
        if self._guard is None:
            return messages_of(item.prompt, item.answer, about)
        return [
            {"role": "user", "content": item.prompt},
            {"role": "assistant", "content": item.answer},
        ]

    def _read(self, item: Item, reply: str, about: str) -> Verdict:
        if self._guard is None:
            return verdict_of(parse(reply, about), reply)
        verdict = verdict_of(self._guard.parse(reply, about), reply)
        return verdict if self.tells_refusals else refusal_apart(verdict, item.answer)


def without_concurrency(text: str) -> str:
    """Return a judge's text without the option that no reply depends on."""
    place, mark, query = text.partition("?")
    options = [option for option in query.split("&") if not option.startswith("concurrency=")]
    return place + mark + "&".join(options)


class _Connection:
    """The package openai, and how it reaches a server: in an event loop of its own, where a request
    can be ended at any moment."""

    def __init__(self, url: str, timeout: float):
        try:
            import openai  # optional, and slow to import
        except ImportError:
            raise ValueError(
                f"endpoint:{url} is asked through the package openai, which is not installed: "
                "pip install openai"
            ) from None
        key = _key()
        self._client = openai.AsyncOpenAI(
            base_url=url,
            # Without a key the package would send that of OPENAI_API_KEY, which is for another
            # server.
            api_key=key or "none",
            timeout=timeout,
            max_retries=_TRIES - 1,
            http_client=openai.DefaultAsyncHttpxClient(
                follow_redirects=False, event_hooks={"response": [_bound_body]}
            ),
        )
        # Not compressed: a few bytes could become gigabytes.
        self._headers = {"Accept-Encoding": "identity"}
        if not key:
            self._headers["Authorization"] = openai.Omit()
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, daemon=True).start()

    def complete(self, request: Mapping[str, Any]) -> str:
        """Return the body of a reply.

        Raises:
          TimeoutError: it is not whole in time.
          Exception: any, of the package openai and those below it.
        """
        answer = asyncio.wait_for(self._complete(request), limit("ENDPOINT_SECONDS"))
        return asyncio.run_coroutine_threadsafe(answer, self._loop).result()

    async def _complete(self, request: Mapping[str, Any]) -> str:
        response = await self._client.chat.completions.with_raw_response.create(
            **request, temperature=0, extra_headers=self._headers
        )
        return response.http_response.text


async def _bound_body(response: Any) -> None:
    """Let a response of httpx raise ValueError once its body is longer than is allowed."""
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise ValueError("the reply is compressed, which was not asked for")
    stream, most = response.stream, limit("ENDPOINT_BYTES")

    class Bounded(type(stream)):  # as httpx asks for a stream of its own kind
        def __init__(self):
            pass

        async def __aiter__(self):
            size = 0
            async for part in stream:
                size += len(part)
                if size > most:
                    raise ValueError(f"the reply has {too_much('ENDPOINT_BYTES')}")
                yield part

        async def aclose(self):
            await stream.aclose()

    response.stream = Bounded()


def _key() -> str:
    key = os.environ.get(API_KEY, "").strip()
    hide(key)
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"{API_KEY} holds characters that no key has")
    return key


def _hide_values(query: str, known: Sequence[str]) -> None:
    """Keep the values of unknown options out of all messages: one may be a key."""
    for part in query.split("&"):
        name, _, value = part.partition("=")
        if name not in known:
            hide(value)
            hide(urllib.parse.unquote_plus(value))


def _root(error: BaseException) -> BaseException:
    """Return the first cause of an error: what the packages wrap it in says less."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    return error


def _shown(text: str) -> str:
    return printable(text, 300)


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
