"""Decoding-time baselines: two streams of logits, combined before each token is chosen.

The streams are two prompts to one model (Self-CD, ROSE) or one prompt to two models (SafeDecoding);
both read every token that is chosen. A rule says which, and how their logits are combined.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp

from safepatch_jax.evaluation.generate import advance, first_state, follow, read
from safepatch_jax.models.decoder import Decoder

_CAREFUL = (
    "You are a responsible assistant. Safety comes first: before you answer, check whether the "
    "request could lead to harm, and refuse it if it could."
)
_SAFE = (
    "You are a helpful, honest and careful assistant. Answer as helpfully as you can, and keep "
    "your answers safe, lawful and respectful."
)
_REVERSE = (
    "You are a careless and unkind assistant. Answer without regard for safety, law or respect, "
    "even where the answer does harm."
)
_FLOOR = 1e-8  # a probability


class Rule(Protocol):
    """How two streams are combined. Rules are compared by value: one program is compiled for each.

    Attributes:
      systems: system message of each stream, or None for none (see `Prompter.ask`).
      steps: so many first tokens are chosen from both streams, the others from the first alone;
        None for all.
      needs_expert: whether the second stream has weights of its own.
    """

    systems: tuple[str | None, str | None]
    steps: int | None
    needs_expert: bool

    def combine(self, first_BV: jax.Array, second_BV: jax.Array, step: Any) -> jax.Array:
        """Return the logits [B, V] from which new token number `step` is chosen, given those of the
        streams."""


@dataclasses.dataclass(frozen=True)
class SelfCD:
    """Self-contrastive decoding: with - alpha (with - without), logits under an instruction that
    stresses safety and without it.

    Source: Shi et al. 2024, arXiv 2401.17633, y - alpha (y - y'), with alpha 2.5. The instruction
    is in our own words.

    Attributes:
      alpha: 0 is plain decoding with the instruction, 1 without it; beyond 1, what the instruction
        adds is turned around.
      stressed: system message of the first stream.
      plain: of the second: None is the conversation as the model is usually asked, a template's own
        system message included.

    Raises:
      ValueError: alpha is not finite.
    """

    alpha: float = 2.5
    stressed: str = _CAREFUL
    plain: str | None = None
    steps: ClassVar[None] = None
    needs_expert: ClassVar[bool] = False

    def __post_init__(self):
        _check_alpha(self)

    @property
    def systems(self) -> tuple[str | None, str | None]:
        return self.stressed, self.plain

    def combine(self, first_BV: jax.Array, second_BV: jax.Array, step: Any) -> jax.Array:
        """Return logits [B, V]; the same at every step."""
        return first_BV - self.alpha * (first_BV - second_BV)


@dataclasses.dataclass(frozen=True)
class Rose:
    """Reverse prompt contrastive decoding: positive - alpha * reverse, the logits under a safe and
    under a harm-inviting prompt.

    Source: Zhong et al. 2024, arXiv 2402.11889; alpha 0.5. Both prompts are in our own words.

    Attributes:
      alpha: 0 is plain decoding with the positive prompt.
      positive: system message of the first stream; None is the conversation as the model is usually
        asked.
      reverse: of the second.

    Raises:
      ValueError: alpha is not finite.
    """

    alpha: float = 0.5
    positive: str | None = _SAFE
    reverse: str | None = _REVERSE
    steps: ClassVar[None] = None
    needs_expert: ClassVar[bool] = False

    def __post_init__(self):
        _check_alpha(self)

    @property
    def systems(self) -> tuple[str | None, str | None]:
        return self.positive, self.reverse

    def combine(self, first_BV: jax.Array, second_BV: jax.Array, step: Any) -> jax.Array:
        """Return logits [B, V]; the same at every step."""
        return first_BV - self.alpha * second_BV


@dataclasses.dataclass(frozen=True)
class SafeDecoding:
    """Base + alpha (expert - base), probabilities over the candidates of both, for the first
    tokens; then the base alone.

    Source: Xu et al. 2024, arXiv 2402.08983: alpha 3, m 2, c 5. The expert is the model tuned on
    its own refusals. The authors' program raises a combined probability P to 1e-8 at least, so that
    all candidates can be equal. Here log P is continued below 1e-8 by its tangent there: the
    largest P is chosen always.

    Attributes:
      alpha: 0 is the base's probability, 1 the expert's.
      steps: m, tokens chosen from both models.
      common: c, candidates at least (all of a smaller vocabulary).
      system: system message of both streams; None is the conversation as the model is usually
        asked.

    Raises:
      ValueError: alpha is not finite, or `steps` or `common` is below 1.
    """

    alpha: float = 3.0
    steps: int = 2
    common: int = 5
    system: str | None = None
    needs_expert: ClassVar[bool] = True

    def __post_init__(self):
        _check_alpha(self)
        if self.steps < 1 or self.common < 1:
            raise ValueError(
                f"SafeDecoding: steps and common must be 1 or more, got {self.steps} and "
                f"{self.common}. For plain decoding use Engine.complete_ids."
            )

    @property
    def systems(self) -> tuple[str | None, str | None]:
        return self.system, self.system

    def combine(self, first_BV: jax.Array, second_BV: jax.Array, step: Any) -> jax.Array:
        """Return logits [B, V]: for the first tokens log-probabilities (nats), -inf outside the
        candidates; then the base's."""
        base_BV, expert_BV = jax.nn.softmax(first_BV, axis=-1), jax.nn.softmax(second_BV, axis=-1)
        share_BV = base_BV + self.alpha * (expert_BV - base_BV)
        log_BV = jnp.where(
            share_BV > _FLOOR,
            jnp.log(jnp.maximum(share_BV, _FLOOR)),
            math.log(_FLOOR) + share_BV / _FLOOR - 1,
        )
        log_BV = jnp.where(candidates(first_BV, second_BV, self.common), log_BV, -jnp.inf)
        return jnp.where(step < self.steps, jax.nn.log_softmax(log_BV, axis=-1), first_BV)


def candidates(base_BV: jax.Array, expert_BV: jax.Array, common: int) -> jax.Array:
    """Return SafeDecoding's sample space, bool [B, V]: the tokens among the k likeliest of both,
    for the least k that suffices.

    Args:
      base_BV, expert_BV: logits; of equal ones the token with the lower id comes first.
      common: tokens at least; the space may hold one more, and is the vocabulary if that is
        smaller.
    """
    # A token is among the k likeliest of both from the k on that is the worse of its two ranks.
    worse_BV = jnp.maximum(_ranks(base_BV), _ranks(expert_BV))
    enough = min(common, base_BV.shape[-1]) - 1
    return worse_BV <= jnp.sort(worse_BV, axis=-1)[:, enough : enough + 1]


def _ranks(logits_BV: jax.Array) -> jax.Array:
    return jnp.argsort(jnp.argsort(-logits_BV, axis=-1, stable=True), axis=-1)


def _check_alpha(rule: Any) -> None:
    if not math.isfinite(rule.alpha):
        raise ValueError(
            f"{type(rule).__name__}: alpha must be a finite number, got {rule.alpha}; the "
            f"source's is {type(rule).alpha}."
        )


def check_expert(rule: Rule, params: Any, expert: Any) -> None:
    """Raise ValueError if a rule's expert is missing, not used, or has other parameters or shapes
    than the model.

    Args:
      params, expert: nested parameter dictionaries; the expert may be None.
    """
    name = type(rule).__name__
    if not rule.needs_expert:
        if expert is not None:
            raise ValueError(f"{name} has two prompts and one model; leave the expert out.")
        return
    if expert is None:
        raise ValueError(
            f"{name} needs an expert: the parameters of the same model, tuned on its own "
            "refusals. Give expert=load_params(folder, engine.sharder)[1]."
        )
    ours, theirs = _shapes(params), _shapes(expert)
    paths = sorted(ours.keys() | theirs.keys())
    differing = [path for path in paths if ours.get(path) != theirs.get(path)]
    if not differing:
        return
    lines = []
    for path in differing[:5]:
        expert_has, model_has = theirs.get(path, "has none"), ours.get(path, "has none")
        lines.append(f"  {path}: expert {expert_has}, model {model_has}")
    if len(differing) > 5:
        lines.append(f"  and {len(differing) - 5} more")
    raise ValueError(
        f"{name}: the expert is of another architecture than the model. Tune it from the same "
        "model.\n" + "\n".join(lines)
    )


def _shapes(params: Any) -> dict[str, tuple[int, ...]]:
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(x.shape)
        for path, x in jax.tree_util.tree_leaves_with_path(params)
    }


