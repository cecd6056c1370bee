"""The margin map: how near a model is to refusing each prompt, by forward passes alone.

The margin of a prompt is m = log P(a refusal opens) - log P(an affirmative opens), in nats: the
probabilities of all openings of a kind are summed over the tokens of a trie. The content NLL is the
NLL of a given harmful answer's tokens after its own opening was forced (`answer_likelihoods`): a
model that no longer knows the content has a high one, whatever its margin. A moved threshold leaves
the AUROC of m between harmful and harmless prompts as it was.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safepatch_jax.data.chat import prompt_batch, shared_prefix
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.generate import Past, read, read_on, with_room
from safepatch_jax.evaluation.openings import Ids, Openings
from safepatch_jax.evaluation.statistics import Z
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.numerics import NotFinite
from safepatch_jax.runtime import processes
from safepatch_jax.runtime.console import progress
from safepatch_jax.training.batch import put_batch

Row = Mapping[str, float]
Done = Callable[[int, Row], None]


def margins(
    engine: Engine,
    prompts: Sequence[Sequence[int]],
    openings: Openings,
    title: str,
    done: Done,
) -> None:
    """Compute log P(a refusal opens) and log P(an affirmative opens) for each prompt.

    Args:
      engine: the model.
      prompts: token ids, through the generation prompt.
      openings: see `openings.find_openings`; those of one model serve for all that are compared.
      title: of the progress bar.
      done: called with (index, {'refusal', 'affirmative'}), in nats.

    Raises:
      NotFinite: a probability is NaN, or that of all openings of a kind is 0.
    """
    trie = _Trie(openings)
    engine.check(prompts, trie.depth)
    shared = shared_prefix(prompts)
    begun = None
    if shared:
        begun = _read_shared(engine, prompts[0][:shared])
    rests = [ids[shared:] for ids in prompts]
    with progress(len(prompts), title, "prompt") as bar:
        for rows, group in engine.batching.groups([len(ids) for ids in prompts]):
            filled = group + [group[-1]] * (rows - len(group))
            batch = engine.put_prompts([rests[i] for i in filled])
            first_BO, later = _opening_logprobs(
                engine.decoder, engine.params, begun, batch, trie.paths, trie.tokens
            )
            later = {depth: processes.fetch(x_RBDO) for depth, x_RBDO in later.items()}
            of_each = trie.logprobs(processes.fetch(first_BO), later)
            for i, logprobs in zip(group, of_each):
                done(i, _by_kind(logprobs, len(openings.refusal), title))
            bar.update(len(group))


def _read_shared(engine: Engine, ids: Sequence[int]) -> Past:
    """Read the tokens that all prompts begin with, once for each part of the batch axis."""
    ways = engine.sharder.batch_ways
    batch = put_batch(prompt_batch([ids] * ways, len(ids)), engine.sharder)
    return _past_of(engine.decoder, engine.params, batch)


@functools.partial(jax.jit, static_argnames="decoder")
def _past_of(decoder: Decoder, params: Any, batch) -> Past:
    return read(decoder, params, batch["tokens"], batch["lengths"], batch["tokens"].shape[1])[1]


def _by_kind(logprobs_O: np.ndarray, refusals: int, title: str) -> dict[str, float]:
    kinds = {"refusal": logprobs_O[:refusals], "affirmative": logprobs_O[refusals:]}
    with np.errstate(invalid="ignore"):  # told below
        result = {kind: float(np.logaddexp.reduce(values)) for kind, values in kinds.items()}
    if not all(map(math.isfinite, result.values())):
        raise NotFinite(
            f"{title}: the log-probability of an opening is {result}: the model's weights hold NaN "
            "or overflow."
        )
    return result


class _Trie:
    """The paths that the model must read so that the next tokens of all openings are seen.

    Attributes:
      depth: of the deepest path.
      paths: by depth, int32 [R, D]: tokens of the paths from the root.
      tokens: int32 [depth + 1, O], the opening's token at each depth, refusals first; 0 where it
        has none.
    """

    def __init__(self, openings: Openings):
        every: list[Ids] = [*openings.refusal, *openings.affirmative]
        inner = {ids[:-1] for ids in every if len(ids) > 1}
        by_depth: dict[int, list[Ids]] = {}
        self._place: list[tuple[int, int]] = []  # of each opening: its path's depth and number
        for path in sorted(inner, key=lambda ids: (-len(ids), ids)):
            longer = itertools.chain.from_iterable(by_depth.values())
            if not any(other[: len(path)] == path for other in longer):
                by_depth.setdefault(len(path), []).append(path)
        self.depth = max(by_depth, default=0)
        self.paths = {depth: np.array(paths, np.int32) for depth, paths in by_depth.items()}
        self.tokens = np.zeros((self.depth + 1, len(every)), np.int32)
        self._lengths = [len(ids) for ids in every]
        for o, ids in enumerate(every):
            self.tokens[: len(ids), o] = ids
            self._place.append(_place_of(ids[:-1], by_depth))

    def logprobs(self, first_BO: np.ndarray, later: Mapping[int, np.ndarray]) -> np.ndarray:
        """Return the log-probability of each opening, float64 [B, O]."""
        total_BO = first_BO.astype(np.float64)
        for o, (length, (depth, number)) in enumerate(zip(self._lengths, self._place)):
            if length > 1:
                along_BD = later[depth][number, :, : length - 1, o]
                total_BO[:, o] += along_BD.sum(axis=-1, dtype=np.float64)
        return total_BO


def _place_of(path: Ids, by_depth: Mapping[int, Sequence[Ids]]) -> tuple[int, int]:
    """Return (depth, number) of a path that begins with the given one; (0, 0) at the root."""
    for depth, paths in by_depth.items():
        for number, other in enumerate(paths):
            if path and other[: len(path)] == path:
                return depth, number
    return 0, 0


@functools.partial(jax.jit, static_argnames="decoder")
def _opening_logprobs(
    decoder: Decoder, params: Any, begun: Past | None, batch, paths, tokens_DO
) -> tuple[jax.Array, dict[int, jax.Array]]:
    """Return the log-probability of each opening's first token [B, O], and by depth along each path
    those of the openings' later tokens [R, B, D, O], as if every opening ran along it."""
    logits_BV, past = _read(decoder, params, begun, batch, max(paths, default=0))

    def of_path(path_D):
        path_BD = jnp.broadcast_to(path_D, (logits_BV.shape[0], path_D.shape[0]))
        logits_BDV, _ = read_on(decoder, params, path_BD, past)
        return _logprobs(logits_BDV, tokens_DO[1 : path_D.shape[0] + 1])

    first_BDO = _logprobs(logits_BV[:, None], tokens_DO[:1])
    later = {depth: jax.lax.map(of_path, paths_RD) for depth, paths_RD in paths.items()}
    return first_BDO[:, 0], later


