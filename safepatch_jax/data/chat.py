"""Chat template and answer mask.

A conversation is rendered by the tokenizer's own chat template, or another one (`prompt_format`).
Answer tokens are the assistant's text and the end-of-turn token; loss and scores see these alone.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np

from safepatch_jax.data import rendering
from safepatch_jax.data.cells import Turns, transcript
from safepatch_jax.data.prompt_format import SKIP, PromptFormat
from safepatch_jax.data.records import Record
from safepatch_jax.data.tokenizer import TAGS, NoChat, decode, load_tokenizer
from safepatch_jax.runtime.reading import Refused

# Prompt and answer, and the turns before them where there may be some.
Pair = tuple[str, str] | tuple[str, str, Turns]
_OPEN_THOUGHT = re.compile(r"<think>\s*\Z")
_ENDED_THOUGHT = re.compile(r"<think>\s*</think>\s*\Z")
_EMPTY_THOUGHT = re.compile(r"\A\s*<think>\s*</think>\s*")
_WRITTEN_THOUGHT = re.compile(r"\A\s*<think>.*?</think>\s*", re.DOTALL)
_A_THOUGHT = re.compile(r"\A\s*<think>")
_SWITCH = "enable_thinking"
_END_OF_THOUGHT = "\n\n</think>\n\n"
LENGTH_STEP = 8  # tokens: most padded lengths are multiples, so that few shapes are compiled
# Parts of a loss that treats its examples differently: `training.losses.Mismatch`.
HARMFUL, MISMATCH, BENIGN = range(3)


@dataclasses.dataclass(frozen=True)
class Example:
    """One tokenised pair.

    Attributes:
      prompt_ids: through the generation prompt, and an empty thought that a template writes before
        an answer.
      answer_ids: with the end-of-turn token.
      prompt: the text, with what stands before it.
      reference: log-probability of the answer by a reference model, nats, where a loss needs it.
      part: of the loss, where it has parts.
      asked: token ids after which a model writes its own answer, where they are others.
    """

    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    prompt: str = ""
    reference: float | None = None
    part: int | None = None
    asked: tuple[int, ...] = ()

    @property
    def asked_ids(self) -> tuple[int, ...]:
        """The ids after which a model writes its own answer."""
        return self.asked or self.prompt_ids

    @property
    def opening_ids(self) -> tuple[int, ...]:
        """The ids after which an answer's own text begins, thoughts ended."""
        return max(self.prompt_ids, self.asked, key=len)

    @property
    def length(self) -> int:
        """How many tokens a model is given; the last answer token is only a target."""
        return len(self.prompt_ids) + len(self.answer_ids) - 1


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Examples, and how many pairs were dropped and how many answers were cut."""

    examples: tuple[Example, ...]
    dropped: int
    cut: int

    def describe(self, limits: str) -> str:
        """Say so for people; `limits` is 'PROMPT/ANSWER' in tokens."""
        prompt, _, answer = limits.partition("/")
        text = f"{len(self.examples)} examples"
        if self.dropped:
            text += f", {self.dropped} left out (prompt longer than {prompt} tokens)"
        if self.cut:
            text += f", {self.cut} answers cut at {answer} tokens"
        return text


class Chat:
    """Renders and tokenises conversations of one model folder.

    A template that opens a thought (`<think>`) before an answer is given the end of it: answers are
    trained and written without one. A thought that a template writes before an answer is
    context, and carries no loss.

    Args:
      folder: of the model.
      vocab_size: rows of its embedding.
      date: see `rendering.render`.
      prompt_format: another template than the tokenizer's, and a system message before every
        conversation.

    Raises:
      NoChat: no tokenizer or no chat template.
      ValueError: a damaged tokenizer, or a vocabulary larger than the model's embedding; a template
        that fails, or one of `prompt_format` that leaves out what is said.
    """

    def __init__(
        self,
        folder: str | pathlib.Path,
        vocab_size: int,
        date: str = rendering.DATE,
        prompt_format: PromptFormat = PromptFormat(),
    ):
        rendering.prepare()  # it starts while the tokenizer is loaded
        self._folder, self._date, self._format = folder, date, prompt_format
        self.tokenizer = load_tokenizer(folder, vocab_size)
        self._template = prompt_format.template_for(self.tokenizer)
        if not self._template and not self.tokenizer.chat_template:
            raise NoChat(
                f"{folder}: the tokenizer has no chat template, so this is not a chat model. Copy "
                "the chat_template of the model's chat variant into the folder, or let prompts be "
                "written without one: --data.template=plain."
            )
        if not self.tokenizer.is_fast:
            raise ValueError(
                f"{folder}: only a slow tokenizer is there. Copy the tokenizer.json of the model "
                "into the folder."
            )
        # Not all_special_ids: in Gemma's own folders the end of a turn has no role there.
        added = self.tokenizer.added_tokens_decoder
        self._special_ids = {i for i, token in added.items() if token.special}
        # A thought's tags end no answer.
        self._special_ids -= {i for i, token in added.items() if str(token) in TAGS}
        prompt_format.check_variables(self.tokenizer, folder)
        if self._template:
            self._special_ids.add(self.tokenizer.eos_token_id)
            prompt_format.check(self, folder)
            return
        try:
            self.prompt_text("test")
        except ValueError as error:
            raise ValueError(
                f"{folder}: the chat template does not render a user's message: {error}. Copy "
                "chat_template.jinja or tokenizer_config.json of the model's chat variant into the "
                "folder."
            ) from error

    def prompt_text(self, prompt: str, turns: Turns = ()) -> str:
        """Return a user's text, after other turns, up to where the answer begins."""
        return self.open_answer(self._messages(prompt, turns))

    def _messages(self, prompt: str, turns: Turns) -> list[dict[str, str]]:
        """Return the messages of a conversation. A system message for which the template has no
        place stands before the user's first text, as `Prompter.ask` puts it."""
        spoken = [*turns, ("user", prompt)]
        systems = [self.system] if self.system else []
        if spoken[0][0] == "system":
            systems.append(spoken.pop(0)[1])
        if systems and self._takes_system:
            spoken.insert(0, ("system", "\n\n".join(systems)))
        elif systems:
            role, first = spoken[0]
            spoken[0] = (role, "\n\n".join([*systems, first]))
        return [{"role": role, "content": text} for role, text in spoken]

    @property
    def system(self) -> str:
        """The message that stands before every conversation, and before one's own; '' for none."""
        return self._format.system

    @functools.cached_property
    def _takes_system(self) -> bool:
        """Whether the template renders a system message: some refuse it, others leave it out."""
        talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "test"}]
        try:
            return talk[0]["content"] in self.open_answer(talk)
        except rendering.NotRendered:
            return False

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] = MappingProxyType({}),
        **options: bool,
    ) -> str:
        """Return a conversation in the chat template, given these variables after those of
        `prompt_format`; see `rendering.render`."""
        return rendering.render(
            self.tokenizer,
            messages,
            date=self._date,
            template=self._template,
            variables={**self._format.variables, **variables},
            **options,
        )

    def open_answer(self, messages: Sequence[Mapping[str, Any]]) -> str:
        """Return a conversation up to where the assistant's next answer begins, an empty thought
        with it where `prompt_format` skips thoughts."""
        if self._format.thinking != SKIP:
            return self._opening(messages)
        text = self._opening(messages, {_SWITCH: False} if self._has_switch else {})
        return text if _ENDED_THOUGHT.search(text) else text + f"<think>{_END_OF_THOUGHT}"

    @functools.cached_property
    def _has_switch(self) -> bool:
        """Whether the template itself can be told not to think."""
        template = self._template or self.tokenizer.get_chat_template()
        return _SWITCH in rendering.variables_of(template)

    def _opening(
        self,
        messages: Sequence[Mapping[str, Any]],
        variables: Mapping[str, Any] = MappingProxyType({}),
    ) -> str:
        text = self.render(messages, variables, generate=True)
        return text.rstrip() + _END_OF_THOUGHT if _OPEN_THOUGHT.search(text) else text

    def encode(self, prompt: str, answer: str, turns: Turns = ()) -> Example:
        """Tokenise one pair, after other turns.

        Raises:
          ValueError: the template does not render the answer after its prompt.
        """
        messages = self._messages(prompt, turns)
        opening = self._opening(messages)
        before, answered = self._parts(opening, messages, answer)
        prompt_ids, whole_ids = self._ids(before), self._ids(before + answered)
        if whole_ids[: len(prompt_ids)] == prompt_ids:
            # Not the answer alone: it may get other first tokens (SentencePiece).
            answer_ids = whole_ids[len(prompt_ids) :]
        else:
            # One token would hold the prompt's last character and the answer's first (a line break
            # before a line break).
            answer_ids = self._ids(answered)
        special = self._special_places(answer_ids)
        if special and self._closing:
            # Not the first of all: the answer's text may hold some, such as HTML's <s>.
            answer_ids = answer_ids[: special[max(len(special) - self._closing, 0)] + 1]
        else:
            answer_ids = answer_ids + [self.tokenizer.eos_token_id]
        example = Example(tuple(prompt_ids), tuple(answer_ids), transcript(prompt, turns))
        asked = opening
        if self._format.thinking == SKIP:
            asked = self.open_answer(messages)
        if asked == before:
            return example
        return dataclasses.replace(example, asked=tuple(self._ids(asked)))

    def _special_places(self, ids: Sequence[int]) -> list[int]:
        return [place for place, token in enumerate(ids) if token in self._special_ids]

    @functools.cached_property
    def _closing(self) -> int:
        """How many special tokens the template writes after an answer; the first ends the turn."""
        messages = self._messages("test", ())
        _, answered = self._parts(self._opening(messages), messages, "test")
        return len(self._special_places(self._ids(answered)))

    def _parts(
        self, before: str, messages: Sequence[Mapping[str, Any]], answer: str
    ) -> tuple[str, str]:
        """Return what stands before an answer's own text, and the text from there on.

        Templates of models that think leave thoughts out, or write one before the answer, mostly
        an empty one: it is part of what stands before. So is an empty one of the data.

        Args:
          before: see `_opening`.
        """
        whole = self.render([*messages, {"role": "assistant", "content": answer}])
        stem = before
        if not whole.startswith(before):
            stem = _ENDED_THOUGHT.sub("", before)
        if not whole.startswith(stem):
            self._refuse_other_prompt(before)
        rest = whole[len(stem) :]
        thinks = any(tag in answer for tag in TAGS)
        block = _EMPTY_THOUGHT.match(rest) if thinks else _WRITTEN_THOUGHT.match(rest)
        if block:
            written = block.group()
            if self._written_thought and rest.startswith(self._written_thought):
                written = self._written_thought  # white space behind it is the answer's
            rest = rest[len(written) :]
            before = before if _ENDED_THOUGHT.search(before) else before + written
        if _ENDED_THOUGHT.search(before) and _A_THOUGHT.match(rest):
            raise Refused(
                f"{self._template_file()}: the chat template ends the thought before an answer, "
                f"and the answer {answer!r:.60} begins with one of its own. Take the thoughts out "
                "of the data, or let the template think (--data.template_kwargs)."
            )
        return before, rest

    @functools.cached_property
    def _written_thought(self) -> str:
        """The thought that the template writes before an answer, with the white space beside it; ''
        for none."""
        messages = [{"role": "user", "content": "test"}]
        whole = self.render([*messages, {"role": "assistant", "content": "test"}])
        before = self._opening(messages)
        stem = before if whole.startswith(before) else _ENDED_THOUGHT.sub("", before)
        block = _WRITTEN_THOUGHT.match(whole[len(stem) :])
        return block.group() if block and whole.startswith(stem) else ""

    def _template_file(self) -> str:
        return self._format.name if self._template else str(self._folder)

    def _refuse_other_prompt(self, before: str) -> NoReturn:
        place, file = self._folder, "chat_template.jinja there"
        if self._template:
            place = file = self._format.name
        raise ValueError(
            f"{place}: the chat template renders the prompt otherwise when an answer "
            f"follows; cannot tell answer tokens from prompt tokens (prompt: {before!r:.200}). "
            f"Edit {file} so that the text up to the answer is the same, or copy another template "
            "of the model."
        )

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def end_of_turn(self) -> int:
        """Return the id with which an answer ends in the chat template."""
        return self.encode("test", "test").answer_ids[-1]

    def encode_all(self, pairs: Sequence[Pair], max_prompt: int, max_answer: int) -> Encoded:
        """Tokenise pairs, as `encode` takes them; leave out too long prompts, cut too long answers
        (a cut answer has no end-of-turn token).

        Raises:
          ValueError: every prompt is too long.
        """
        encoded = [self.encode(*pair) for pair in pairs]
        fitting = [e for e in encoded if len(e.prompt_ids) <= max_prompt]
        if not fitting:
            shortest = min((len(e.prompt_ids) for e in encoded), default=0)
            raise ValueError(
                f"All {len(encoded)} prompts are longer than data.max_prompt_tokens = {max_prompt} "
                f"(the shortest has {shortest}, template included). Raise the limit."
            )
        cut = sum(len(e.answer_ids) > max_answer for e in fitting)
        examples = [dataclasses.replace(e, answer_ids=e.answer_ids[:max_answer]) for e in fitting]
        return Encoded(tuple(examples), len(encoded) - len(fitting), cut)

    def decode(self, ids: Sequence[int]) -> str:
        return decode(self.tokenizer, ids).strip()


