"""A model behind an OpenAI-compatible endpoint, and the judge that it can be."""

from __future__ import annotations

import http.client
import json
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from safepatch_jax.evaluation.judges import formats as judge_formats
from safepatch_jax.evaluation.judges.base import (
    Done,
    Item,
    JudgeUnavailable,
    Verdict,
    judge_all,
    options_of,
    verdict_of,
)
from safepatch_jax.evaluation.judges.formats import HARM

API_KEY = "SAFEPATCH_API_KEY"
_TRIES = 3


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any) -> None:
        """Follow no redirect: the key would go where the user did not send it."""


class Client:
    """A model behind an OpenAI-compatible endpoint, asked at temperature 0.

    Args:
      text: URL?model=NAME, the URL up to and without /chat/completions.
      timeout: seconds a request may take.
      sleep: waits between tries.

    The environment variable SAFEPATCH_API_KEY, where set, is sent as bearer token, and never shown.

    Attributes:
      name: 'endpoint:' and the text.

    Raises:
      ValueError: not an http or https URL, or no model.
    """

    def __init__(
        self, text: str, *, timeout: float = 60.0, sleep: Callable[[float], None] = time.sleep
    ):
        url, _, query = text.partition("?")
        parts = urllib.parse.urlsplit(url)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.username
            or parts.fragment
        ):
            raise ValueError(
                "An endpoint is an http or https URL without user or password, such as "
                "endpoint:https://HOST/v1?model=NAME; the key goes into the environment variable "
                + API_KEY
            )
        self.name = f"endpoint:{text}"
        self._model = options_of(query, ("model",), self.name).get("model", "")
        if not self._model:
            raise ValueError(f"{self.name}: which model? Write endpoint:{url}?model=NAME")
        self._url, self._timeout, self._sleep = (
            url.rstrip("/") + "/chat/completions",
            timeout,
            sleep,
        )
        self._open = urllib.request.build_opener(_NoRedirect).open

    def ask(self, messages: Sequence[Mapping[str, str]], max_tokens: int) -> str:
        """Return the reply to a conversation, or what the server said where that is none; '' where
        a model only thought.

        Raises:
          ValueError: the server refuses the request.
          JudgeUnavailable: no answer in three tries.
        """
        text = self._post(
            {
                "model": self._model,
                "temperature": 0,
                "max_tokens": max_tokens,
                "messages": list(messages),
            }
        )
        try:
            reply = json.loads(text)["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError):
            reply = text
        return reply.strip() if isinstance(reply, str) else ""

    def _post(self, body: dict[str, Any]) -> str:
        key = os.environ.get(API_KEY, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ValueError(
                f"{API_KEY} holds characters that no key has"
            )  # http.client would show the key
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {key}"} if key else {}
        )
        problem = ""
        for attempt in range(_TRIES):
            if attempt:
                self._sleep(2.0**attempt)
            request = urllib.request.Request(self._url, json.dumps(body).encode(), headers)
            try:
                with self._open(request, timeout=self._timeout) as reply:
                    return reply.read(1 << 20).decode("utf-8", "replace")
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read(300).decode("utf-8", "replace")
                problem = f"HTTP {error.code} {said.replace(key, '***') if key else said}"
                if error.code < 500 and error.code not in (408, 429):
                    raise ValueError(
                        f"{self.name}: {problem}. Check URL, model and {API_KEY}."
                    ) from None
            except (OSError, http.client.HTTPException) as error:
                problem = str(error) or type(error).__name__
        raise JudgeUnavailable(
            f"{self.name}: no answer in {_TRIES} tries ({problem}). Answers and what was judged "
            "so far "
            "are kept; the same command goes on from there."
        )


class Endpoint(Client):
    """A judge: a general model that says one word by a rubric of our own. Arguments and errors: see
    `Client`."""

    tells_refusals, expected = True, judge_formats.RUBRIC_EXPECTED

    def judge(
        self, items: Sequence[Item], about: str = HARM, done: Done | None = None
    ) -> list[Verdict]:
        return judge_all(
            self,
            items,
            about,
            done,
            lambda group: [self._verdict(item, about) for item in group],
            1,
        )

    def _verdict(self, item: Item, about: str) -> Verdict:
        reply = self.ask(judge_formats.rubric_messages(item.prompt, item.answer, about), 16)
        return verdict_of(judge_formats.parse_rubric(reply), reply)
