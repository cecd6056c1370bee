"""A model that is ready to answer: prompts in, continuations and log-likelihoods out, batch by
batch on the mesh."""

from __future__ import annotations

import dataclasses
import functools
import math
import pathlib
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import jinja2
import numpy as np

from safepatch_jax.data.chat import (
    Chat,
    Example,
    NoChat,
    load_tokenizer,
    prompt_batch,
    training_batch,
)
from safepatch_jax.evaluation.decoding import Rule, check_expert, decode_contrasted
from safepatch_jax.evaluation.generate import PIECE, decode, decode_until
from safepatch_jax.io.checkpoint import COMPANIONS_FOLDER, MODEL, load_checkpoint
from safepatch_jax.io.hf import load_params
from safepatch_jax.mesh import Sharder, make_mesh
from safepatch_jax.models.config import DecoderConfig, stop_ids
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.numerics import NotFinite, tensor_keys
from safepatch_jax.runtime import processes
from safepatch_jax.runtime.console import progress
from safepatch_jax.training.objective import over_answers, target_logprobs
from safepatch_jax.training.step import put_batch

Done = Callable[[int, Any], None]
Talk = str | Sequence[str]
LONG = 512  # tokens
_UNSURE = 4  # tokens
_NO_STOP = (-2,)  # no token is this


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: the most likely one at temperature 0, else drawn (see
    `generate.decode`)."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not (math.isfinite(self.temperature) and self.temperature >= 0 and 0 < self.top_p <= 1):
            raise ValueError(
                f"temperature must be 0 or more and top_p in (0, 1], got {self.temperature} and "
                f"{self.top_p}."
            )