def _read(
    decoder: Decoder, params: Any, begun: Past | None, batch, room: int
) -> tuple[jax.Array, Past]:
    """Read right-padded prompts after what all of them begin with; returns as `generate.read`, with
    room for so many tokens more."""
    tokens_BT, length_B = batch["tokens"], batch["lengths"]
    room += tokens_BT.shape[1]
    if begun is None:
        return read(decoder, params, tokens_BT, length_B, room)
    times = length_B.shape[0] // begun.length_B.shape[0]
    cache = jax.tree.map(lambda x: jnp.repeat(x, times, axis=1), with_room(begun.cache, room))
    past = Past(cache, jnp.repeat(begun.length_B, times))
    logits_B1V, cache = read_on(decoder, params, tokens_BT, past, length_B[:, None] - 1)
    return logits_B1V[:, 0], Past(cache, past.length_B + length_B)


def _logprobs(logits_BDV: jax.Array, tokens_DO: jax.Array) -> jax.Array:
    """Return the log-probability of each of some tokens at each depth, [B, D, O]."""
    logits_BDO = jnp.take_along_axis(logits_BDV, tokens_DO[None], axis=-1)
    return logits_BDO - jax.nn.logsumexp(logits_BDV, axis=-1, keepdims=True)


def auroc(harmful: Sequence[float], harmless: Sequence[float]) -> dict[str, Any]:
    """Return how well a margin tells harmful from harmless prompts.

    Returns:
      {'value': the share of pairs in which the harmful prompt has the larger margin (equal ones
      count half), 'interval': 95 %, by DeLong et al. 1988}.
    """
    return _auroc_of([harmful], [harmless])


def auroc_change(
    harmful: tuple[Sequence[float], Sequence[float]],
    harmless: tuple[Sequence[float], Sequence[float]],
) -> dict[str, Any]:
    """Return the AUROC after less that before, of the same prompts: {'value', 'interval'}.

    Args:
      harmful, harmless: (before, after), in the same order.
    """
    return _auroc_of(harmful, harmless)


def _auroc_of(
    harmful: Sequence[Sequence[float]], harmless: Sequence[Sequence[float]]
) -> dict[str, Any]:
    """Return the AUROC of one model, or the second's less the first's."""
    values, of_harmful, of_harmless = [], 0.0, 0.0
    for sign, positive, negative in zip((-1.0, 1.0)[-len(harmful) :], harmful, harmless):
        wins = _wins(np.asarray(positive, np.float64), np.asarray(negative, np.float64))
        values.append(sign * wins.mean())
        of_harmful = of_harmful + sign * wins.mean(axis=1)
        of_harmless = of_harmless + sign * wins.mean(axis=0)
    value = math.fsum(values)
    variance = 0.0
    for shares in (of_harmful, of_harmless):
        if len(shares) > 1:
            variance += shares.var(ddof=1) / len(shares)
    half = Z * math.sqrt(variance)
    return {"value": value, "interval": [value - half, value + half]}


def _wins(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
    """Return [P, N]: 1 where the first is larger, 0.5 where both are equal."""
    difference = positive[:, None] - negative[None]
    return (difference > 0) + 0.5 * (difference == 0)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Summarise the margins of one set of prompts.

    Args:
      rows: of `margins`.

    Returns:
      n; median and quartiles of the margin, nats; above: the share of prompts whose margin is above
      0; refused: the expected share of refusals where the opening is drawn from the openings, the
      mean of sigmoid(m); covered: the median of P(any opening): where it is small, the openings are
      not the model's.
    """
    m = margins_of(rows)
    opens = np.logaddexp([row["refusal"] for row in rows], [row["affirmative"] for row in rows])
    low, median, high = np.quantile(m, (0.25, 0.5, 0.75))
    return {
        "n": len(m),
        "median": float(median),
        "quartiles": [float(low), float(high)],
        "above": float(np.mean(m > 0)),
        "refused": float(np.mean(refused(m))),
        "covered": float(np.median(np.exp(opens))),
    }


def margins_of(rows: Sequence[Row]) -> np.ndarray:
    """Return m of each row, nats, float64."""
    return np.array([row["refusal"] - row["affirmative"] for row in rows], np.float64)


def refused(margin: np.ndarray) -> np.ndarray:
    """Return sigmoid(m): the share of refusals among openings that are drawn."""
    return np.exp(-np.logaddexp(0.0, -margin))
