"""A judge that is a Hugging Face sequence classifier, on torch and the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from safepatch_jax.evaluation.judges.base import (
    ABOUT,
    HARM,
    HARMLESS,
    REFUSAL,
    REFUSED,
    UNKNOWN,
    Done,
    Item,
    Verdict,
    in_batches,
    judge_all,
    options_of,
    verdict_of,
)
from safepatch_jax.evaluation.judges.labels import MEANINGS, read_labels
from safepatch_jax.evaluation.judges.phrases import refusal_apart
from safepatch_jax.evaluation.judges.torch_folder import load
from safepatch_jax.io import hub
from safepatch_jax.runtime.console import say

_BATCH = 16
# options that are one of a few words, the first one by default
_CHOICES = {"about": ABOUT, "text": ("answer", "pair")}


class Classifier:
    """A Hugging Face sequence classifier, on torch and the CPU.

    It reads the answer alone, as the Do-Not-Answer Longformers do ("-ro": response only), or with
    text=pair the tokenizer's pair (prompt, answer); what is longer than the model takes (theirs:
    4,096 tokens) is cut at the end. It judges content if a label is harmless about harm; if then no
    label is refused, phrases tell refusals from other harmless answers.

    Args:
      text: DIR, with options: ?complied=LABEL,LABEL&refused=LABEL&partial=LABEL&harmless=LABEL (see
        `read_labels`), about=refusal (these labels tell refusals), text=pair.

    Raises:
      ValueError: torch is absent, no safetensors classifier in the folder, unknown options or
        labels.
    """

    def __init__(self, text: str):
        folder, _, query = text.partition("?")
        self.name = f"classifier:{text}"
        options = options_of(query, (*MEANINGS, *_CHOICES), self.name)
        for key, known in _CHOICES.items():
            if options.get(key, known[0]) not in known:
                raise ValueError(
                    f"{self.name}: {key} is {options[key]!r}, expected one of {', '.join(known)}"
                )
        self._pair = options.pop("text", "") == "pair"
        about_refusal = options.pop("about", "") == REFUSAL
        self._torch, self._tokenizer, self._model = load(
            hub.folder_of(folder, check=None),
            "classifier",
            "AutoModelForSequenceClassification",
            "classifier",
        )
        config = self._model.config
        self._labels = [config.id2label[i] for i in range(config.num_labels)]
        given = {key: value.split(",") for key, value in options.items()}
        try:
            self._readings = read_labels(self._labels, given, about_refusal)
        except ValueError as error:
            raise ValueError(f"{self.name}: {error}") from error
        self.tells_refusals = REFUSAL in self._readings
        outcomes = {outcome for outcome, _ in self._readings[HARM].values()}
        self.tells_content = HARMLESS in outcomes
        self._by_phrases = self.tells_content and REFUSED not in outcomes
        self.expected = f"finite scores of {', '.join(self._labels)}"
        # RoBERTa and Longformer keep two of their positions.
        positions = getattr(config, "max_position_embeddings", 512) - 2
        self._longest = min(self._tokenizer.model_max_length, positions)
        meanings = [f"{label} = {outcome}" for label, (outcome, _) in self._readings[HARM].items()]
        say(f"{self.name}: {', '.join(meanings)}")

    def judge(
        self, items: Sequence[Item], about: str = HARM, done: Done | None = None
    ) -> list[Verdict]:
        def verdicts_of(batch: Sequence[Item]) -> list[Verdict]:
            verdicts = [self._read(scores, about) for scores in self._scores(batch)]
            if about == HARM and self._by_phrases:
                verdicts = [refusal_apart(v, item.answer) for v, item in zip(verdicts, batch)]
            return verdicts

        size = _BATCH if self._tokenizer.pad_token else 1
        return judge_all(self, items, about, done, in_batches(verdicts_of, size))

    def _scores(self, items: Sequence[Item]) -> Any:
        texts = [[item.answer for item in items]]
        if self._pair:
            texts.insert(0, [item.prompt for item in items])
        inputs = self._tokenizer(
            *texts,
            truncation=True,
            max_length=self._longest,
            padding=len(items) > 1,
            return_tensors="pt",
        )
        with self._torch.inference_mode():
            return self._model(**inputs).logits.float()

    def _read(self, scores: Any, about: str) -> Verdict:
        if not self._torch.isfinite(scores).all():
            return Verdict(UNKNOWN, raw=str(scores.tolist())[:200])
        label = self._labels[int(scores.argmax())]
        return verdict_of(self._readings[about][label], label)