class Prompter:
    """A model's tokenizer and chat template, without its weights.

    Args:
      config: the model's; its vocabulary and number of positions count.
      folder: whose tokenizer and chat template are taken.

    Attributes:
      chat: renders conversations; None where the folder has no chat template.
      tokenizer: Hugging Face's.

    Raises:
      ValueError: a damaged tokenizer, or a vocabulary larger than the model's embedding.
    """

    def __init__(self, config: DecoderConfig, folder: str | pathlib.Path):
        self.config = config
        try:
            self.chat: Chat | None = Chat(folder, config.vocab_size)
            self.tokenizer = self.chat.tokenizer
        except NoChat:
            self.chat, self.tokenizer = None, load_tokenizer(folder, config.vocab_size)

    def encode(self, text: str) -> list[int]:
        """Tokenise a text; no special tokens are added."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def ask(self, *turns: str, system: str | None = None) -> list[int]:
        """Return the ids of a conversation in the chat template: the user's first message, an
        answer, the next message and so on.

        Args:
          system: a system message. Where the template refuses it or leaves it out, it stands before
            the user's first text. None for none: a template that puts in one of its own then does
            so; '' is an empty one in its place.

        Raises:
          ValueError: the model has no chat template, or one that does not render a conversation of
            several turns.
        """
        template = self.needed_chat().tokenizer.apply_chat_template
        render = lambda talk: template(talk, tokenize=False, add_generation_prompt=True)
        talk = [
            {"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)
        ]
        if system is not None:
            try:
                text = render([{"role": "system", "content": system}, *talk])
                if text.count(system.strip()) > sum(turn.count(system.strip()) for turn in turns):
                    return self.encode(text)
            except (jinja2.TemplateError, TypeError):
                pass  # no system role (Gemma)
            talk[0]["content"] = f"{system}\n\n{turns[0]}" if system else turns[0]
        try:
            return self.encode(render(talk))
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(
                f"the chat template does not render {len(turns)} messages in turn ({error}). Copy "
                "that of "
                "the model's chat variant into the folder."
            ) from error

    def needed_chat(self) -> Chat:
        """Return what renders conversations. Raises ValueError if the model has no chat
        template."""
        if self.chat is None:
            raise ValueError(
                "the model has no chat template; copy that of its chat variant into the folder."
            )
        return self.chat

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True).strip()


class Engine(Prompter):
    """A loaded model with its tokenizer.

    Args:
      config, params: the model; params nested, on the mesh of `sharder`.
      folder: whose tokenizer, chat template and stop tokens are taken.
      sharder: the mesh.
      compute_dtype: of the arithmetic.
      batch_size: sequences that run together.
    """

    def __init__(
        self,
        config: DecoderConfig,
        params: Any,
        folder: str | pathlib.Path,
        sharder: Sharder,
        compute_dtype: str = "float32",
        batch_size: int = 16,
    ):
        super().__init__(config, folder)
        self.params, self.batch_size = params, batch_size
        # Weights that are cut over fsdp stay where they are: for each token activations move, which
        # are far smaller.
        self.decoder = Decoder(
            config, jnp.dtype(compute_dtype), sharder.with_rules(batch=("data",))
        )
        self.sharder = self.decoder.sharder
        ends = {self.tokenizer.eos_token_id} | ({self.chat.end_of_turn()} if self.chat else set())
        self.stop_ids = tuple(sorted((stop_ids(folder, config) | ends) - {None}))

    @classmethod
    def open(
        cls,
        folder: str | pathlib.Path,
        *,
        mesh: str = "data:1,fsdp:-1,tensor:1",
        compute_dtype: str = "float32",
        batch_size: int = 16,
    ) -> Engine:
        """Load a Hugging Face folder or a checkpoint of launch.convert. Raises ValueError as
        `load_params` and `Chat` do."""
        folder, sharder = pathlib.Path(folder).expanduser(), Sharder(make_mesh(mesh))
        if (folder / MODEL).is_file():
            config, params, _ = load_checkpoint(folder, sharder)
            return cls(
                config, params, folder / COMPANIONS_FOLDER, sharder, compute_dtype, batch_size
            )
        return cls(*load_params(folder, sharder), folder, sharder, compute_dtype, batch_size)

    def complete(self, texts: Sequence[str], max_new: int, title: str = "answers") -> list[str]:
        """Continue raw texts greedily; special tokens written in a text are recognised."""
        return [
            self.decode(ids)
            for ids in self.complete_ids([self.encode(t) for t in texts], max_new, title)
        ]

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
        """Continue prompts, those of like length together.

        Args:
          prompts: token ids; none longer than the model's positions less `max_new`.
          max_new: tokens at most.
          sampling: a draw depends on seed and number alone, not on what runs beside.
          done: called with (index, new ids) as soon as an answer is there.
          numbers: of the prompts, for sampling; their indices by default.
          until: stop texts. A batch ends once each answer holds one, or its stop token; the texts
            are not cut off, and what stands before the first of them is the same as without
            `until`.

        Returns:
          for each prompt the new ids, without the stop token.

        Raises:
          ValueError: an empty prompt, or one that is too long.
        """
        self._check(prompts, max_new)
        numbers = range(len(prompts)) if numbers is None else numbers

        def run(filled, stops):
            batch = self._prompts([prompts[i] for i in filled])
            inputs = (
                self.decoder,
                self.params,
                batch["tokens"],
                batch["valid"],
                stops,
                self._draws(sampling, [numbers[i] for i in filled]),
            )
            if until and max_new > PIECE:
                return decode_until(
                    *inputs, max_new=max_new, finished=lambda ids: self._has_stop(ids, until)
                )
            return processes.fetch(decode(*inputs, max_new=max_new))

        return self._answers([len(p) + max_new for p in prompts], title, done, run)

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
        return self.complete_ids(
            [self.ask(*_turns(talk)) for talk in talks], max_new, title, sampling, done, numbers
        )

    def fits(self, talk: Talk, max_new: int) -> bool:
        """Tell whether a conversation and its answer fit into the model's positions."""
        return len(self.ask(*_turns(talk))) + max_new <= self.config.max_length

    def complete_contrasted(
        self,
        talks: Sequence[Talk],
        rule: Rule,
        max_new: int,
        title: str = "answers",
        done: Done | None = None,
        expert: Any = None,
    ) -> list[list[int]]:
        """Continue conversations greedily, each token chosen from two streams of logits, those of
        like length together.

        Args:
          talks: users' texts, or conversations in turns as in `ask`; rendered with each of the
            rule's two system messages.
          rule: how the streams are combined (see `decoding`); its numbers are compiled in.
          max_new, done: see `complete_ids`.
          expert: nested parameters of the second stream, on the mesh of `sharder`, for a rule that
            needs them.

        Returns:
          for each conversation the new ids, without the stop token.

        Raises:
          ValueError: no chat template, a prompt that is too long, or an expert that is missing, not
            used, or of other shapes.
        """
        check_expert(rule, self.params, expert)
        streams = self._streams(talks, rule)
        for prompts in streams:
            self._check(prompts, max_new)
        run = lambda filled, stops: processes.fetch(
            self._contrasted(
                [[prompts[i] for i in filled] for prompts in streams], stops, rule, expert, max_new
            )
        )
        # Both pasts are held, so both count.
        rooms = max_new, min(rule.steps or max_new, max_new)
        sizes = [sum(len(p) + room for p, room in zip(pair, rooms)) for pair in zip(*streams)]
        return self._answers(sizes, title, done, run)

    def score(
        self,
        pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
        title: str = "likelihoods",
        done: Done | None = None,
    ) -> list[tuple[float, bool]]:
        """Return for each (context, continuation) the log-likelihood of the continuation, and
        whether it is the greedy one.

        Args:
          pairs: token ids; neither part is empty, and together they fit into the model's positions.
          done: called with (index, result) as soon as one is there.

        Raises:
          ValueError: an empty part, a pair that is too long, or a likelihood that is NaN.
        """
        self._check([(*context, *continuation[:-1]) for context, continuation in pairs], 0)
        if empty := [i for i, pair in enumerate(pairs) if not all(map(len, pair))]:
            raise ValueError(
                f"{title}: context or continuation {empty[0]} is empty; give the context a token "
                "to begin with."
            )
        results: list[tuple[float, bool]] = [(0.0, False)] * len(pairs)
        texts = _texts(pairs)
        with progress(len(pairs), title, "text") as bar:
            for rows, group in self.groups(
                [len(e.prompt_ids) + len(e.answer_ids) for e, _ in texts]
            ):
                batch = self.lay_out([texts[g][0] for g in group], rows)
                ends = np.zeros((rows, max(len(texts[g][1]) for g in group)), np.int32)
                for row, g in zip(ends, group):
                    row[: len(texts[g][1])] = [pairs[i][1][-1] for i in texts[g][1]]
                sums = processes.fetch(
                    _likelihoods(
                        self.decoder, self.params, put_batch(batch | {"ends": ends}, self.sharder)
                    )
                )
                for g, row in zip(group, sums):
                    for i, (logprob, greedy) in zip(texts[g][1], row):
                        if not math.isfinite(logprob):
                            raise NotFinite(
                                f"{title}: a log-likelihood is {logprob}: the model's weights "
                                "hold NaN or overflow."
                            )
                        results[i] = float(logprob), bool(greedy)
                        if done:
                            done(i, results[i])
                    bar.update(len(texts[g][1]))
        return results

    def seconds_per_token(self, new: int = 64, repeats: int = 3) -> float:
        """Return the median time of one decoded token of a full batch, prefill included; no stop
        token ends it earlier."""
        batch = put_batch(
            prompt_batch([(self.encode("the") * 32)[:32]] * self.batch_size, 32), self.sharder
        )
        (times,) = _times([lambda: self._plain(batch, new)], repeats)
        return statistics.median(times) / (new * self.batch_size)

    def atgr(
        self,
        rule: Rule | None = None,
        expert: Any = None,
        new: int = 64,
        repeats: int = 3,
        talk: str = "Tell me about the sea.",
        params: Any = None,
    ) -> tuple[float, float, float]:
        """Return the time of a generated token with a method divided by that of plain greedy
        decoding (average token generation
        time ratio; Xu et al. 2024, arXiv 2402.08983).

        Both run in turn, so that what slows the machine down slows both. A full batch of one
        conversation, prefill included; a rule's prompts are as long as its system messages make
        them. No stop token ends a batch earlier.

        Args:
          rule, expert: see `complete_contrasted`; None for a method that leaves decoding alone.
          new: tokens.
          talk: the user's text.
          params: nested parameters, of the model's shapes, that decode in place of its own (those
            of a patched model).

        Returns:
          (median time with / median time without, the least and the largest ratio of one repeat).

        Raises:
          ValueError: see `complete_contrasted`.
        """
        batch = self._prompts([self.ask(talk)] * self.batch_size)
        if rule is None:
            other = lambda: self._plain(batch, new, params)
        else:
            check_expert(rule, self.params, expert)
            streams = [list(prompts) * self.batch_size for prompts in self._streams([talk], rule)]
            other = lambda: self._contrasted(streams, _NO_STOP, rule, expert, new)
        without, own = _times([lambda: self._plain(batch, new), other], repeats)
        ratios = [a / b for a, b in zip(own, without)]
        return statistics.median(own) / statistics.median(without), min(ratios), max(ratios)

    def lay_out(self, examples: Sequence[Example], rows: int) -> dict[str, np.ndarray]:
        """Return a batch for `over_answers`, filled up to so many rows with copies of no weight."""
        filled = list(examples) + [examples[-1]] * (rows - len(examples))
        batch = training_batch(
            filled,
            padded(max(len(e.prompt_ids) + len(e.answer_ids) - 1 for e in examples)),
            padded(max(len(e.answer_ids) for e in examples)),
        )
        batch["weights"][len(examples) :] = 0.0
        return batch

    def rows(self, length: int) -> int:
        """Return how many sequences run together: the batch size, and fewer where they are longer
        than LONG tokens."""
        ways = self.sharder.batch_ways
        return max(ways, min(self.batch_size, self.batch_size * LONG // length) // ways * ways)

    def _answers(
        self,
        sizes: Sequence[int],
        title: str,
        done: Done | None,
        run: Callable[[list[int], np.ndarray], np.ndarray],
    ) -> list[list[int]]:
        """Return the new ids of each prompt; `run` maps the indices [B] of a batch and the stop
        tokens to tokens [B, max_new]."""
        answers: list[list[int]] = [[] for _ in sizes]
        stops, tokens, begun = (
            np.asarray(self.stop_ids or _NO_STOP, np.int32),
            0,
            time.perf_counter(),
        )
        with progress(len(sizes), title, "answer") as bar:
            for rows, group in self.groups(sizes):
                for i, ids in zip(group, run(group + [group[-1]] * (rows - len(group)), stops)):
                    answers[i] = [int(t) for t in ids if t >= 0 and t not in stops]
                    tokens += int(np.sum(ids >= 0))
                    if done:
                        done(i, answers[i])
                bar.set_postfix_str(
                    f"{tokens / (time.perf_counter() - begun):,.0f} tokens/s", refresh=False
                )
                bar.update(len(group))
        return answers

    def _prompts(self, prompts: Sequence[Sequence[int]]) -> dict[str, jax.Array]:
        return put_batch(prompt_batch(prompts, padded(max(map(len, prompts)))), self.sharder)

    def _streams(self, talks: Sequence[Talk], rule: Rule) -> list[list[list[int]]]:
        """Return the prompts of the first stream and those of the second."""
        return [
            [self.ask(*_turns(talk), system=system) for talk in talks] for system in rule.systems
        ]

    def _plain(self, batch: dict[str, jax.Array], max_new: int, params: Any = None) -> jax.Array:
        own = self.params if params is None else params
        return decode(
            self.decoder,
            own,
            batch["tokens"],
            batch["valid"],
            np.asarray(_NO_STOP, np.int32),
            max_new=max_new,
        )

    def _contrasted(
        self,
        streams: Sequence[Sequence[Sequence[int]]],
        stops: Sequence[int],
        rule: Rule,
        expert: Any,
        max_new: int,
    ) -> jax.Array:
        params = self.params, self.params if expert is None else expert
        return decode_contrasted(
            self.decoder,
            params,
            tuple(map(self._prompts, streams)),
            np.asarray(stops, np.int32),
            rule=rule,
            max_new=max_new,
        )

    def groups(self, sizes: Sequence[int]) -> list[tuple[int, list[int]]]:
        """Return (rows, indices) of each batch: those of like size together, and the largest memory
        at the beginning."""
        order, groups = sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)), []
        while order:
            rows = self.rows(padded(sizes[order[0]]))
            groups.append((rows, order[:rows]))
            order = order[rows:]
        return groups

    def _check(self, sequences: Sequence[Sequence[int]], more: int) -> None:
        for i, ids in enumerate(sequences):
            if not len(ids):
                raise ValueError(f"prompt {i} is empty.")
            if len(ids) + more > self.config.max_length:
                raise ValueError(
                    f"prompt {i} has {len(ids)} tokens, and {more} more are asked for; the model "
                    "has "
                    f"{self.config.max_length} positions. Shorten it, or leave it out."
                )

    def _has_stop(self, ids: Sequence[int], until: Sequence[str]) -> bool:
        """Tell whether the first stop text is there for good: no longer one that begins before it
        can still come."""
        # The last tokens of a text may be read otherwise when more follow: parts of a character, a
        # blank before a full stop.
        text = self.tokenizer.decode(ids[:-_UNSURE], skip_special_tokens=True)
        found = [at for at in (text.find(stop) for stop in until if stop) if at >= 0]
        return bool(found) and len(text) >= min(found) + max(map(len, until))

    def _draws(self, sampling: Sampling, numbers: Sequence[int]) -> dict[str, np.ndarray] | None:
        if not sampling.temperature:
            return None
        return {
            "temperature": np.float32(sampling.temperature),
            "top_p": np.float32(sampling.top_p),
            "key": tensor_keys(sampling.seed, "answer", [str(n) for n in numbers]),
        }


