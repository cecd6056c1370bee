"""A model that is ready to answer: prompts in, continuations and log-likelihoods out, batch by
batch on the mesh."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safepatch_jax.data.chat import Chat, Example, prompt_batch, training_batch
from safepatch_jax.data.prompt_format import PromptFormat
from safepatch_jax.data.rendering import DATE
from safepatch_jax.data.tokenizer import decode
from safepatch_jax.evaluation import thought_limit
from safepatch_jax.evaluation.batching import Batching, length_of, padded
from safepatch_jax.evaluation.by_block import ByBlock
from safepatch_jax.evaluation.generate import Sampling, Whole
from safepatch_jax.evaluation.prompter import Prompter, Talk
from safepatch_jax.evaluation.scored_texts import Pair, Text, likelihoods, texts_of
from safepatch_jax.evaluation.serving import Model, Server
from safepatch_jax.evaluation.thoughts import after_thought
from safepatch_jax.io import hub
from safepatch_jax.io.checkpoint import COMPANIONS_FOLDER, MODEL, load_checkpoint
from safepatch_jax.io.hf import load_params
from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.models.config import DecoderConfig, stop_ids
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.numerics import NotFinite, tensor_keys
from safepatch_jax.runtime import processes
from safepatch_jax.runtime.console import progress
from safepatch_jax.runtime.paths import resolve
from safepatch_jax.training.batch import put_batch

Done = Callable[[int, Any], None]
NO_STOP = (-2,)  # no token is this
_UNSURE = 4  # tokens


class Engine(Prompter):
    """A loaded model with its tokenizer.

    Args:
      config, params: the model; params nested, on the mesh of `sharder`.
      folder: whose tokenizer, chat template and stop tokens are taken.
      sharder: the mesh.
      compute_dtype: of the arithmetic.
      batch_size: sequences that run together.
      date, prompt_format, chat: see `Prompter`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        params: Any,
        folder: str | pathlib.Path,
        sharder: Sharder,
        compute_dtype: str = "float32",
        batch_size: int = 16,
        date: str = DATE,
        prompt_format: PromptFormat = PromptFormat(),
        chat: Chat | None = None,
    ):
        super().__init__(config, folder, date, prompt_format, chat)
        if sharder.one_cpu:  # once, and not beside the stored ones: a CPU casts slowly
            params = jax.tree.map(lambda x: x.astype(compute_dtype), params)
        self.params = params
        self._folder, self._date = folder, date
        # Weights that are cut over fsdp stay where they are: for each token activations move, which
        # are far smaller.
        self.decoder = Decoder(
            config, jnp.dtype(compute_dtype), sharder.with_rules(batch=("data",))
        )
        self.sharder = self.decoder.sharder
        self.batching = Batching(batch_size, self.sharder.batch_ways, self.sharder.one_cpu)
        self.stop_ids = self._stop_ids()

    @property
    def batch_size(self) -> int:
        return self.batching.size

    def _stop_ids(self) -> tuple[int, ...]:
        ends = {*stop_ids(self._folder, self.config), self.tokenizer.eos_token_id}
        if self.chat:
            ends.add(self.chat.end_of_turn())
        return tuple(sorted(ends - {None}))

    def with_format(self, prompt_format: PromptFormat) -> Engine:
        """Return this model, its weights and programs shared, whose prompts are written in another
        format. Raises ValueError as `Chat` does."""
        other = copy.copy(self)
        Prompter.__init__(other, self.config, self._folder, self._date, prompt_format)
        other.stop_ids = other._stop_ids()
        return other

    @classmethod
    def open(
        cls,
        folder: str | pathlib.Path,
        *,
        mesh: str = "data:1,fsdp:-1,tensor:1",
        compute_dtype: str = "float32",
        batch_size: int = 16,
        date: str = DATE,
        prompt_format: PromptFormat = PromptFormat(),
    ) -> Engine:
        """Load a Hugging Face folder or a checkpoint of launch.convert. Raises ValueError as
        `load_params` and `Chat` do."""
        folder, sharder = resolve(hub.folder_of(str(folder))), Sharder(make_mesh(mesh))
        if (folder / MODEL).is_file():
            config, params, _ = load_checkpoint(folder, sharder)
            folder = folder / COMPANIONS_FOLDER
        else:
            config, params = load_params(folder, sharder)
        settings = compute_dtype, batch_size, date, prompt_format
        return cls(config, params, folder, sharder, *settings)

    def complete(self, texts: Sequence[str], max_new: int, title: str = "answers") -> list[str]:
        """Continue raw texts greedily; special tokens written in a text are recognised."""
        prompts = [self.encode(text) for text in texts]
        return [self.decode(ids) for ids in self.complete_ids(prompts, max_new, title)]

    def complete_ids(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        title: str = "answers",
        sampling: Sampling = Sampling(),
        done: Done | None = None,
        numbers: Sequence[int] | None = None,
        until: Sequence[str] = (),
    ) -> list[list[int]]:
        """Continue prompts, the longest first.

        Args:
          prompts: token ids; none longer than the model's positions less `room(max_new)`.
          max_new: tokens at most, those of a thought not counted where it has a limit.
          sampling: a draw depends on seed and number alone, not on what runs beside. (How many
            rows run decides in which order a product is summed, so a near tie may fall otherwise.)
          done: called with (index, new ids) as soon as an answer is there.
          numbers: of the prompts, for sampling; their indices by default.
          until: stop texts. An answer ends some tokens after it holds one behind its thought; it is
            not cut off there, and what stands before the first of them is the same as without
            `until`.

        Returns:
          for each prompt the new ids, without the stop token.

        Raises:
          ValueError: an empty prompt, or one that is too long.
        """
        self.check(prompts, self.room(max_new))
        how = title, sampling, until
        if self.thought_limit is None:
            return self.continue_ids(prompts, max_new, *how, done, numbers)

        def write(places, written, most, keep):
            behind = [[*prompts[i], *ids] for i, ids in zip(places, written)]
            named = [i if numbers is None else numbers[i] for i in places]
            if any(written):  # other draws than those of the first part
                named = [f"{name} continued" for name in named]
            self.continue_ids(behind, most, *how, keep, named)

        return thought_limit.within(self.thought_limit, write, len(prompts), max_new, title, done)

    def continue_ids(
        self,
        prompts: Sequence[Sequence[int]],
        max_new: int,
        title: str = "answers",
        sampling: Sampling = Sampling(),
        until: Sequence[str] = (),
        done: Done | None = None,
        numbers: Sequence[int | str] | None = None,
    ) -> list[list[int]]:
        """Continue prompts as `complete_ids` does, without a limit on thoughts."""
        self.check(prompts, max_new)
        if numbers is None:
            numbers = range(len(prompts))
        if not prompts:
            return []
        draws = self._draws(sampling, numbers)
        finished = functools.partial(self._has_stop, until=until) if until else None
        with self._collecting(len(prompts), title, done) as (answers, keep):
            for rows, group in self.batching.pools(prompts, max_new, self.model.groups):
                server = Server(self.model, rows, self.stops(), draws, max_new, self.put, finished)
                server.run([(i, prompts[i]) for i in group], keep)
        return answers

    @contextlib.contextmanager
    def _collecting(
        self, number: int, title: str, done: Done | None
    ) -> Iterator[tuple[list[list[int]], Callable[[int, np.ndarray], None]]]:
        """Yield (the answers, without stop tokens; what takes the index and all new tokens of
        one), under a progress bar."""
        answers: list[list[int]] = [[] for _ in range(number)]
        tokens, start, stops = 0, time.perf_counter(), self.stops()

        def keep(i: int, ids: np.ndarray) -> None:
            nonlocal tokens
            tokens += len(ids)
            answers[i] = [int(token) for token in ids if token not in stops]
            if done:
                done(i, answers[i])
            speed = tokens / (time.perf_counter() - start)
            bar.set_postfix_str(f"{speed:,.0f} tokens/s", refresh=False)
            bar.update(1)

        with progress(number, title, "answer") as bar:
            yield answers, keep

    @functools.cached_property
    def model(self) -> Model:
        """What continues sequences."""
        kind = ByBlock if self.sharder.one_cpu else Whole
        return kind(self.decoder, self.params)

    def put(self, batch: dict[str, np.ndarray]) -> dict[str, jax.Array]:
        """Lay a batch, which every process holds, out on the mesh."""
        return put_batch(batch, self.sharder)

    def answer(
        self,
        talks: Sequence[Talk],
        max_new: int,
        title: str = "answers",
        sampling: Sampling = Sampling(),
        done: Done | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Continue conversations, each a user's text or turns as in `ask`; see `complete_ids`."""
        prompts = [self.ask_talk(talk) for talk in talks]
        return self.complete_ids(prompts, max_new, title, sampling, done, numbers)

    def fits(self, talk: Talk, max_new: int) -> bool:
        """Tell whether a conversation and its answer fit into the model's positions."""
        return len(self.ask_talk(talk)) + self.room(max_new) <= self.config.max_length

    def score(
        self, pairs: Sequence[Pair], title: str = "likelihoods", done: Done | None = None
    ) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) the log-likelihood of the continuation, and
        whether it is the greedy one.

        Args:
          pairs: token ids; neither part is empty, and together they fit into the model's positions.
          done: called with (index, result) as soon as one is there.

        Raises:
          ValueError: an empty part, a pair that is too long, or a likelihood that is NaN.
        """
        self.check([(*context, *continuation[:-1]) for context, continuation in pairs], 0)
        for i, (context, continuation) in enumerate(pairs):
            if not len(context) or not len(continuation):
                raise ValueError(
                    f"{title}: context or continuation {i} is empty; give the context a token to "
                    "begin with."
                )
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        texts = texts_of(pairs)
        prefix = self.batching.prefix([text.example.prompt_ids for text in texts])
        with progress(len(pairs), title, "text") as bar:
            for rows, group in self.batching.groups([length_of(text.example) for text in texts]):
                batch = [texts[i] for i in group]
                for text, values in zip(batch, self._score_batch(batch, rows, prefix)):
                    for i, (logprob, greedy) in zip(text.indices, values):
                        if not math.isfinite(logprob):
                            raise NotFinite(
                                f"{title}: a log-likelihood is {logprob}: the model's weights hold "
                                "NaN or overflow."
                            )
                        results[i] = float(logprob), bool(greedy)
                        if done:
                            done(i, results[i])
                    bar.update(len(text.indices))
        return results

    def _score_batch(self, texts: Sequence[Text], rows: int, prefix: int) -> np.ndarray:
        """Return [rows, E, 2], see `likelihoods`."""
        batch = self.lay_out([text.example for text in texts], rows, prefix)
        ends = np.zeros((rows, max(len(text.ends) for text in texts)), np.int32)
        for row, text in zip(ends, texts):
            row[: len(text.ends)] = text.ends
        batch = put_batch(batch | {"ends": ends}, self.sharder)
        return processes.fetch(likelihoods(self.decoder, self.params, batch))

    def lay_out(
        self, examples: Sequence[Example], rows: int, prefix: int = 0
    ) -> dict[str, np.ndarray]:
        """Return a batch for `over_answers`, filled up to so many rows with copies of no weight;
        without the first tokens that all share, so many."""
        filled = list(examples) + [examples[-1]] * (rows - len(examples))
        batch = training_batch(
            filled,
            padded(max(length_of(example) - 1 for example in examples) - prefix),
            padded(max(len(example.answer_ids) for example in examples)),
            prefix=prefix,
        )
        batch["weights"][len(examples) :] = 0.0
        return batch

    def put_prompts(self, prompts: Sequence[Sequence[int]]) -> dict[str, jax.Array]:
        """Lay prompts out as one batch on the mesh, see `prompt_batch`."""
        return put_batch(prompt_batch(prompts, padded(max(map(len, prompts)))), self.sharder)

    def run_batches(
        self,
        sizes: Sequence[int],
        title: str,
        done: Done | None,
        run: Callable[[Sequence[int], np.ndarray], np.ndarray],
    ) -> list[list[int]]:
        """Continue prompts batch by batch.

        Args:
          sizes: tokens that each prompt and its answer take.
          done: called with (index, new ids) as soon as an answer is there.
          run: maps the indices [B] of a batch and the stop tokens, int32 [n], to new tokens
            [B, max_new] as `decode` returns them.

        Returns:
          for each prompt the new ids, without the stop token.
        """
        with self._collecting(len(sizes), title, done) as (answers, keep):
            # On a CPU idle rows cost as much as others.
            for rows, group in self.batching.groups(sizes, few_idle=self.batching.one_cpu):
                filled = group + [group[-1]] * (rows - len(group))
                for i, ids in zip(group, run(filled, self.stops())):
                    keep(i, ids[ids >= 0])
        return answers

    def stops(self) -> np.ndarray:
        """Return the stop tokens, int32 [n]."""
        return np.asarray(self.stop_ids or NO_STOP, np.int32)

    def check(self, prompts: Sequence[Sequence[int]], max_new: int) -> None:
        """Raise ValueError if a prompt is empty, or too long for so many new tokens."""
        for i, ids in enumerate(prompts):
            if not len(ids):
                raise ValueError(f"prompt {i} is empty.")
            if len(ids) + max_new > self.config.max_length:
                raise ValueError(
                    f"prompt {i} has {len(ids)} tokens, and {max_new} more are asked for; the "
                    f"model has {self.config.max_length} positions. Shorten it, or leave it out."
                )

    def _has_stop(self, ids: Sequence[int], until: Sequence[str]) -> bool:
        """Tell whether the first stop text is there for good: no longer one that begins before it
        can still come."""
        # The last tokens of a text may be read otherwise when more follow: parts of a character, a
        # blank before a full stop.
        text = after_thought(decode(self.tokenizer, ids[:-_UNSURE]))
        first = first_stop(text, until)
        return first < len(text) and len(text) >= first + max(map(len, until))

    def _draws(
        self, sampling: Sampling, numbers: Sequence[int | str]
    ) -> dict[str, np.ndarray] | None:
        if not sampling.temperature:
            return None
        return {
            "temperature": np.float32(sampling.temperature),
            "top_p": np.float32(sampling.top_p),
            "key": tensor_keys(sampling.seed, "answer", list(map(str, numbers))),
        }


def first_stop(text: str, until: Sequence[str]) -> int:
    """Return where the first of the stop texts begins, the text's length where it holds none."""
    starts = [text.find(stop) for stop in until if stop]
    return min((start for start in starts if start >= 0), default=len(text))