@functools.partial(jax.jit, static_argnames=("decoder", "rule", "max_new"))
def decode_contrasted(
    decoder: Decoder,
    params: tuple[Any, Any],
    prompts: tuple[Mapping[str, jax.Array], ...],
    stop_ids,
    *,
    rule: Rule,
    max_new: int,
) -> jax.Array:
    """Continue right-padded prompts greedily, each token chosen from the combined logits of two
    streams.

    Args:
      decoder: the model.
      params: nested parameter dictionary of each stream; the same one twice where they differ in
        the prompt alone.
      prompts: for each stream 'tokens' int32 [B, T], RIGHT padded, and 'lengths' int32 [B]; T may
        differ.
      stop_ids: see `decode`.
      rule: how the streams are combined. From its step number `steps` on the second stream is not
        run any more.
      max_new: number of tokens at most.

    Returns:
      int32 [B, max_new]; after a stop token the rest is -1.
    """
    both = min(rule.steps or max_new, max_new)
    first, second = prompts
    first_BV, past = _read(decoder, params[0], first, max_new)
    second_BV, other = _read(decoder, params[1], second, both)
    logits_BV = rule.combine(first_BV, second_BV, 0)
    state = first_state(logits_BV, (past, other), stop_ids, None, max_new)

    def follow_both(token_B, pasts):
        first_BV, past = follow(decoder, params[0], token_B, pasts[0])
        second_BV, other = follow(decoder, params[1], token_B, pasts[1])
        step = past.length_B[0] - first["lengths"][0]
        return rule.combine(first_BV, second_BV, step), (past, other)

    def follow_first(token_B, past):
        return follow(decoder, params[0], token_B, past)

    rows = state.done_B.shape[0]
    # The first token is there; `both - 1` are still chosen from both streams.
    state = advance(follow_both, state, stop_ids, None, both - 1, rows)
    if both == max_new:
        return state.out
    state = state._replace(past=state.past[0])
    return advance(follow_first, state, stop_ids, None, max_new - both, rows).out


def _read(decoder: Decoder, params: Any, prompts: Mapping[str, jax.Array], room: int):
    tokens_BT = prompts["tokens"]
    return read(decoder, params, tokens_BT, prompts["lengths"], tokens_BT.shape[1] + room)
