"""The settings of the data group; see `safepatch_jax.settings`."""

from __future__ import annotations

import dataclasses

from safepatch_jax.data.prompt_format import template_name, template_variables
from safepatch_jax.data.rendering import DATE, check_date
from safepatch_jax.option import option
from safepatch_jax.runtime import paths


@dataclasses.dataclass(frozen=True)
class DataSettings:
    harmful: str = option(
        "builtin",
        "Harmful question/answer pairs: 'builtin'; 'set:NAME@SPLIT', a public data set "
        "(docs/data.md); a CSV / JSON / JSONL / Parquet file with prompt and answer, "
        "'FILE?prompt=COLUMN&answer=COLUMN' where they have other names; 'tfds:NAME@SPLIT'; or "
        "'hf:ORG/NAME:CONFIG@SPLIT' of the Hugging Face Hub.",
        read=paths.data,
    )
    category: str = option("", "Harmful pairs of these categories alone, 'A+B'; '' takes all.")
    lookalike: str = option(
        "builtin",
        "Harmless prompts that look dangerous (over-refusal), given likewise; answers are not "
        "needed.",
        read=paths.data,
    )
    ordinary: str = option(
        "builtin", "Ordinary instructions with answers, given likewise.", read=paths.data
    )
    manual_dir: str = option(
        "",
        "Folder with files of public data sets that were fetched by hand; '' is datasets/manual in "
        "run.cache_dir.",
        read=paths.on_disk,
    )
    date: str = option(
        DATE,
        "What a chat template that writes today's date is given, YYYY-MM-DD: one day for ever, so "
        "that a run which is resumed tomorrow has the same prompts.",
        read=check_date,
    )
    template: str = option(
        "",
        "What prompts and answers are written in, for training, scores and evaluation: '' (own) is "
        "the tokenizer's chat template, 'plain' headings without chat tokens (for base models), "
        "else a Jinja file.",
        read=template_name,
    )
    system: str = option("", "A system message that stands before every conversation.")
    template_kwargs: str = option(
        "",
        "What the chat template is given besides, 'enable_thinking=false,NAME=VALUE' or a JSON "
        "object.",
        read=template_variables,
    )
    max_prompt_tokens: int = option(
        96, "Longer prompts are left out; they are counted and reported.", low=8
    )
    max_answer_tokens: int = option(
        32, "Longer answers are cut here; they are counted and reported.", low=2
    )
    length_buckets: int = option(
        1,
        "Padded lengths that batches of training and scoring may have. Several save padding where "
        "lengths differ much, cost a compilation each, and bring examples of like length together.",
        low=1,
    )
    train_limit: int = option(200, "At most so many records of each role for training.", low=1)
    eval_limit: int = option(48, "At most so many records of each role for evaluation.", low=1)
