"""Methods that leave the weights alone and change how a token is chosen."""

from __future__ import annotations

from collections.abc import Sequence

from safepatch_jax.data import cells
from safepatch_jax.data.chat import Pair
from safepatch_jax.data.records import Record
from safepatch_jax.evaluation.decoding import Rose, SafeDecoding, SelfCD
from safepatch_jax.evaluation.judges.base import REFUSED
from safepatch_jax.evaluation.judges.phrases import judge
from safepatch_jax.evaluation.lines import Lines
from safepatch_jax.evaluation.thoughts import after_thought
from safepatch_jax.methods.bench import Bench, NotMade, Product
from safepatch_jax.runtime.console import say
from safepatch_jax.training.journal import Recipe
from safepatch_jax.training.losses import Likelihood


def self_cd(bench: Bench) -> Product:
    """Self-contrastive decoding (Shi et al. 2024)."""
    return Product(rule=SelfCD())


def rose(bench: Bench) -> Product:
    """Reverse prompt contrastive decoding (Zhong et al. 2024)."""
    return Product(rule=Rose())


def safe_decoding(bench: Bench) -> Product:
    """SafeDecoding (Xu et al. 2024); the expert is the backbone tuned on its own refusals, as the
    OSM patch is on answers."""
    derive = bench.settings.derive
    rate, decay = derive.osm_learning_rate, derive.weight_decay
    recipe = Recipe(1.0, derive.osm_steps, rate, weight_decay=decay)
    examples = bench.encode(refusals(bench)).examples
    expert = bench.tuned(Likelihood(derive.loss), [(examples, derive.batch_size)], "expert", recipe)
    return Product(rule=SafeDecoding(), expert=expert)


def refusals(bench: Bench) -> list[Pair]:
    """Return the harmful training prompts that the backbone refuses, with its answers behind their
    thoughts.

    Raises:
      NotMade: it refuses none of them.
    """
    records = {record.key: record for record in bench.context.split("harmful", "train")}
    lines = Lines(bench.notes / "refusals.jsonl")
    _answer(bench, [record for key, record in records.items() if key not in lines.rows], lines)
    answers = {key: lines.rows[key]["answer"] for key in records if key in lines.rows}
    pairs: list[Pair] = []
    for key, text in answers.items():
        if judge(text) == REFUSED:
            pairs.append((records[key].prompt, after_thought(text), records[key].turns))
    if not pairs:
        raise NotMade(
            f"The backbone refuses none of the {len(answers)} harmful training prompts, so there "
            "is nothing to tune SafeDecoding's expert on. Leave safe_decoding out of --methods."
        )
    say(
        f"  the backbone refuses {len(pairs)} of {len(answers)} harmful training prompts; the "
        "expert is tuned on these"
    )
    return pairs


def _answer(bench: Bench, records: Sequence[Record], lines: Lines) -> None:
    """Let the backbone answer the prompts that fit, each written down as soon as it is there."""
    if not records:
        return  # without loading the backbone
    engine, room = bench.engine(), bench.settings.data.max_answer_tokens
    talks = {record.key: cells.talk(record.prompt, record.turns) for record in records}
    fitting = [key for key, talk in talks.items() if engine.fits(talk, room)]

    def add(number: int, ids: Sequence[int]) -> None:
        lines.add({"id": fitting[number], "answer": engine.decode(ids)})

    engine.answer([talks[key] for key in fitting], room, "the backbone's refusals", done=add)
