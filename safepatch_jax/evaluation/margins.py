"""The margin map: how near a model is to refusing each prompt, by forward passes alone.

The margin of a prompt is m = log P(a refusal opens) - log P(an affirmative opens), in nats: the
probabilities of all openings of a kind are summed over the tokens of a trie. The content NLL is the
NLL of a given harmful answer's tokens after its own opening was forced (`answer_likelihoods`): a
model that no longer knows the content has a high one, whatever its margin. A moved threshold leaves
the AUROC of m between harmful and harmless prompts as it was.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from safepatch_jax.data.chat import prompt_batch, shared_prefix, with_prefix
from safepatch_jax.evaluation.batching import padded
from safepatch_jax.evaluation.engine import Engine
from safepatch_jax.evaluation.openings import Ids, Openings
from safepatch_jax.evaluation.statistics import Z
from safepatch_jax.models.decoder import Decoder
from safepatch_jax.numerics import NotFinite
from safepatch_jax.runtime import processes
from safepatch_jax.runtime.console import progress
from safepatch_jax.training.batch import put_batch
from safepatch_jax.training.objective import of_answers

_TOGETHER = 8  # nodes whose logits over the vocabulary exist at once
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
    rests = [ids[shared:] for ids in prompts]
    with progress(len(prompts), title, "prompt") as bar:
        sizes = [len(ids) + len(trie.arrays["token"]) for ids in prompts]
        for rows, group in engine.batching.groups(sizes, few_idle=True):
            filled = [rests[i] for i in group + [group[-1]] * (rows - len(group))]
            laid_out = prompt_batch(filled, padded(max(map(len, filled))))
            batch = put_batch(with_prefix(laid_out, prompts[0][:shared]), engine.sharder)
            next_BEM = _next_logprobs(engine.decoder, engine.params, batch, trie.arrays)
            of_each = trie.logprobs(processes.fetch(next_BEM))
            for i, logprobs in zip(group, of_each):
                done(i, _by_kind(logprobs, len(openings.refusal), title))
            bar.update(len(group))


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
    """The tokens with which openings begin. A node is such a sequence, after which openings go on;
    number 0 is the empty one, the end of the prompt. The others' last tokens are read behind it.

    Attributes:
      depth: of the deepest node.
      arrays: of the E nodes that are read 'token' and 'depth', int32 [E], and 'order', bool [E, E],
        which nodes lie on the way to each, itself among them; of all 'next', int32 [1 + E, M], the
        tokens that come next, then anything.
    """

    def __init__(self, openings: Openings):
        every: list[Ids] = [*openings.refusal, *openings.affirmative]
        following: dict[Ids, list[int]] = {}  # by node
        for ids in every:
            for end, token in enumerate(ids):
                tokens = following.setdefault(ids[:end], [])
                if token not in tokens:
                    tokens.append(token)
        nodes = sorted(following, key=lambda ids: (len(ids), ids))
        read = nodes[1:]
        order = np.zeros((len(read), len(read)), bool)
        for row, ids in zip(order, read):
            row[:] = [ids[: len(other)] == other for other in read]
        most = max(map(len, following.values()))
        self.depth = len(nodes[-1])
        self.arrays = {
            "token": np.array([ids[-1] for ids in read], np.int32),
            "depth": np.array([len(ids) for ids in read], np.int32),
            "order": order,
            "next": np.zeros((len(nodes), most), np.int32),
        }
        for row, ids in zip(self.arrays["next"], nodes):
            row[: len(following[ids])] = following[ids]
        number = {ids: i for i, ids in enumerate(nodes)}
        # Of each opening's tokens the node after which it comes, and its place there.
        self._paths: list[tuple[list[int], list[int]]] = []
        for ids in every:
            before = [ids[:end] for end in range(len(ids))]
            places = [following[node].index(token) for node, token in zip(before, ids)]
            self._paths.append(([number[node] for node in before], places))

    def logprobs(self, next_BEM: np.ndarray) -> np.ndarray:
        """Return the log-probability of each opening, float64 [B, O]."""
        of_openings = []
        for nodes, places in self._paths:
            of_openings.append(next_BEM[:, nodes, places].sum(axis=-1, dtype=np.float64))
        return np.stack(of_openings, axis=-1)


@functools.partial(jax.jit, static_argnames="decoder")
def _next_logprobs(decoder: Decoder, params: Any, batch, trie) -> jax.Array:
    """Return the log-probability of each token of 'next', float32 [B, 1 + E, M], in one pass over
    prompts and, behind each, the trie's nodes; see `_Trie` and `prompt_batch`."""
    tokens_BT, length_B = batch["tokens"], batch["lengths"]
    (rows, longest), nodes = tokens_BT.shape, trie["token"].shape[0]

    def joined(of_prompts, of_nodes):
        parts = of_prompts, of_nodes
        return jnp.concatenate([jnp.broadcast_to(x, (rows, x.shape[1])) for x in parts], axis=1)

    line_1T, last_B1 = jnp.arange(longest)[None], length_B[:, None] - 1
    order_TT = jnp.tril(jnp.ones((longest + nodes, longest + nodes), bool))
    order_TT = order_TT.at[longest:, longest:].set(trie["order"])
    hidden_BED, _ = decoder.apply(
        {"params": params},
        joined(tokens_BT, trie["token"][None]),
        joined(line_1T, last_B1 + trie["depth"]),
        joined(line_1T <= last_B1, jnp.ones((1, nodes), bool)),
        logits_at_BA=joined(last_B1, longest + jnp.arange(nodes)[None]),
        hidden=True,
        prefix_1P=batch.get("prefix"),
        order_BTT=order_TT[None],
    )

    def of_logits(logits_BCV, nodes_BC):
        next_BCM = trie["next"][nodes_BC]
        next_BCM = jnp.take_along_axis(logits_BCV, next_BCM, axis=-1)
        return next_BCM - jax.nn.logsumexp(logits_BCV, axis=-1, keepdims=True)

    numbers = {"targets": jnp.broadcast_to(jnp.arange(1 + nodes), (rows, 1 + nodes))}
    return of_answers(decoder, [params], [hidden_BED], numbers, of_logits, _TOGETHER)


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
