"""Flags of the launchers that measure models: how they are run and asked, and where data sets
are."""

from __future__ import annotations

from typing import Any

from absl import flags

from launch import kinds
from safepatch_jax.data.prompt_format import THINKING, template_name, template_variables
from safepatch_jax.data.rendering import check_date

flags.disclaim_key_flags()  # what is defined by this function is the caller's


def define(defaults: Any) -> dict[str, flags.FlagHolder]:
    """Define one flag for each option that these launchers share; return them by the option's name.

    Args:
      defaults: options of a study, whose values are the defaults.
    """
    return {
        "mesh": flags.DEFINE_string(
            "mesh", defaults.mesh, "Devices per mesh axis; -1 once means 'all that are left'."
        ),
        "compute_dtype": flags.DEFINE_enum(
            "compute_dtype", defaults.compute_dtype, ["float32", "bfloat16"], "Arithmetic."
        ),
        "batch_size": flags.DEFINE_integer(
            "batch_size", defaults.batch_size, "Sequences that run together.", lower_bound=1
        ),
        "manual_dir": kinds.local(
            "data.manual_dir",
            "",
            "Folder with files of public data sets that were fetched by hand.",
        ),
        "data_dir": kinds.local(
            "data_dir", defaults.data_dir, "Where public data sets are prepared."
        ),
        "date": kinds.text(
            "data.date",
            defaults.date,
            "What a chat template that writes today's date is given, YYYY-MM-DD.",
            check_date,
        ),
        "template": kinds.text(
            "template",
            defaults.template,
            "What prompts are written in: own (the tokenizer's chat template), plain (headings "
            "without chat tokens), or a Jinja file.",
            template_name,
        ),
        "system": flags.DEFINE_string(
            "system", defaults.system, "A system message that stands before every conversation."
        ),
        "template_kwargs": kinds.text(
            "template_kwargs",
            defaults.template_kwargs,
            "What the chat template is given besides: enable_thinking=false,NAME=VALUE or a JSON "
            "object.",
            template_variables,
        ),
        "thinking": flags.DEFINE_enum(
            "thinking",
            defaults.thinking,
            THINKING,
            "How models that think answer: as the template has it, or (skip) behind an empty "
            "thought.",
        ),
    }


def generation() -> dict[str, flags.FlagHolder]:
    """Define one flag for each option of how answers are generated; return them by the option's
    name."""
    return {
        "temperature": flags.DEFINE_float(
            "temperature", 0.0, "Of sampling; 0 is greedy, else at least 1e-6.", lower_bound=0.0
        ),
        "top_p": flags.DEFINE_float(
            "top_p",
            1.0,
            "Share of the probability that is sampled from.",
            lower_bound=0.0,
            upper_bound=1.0,
        ),
        "seed": flags.DEFINE_integer("seed", 0, "Of sampling.", lower_bound=0),
        "think_tokens": flags.DEFINE_integer(
            "think_tokens",
            0,
            "A thought that reaches so many tokens is ended, and the measure's max_new counts "
            "behind it; 0: thought and answer together have max_new.",
            lower_bound=0,
        ),
    }
