"""Methods that leave the weights alone and change how a token is chosen."""

from __future__ import annotations

from safepatch_jax.evaluation.decoding import Rose, SafeDecoding, SelfCD
from safepatch_jax.evaluation.judges.base import REFUSED
from safepatch_jax.evaluation.judges.phrases import judge
from safepatch_jax.evaluation.lines import Lines
from safepatch_jax.methods.bench import Bench, Made, NotMade
from safepatch_jax.runtime.console import say
from safepatch_jax.training.losses import Likelihood
from safepatch_jax.training.step import Recipe


def self_cd(bench: Bench) -> Made:
    """Self-contrastive decoding (Shi et al. 2024)."""
    return Made(rule=SelfCD())


def rose(bench: Bench) -> Made:
    """Reverse prompt contrastive decoding (Zhong et al. 2024)."""
    return Made(rule=Rose())


def safe_decoding(bench: Bench) -> Made:
    """SafeDecoding (Xu et al. 2024); the expert is the backbone tuned on its own refusals, as the
    OSM patch is on answers."""
    derive = bench.settings.derive
    recipe = Recipe(
        1.0, derive.osm_steps, derive.osm_learning_rate, weight_decay=derive.weight_decay
    )
    examples = bench.encode(refusals(bench)).examples
    expert = bench.tuned(Likelihood(derive.loss), [(examples, derive.batch_size)], "expert", recipe)
    return Made(rule=SafeDecoding(), expert=expert)


def refusals(bench: Bench) -> list[tuple[str, str]]:
    """Return the harmful training prompts that the backbone refuses, with its answers.

    Raises:
      NotMade: it refuses none of them.
    """
    prompts, lines = (
        [r.prompt for r in bench.context.split("harmful", "train")],
        Lines(bench.notes / "refusals.jsonl"),
    )
    if left := [p for p in prompts if p not in lines.rows]:
        engine, room = bench.engine(), bench.settings.data.max_answer_tokens
        left = [p for p in left if engine.fits(p, room)]
        engine.answer(
            left,
            room,
            "the backbone's refusals",
            done=lambda k, ids: lines.add({"id": left[k], "answer": engine.decode(ids)}),
        )
    answers = {p: lines.rows[p]["answer"] for p in prompts if p in lines.rows}
    refused = [(p, text) for p, text in answers.items() if judge(text) == REFUSED]
    if not refused:
        raise NotMade(
            f"The backbone refuses none of the {len(answers)} harmful training prompts, so there "
            "is nothing to tune "
            "SafeDecoding's expert on. Leave safe_decoding out of --methods."
        )
    say(
        f"  the backbone refuses {len(refused)} of {len(answers)} harmful training prompts; the "
        "expert is tuned on these"
    )
    return refused