def answer_pairs(records: Sequence[Record], field: str = "answer") -> list[Pair]:
    """Pair each record's prompt with its answer or its refusal, and with what stands before it."""
    return [(r.prompt, getattr(r, field), r.turns) for r in records]


def bucket(length: int, step: int = LENGTH_STEP) -> int:
    """Round a length up, so that few shapes are compiled."""
    return -(-length // step) * step


def lengths(examples: Sequence[Example], step: int = LENGTH_STEP) -> tuple[int, int]:
    """Return (T, A): padded sequence length and answer length that hold all examples, multiples of
    `step`."""
    answer = max(len(e.answer_ids) for e in examples)
    return bucket(max(e.length for e in examples), step), bucket(answer, step)


def training_batch(
    examples: Sequence[Example],
    length: int,
    answer_length: int,
    rows: Sequence[int] | None = None,
    prefix: int = 0,
) -> dict[str, Any]:
    """Lay examples out for the loss.

    Args:
      examples: B pairs.
      length, answer_length: T and A, see `lengths`.
      rows: numbers of the examples that are laid out, the other rows stay empty; None for all.
      prefix: P, how many first tokens all examples share that are laid out once, see
        `shared_prefix`.

    Returns:
      NumPy arrays:
        tokens: [B, T] int32, right padded; those of the prefix left out.
        valid: [B, T] bool.
        predict_at: [B, A] int32, the index into T whose logits predict each answer token.
        targets: [B, A] int32.
        weights: [B, A] float32, 1 for an answer token, else 0.
        reference: [B, 1] float32, where the examples have one.
        part: [B, 1] int32, where the examples have one.
        prefix: [1, P] int32, where P is not 0.
    """
    shape = len(examples), length
    tokens, valid = np.zeros(shape, np.int32), np.zeros(shape, bool)
    predict_at = np.zeros((len(examples), answer_length), np.int32)
    targets, weights = np.zeros_like(predict_at), np.zeros(predict_at.shape, np.float32)
    for b in range(len(examples)) if rows is None else rows:
        e = examples[b]
        ids = (*e.prompt_ids[prefix:], *e.answer_ids[:-1])
        tokens[b, : len(ids)], valid[b, : len(ids)] = ids, True
        n = len(e.answer_ids)
        predict_at[b, :n] = len(e.prompt_ids) - prefix - 1 + np.arange(n)
        targets[b, :n], weights[b, :n] = e.answer_ids, 1.0
    batch = {
        "tokens": tokens,
        "valid": valid,
        "predict_at": predict_at,
        "targets": targets,
        "weights": weights,
    }
    if examples[0].reference is not None:
        batch["reference"] = np.array([[e.reference] for e in examples], np.float32)
    if examples[0].part is not None:
        batch["part"] = np.array([[e.part] for e in examples], np.int32)
    return with_prefix(batch, examples[0].prompt_ids[:prefix])


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all prompts have in common, a multiple of LENGTH_STEP: of the
    template, often a system message. One token at least is left of each; a single prompt shares
    nothing."""
    if len(prompts) < 2:
        return 0
    shared, first = min(map(len, prompts)) - 1, prompts[0]
    for ids in prompts[1:]:
        pairs = zip(range(shared), first, ids)
        shared = next((i for i, ours, other in pairs if ours != other), shared)
    return shared - shared % LENGTH_STEP


def with_prefix(batch: dict[str, Any], ids: Sequence[int]) -> dict[str, Any]:
    """Return a batch with the tokens that its sequences begin with, [1, P] int32, if any."""
    return batch | {"prefix": np.array([ids], np.int32)} if len(ids) else batch


def prompt_batch(prompts: Sequence[Sequence[int]], length: int) -> dict[str, Any]:
    """Lay prompts out for generation: tokens [B, T], RIGHT padded, and lengths [B], int32."""
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, ids in zip(tokens, prompts):
        row[: len(ids)] = ids
    return {"tokens": tokens, "lengths": np.array([len(ids) for ids in prompts], np.int32)}