class Contrasted:
    """A model that writes by a decoding rule; greedy. Likelihoods are not touched by a rule, so it
    has none.

    Args:
      engine: the model.
      rule, expert: see `Engine.complete_contrasted`.
    """

    def __init__(self, engine: Engine, rule: Rule, expert: Any = None):
        self._engine, self._rule, self._expert = engine, rule, expert
        self.decode = engine.decode

    def answer(
        self,
        talks: Sequence[Talk],
        max_new: int,
        title: str = "answers",
        sampling: Sampling = Sampling(),
        done: Done | None = None,
        numbers: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """Continue conversations; see `Engine.answer`. Raises ValueError for a temperature above
        0."""
        if sampling.temperature:
            raise ValueError(
                f"{type(self._rule).__name__} chooses the likeliest token; leave the temperature "
                "at 0."
            )
        return self._engine.complete_contrasted(
            talks, self._rule, max_new, title, done, self._expert
        )

    def fits(self, talk: Talk, max_new: int) -> bool:
        """Tell whether a conversation and its answer fit, with either of the rule's system
        messages."""
        longest = max(
            len(self._engine.ask(*_turns(talk), system=system)) for system in self._rule.systems
        )
        return longest + max_new <= self._engine.config.max_length


def _turns(talk: Talk) -> tuple[str, ...]:
    return (talk,) if isinstance(talk, str) else tuple(talk)


def _times(runs: Sequence[Callable[[], jax.Array]], repeats: int) -> list[list[float]]:
    """Return the seconds of each repeat of each run; they run in turn."""
    taken: list[list[float]] = [[] for _ in runs]
    for _ in range(repeats + 1):
        for times, run in zip(taken, runs):
            begun = time.perf_counter()
            processes.fetch(run())
            times.append(time.perf_counter() - begun)
    return [times[1:] for times in taken]  # the first one compiles


def _texts(pairs: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[tuple[Example, list[int]]]:
    """Return each text that the model must read, with the numbers of the pairs that differ from it
    in their last token alone.

    So the choices of a question are one text where each is one token.
    """
    found: dict[tuple, tuple[Example, list[int]]] = {}
    for i, (context, continuation) in enumerate(pairs):
        key = tuple(context), tuple(continuation[:-1])
        found.setdefault(key, (Example(key[0], tuple(continuation)), []))[1].append(i)
    return list(found.values())


@functools.partial(jax.jit, static_argnames="decoder")
def _likelihoods(decoder: Decoder, params: Any, batch) -> jax.Array:
    """Return [B, E, 2] for answers that end in each of `ends` [B, E]: log-likelihood, and 1 where
    it is the greedy answer."""
    last_B1 = jnp.sum(batch["weights"] > 0, axis=-1, dtype=jnp.int32)[:, None] - 1

    def of_logits(logits_BCV, targets_BC):
        ends = [
            target_logprobs(logits_BCV, jnp.broadcast_to(end[:, None], targets_BC.shape))
            for end in batch["ends"].T
        ]
        return target_logprobs(logits_BCV, targets_BC), jnp.argmax(logits_BCV, axis=-1), tuple(ends)

    logprob_BA, best_BA, ends = over_answers(decoder, [params], batch, of_logits)
    before_BA = jnp.arange(logprob_BA.shape[1])[None] < last_B1
    sum_B1 = jnp.sum(jnp.where(before_BA, logprob_BA, 0.0), axis=-1, keepdims=True)
    greedy_B1 = jnp.all((best_BA == batch["targets"]) | ~before_BA, axis=-1, keepdims=True)
    at_end = lambda x_BA: jnp.take_along_axis(x_BA, last_B1, axis=1)
    end_BE = jnp.concatenate([at_end(x) for x in ends], axis=1)
    return jnp.stack([sum_B1 + end_BE, greedy_B1 & (at_end(best_BA) == batch["ends"])], axis=-1)


def padded(length: int) -> int:
    """Round a length up to one of few, at most an eighth above it, so that few programs are
    compiled."""
    step = max(8, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step
