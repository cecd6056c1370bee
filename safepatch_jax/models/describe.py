"""The parameter table as text for people."""

from __future__ import annotations

import math
from collections.abc import Mapping

from safepatch_jax.models.config import DecoderConfig
from safepatch_jax.models.table import SCOPES, ParamTable, param_table

_FACTORS = {
    "embed_multiplier": "embeddings times",
    "residual_multiplier": "parts times",
    "attention_scale": "attention's logits times",
    "attention_cap": "attention's logits capped at",
    "logit_cap": "logits capped at",
    "logit_divisor": "logits by",
}


def describe(
    config: DecoderConfig, scope: str, stored: Mapping[str, str] | None = None
) -> list[str]:
    """Return the lines of `launch.inspect`: the architecture, one line for each parameter, totals.

    Args:
      scope: which rows count as patchable (see SCOPES).
      stored: dtype of each tensor by HF name, if weights are there.
    """
    table = param_table(config)
    patchable = {row.path for row in table.scope(scope)}
    patched = sum(math.prod(table[path].shape) for path in patchable)
    gib = table.size / 2**30
    return [
        *_architecture(config),
        "",
        *_aligned(_cells(table, patchable, stored), right=5),
        "",
        f"Total {table.size:,} parameters ({4 * gib:.2f} GiB in float32, {2 * gib:.2f} GiB in "
        f"bfloat16); scope '{scope}' patches {patched:,} ({patched / table.size:.1%}). "
        f"Scopes: {', '.join(SCOPES)}.",
    ]


def _architecture(config: DecoderConfig) -> list[str]:
    """Return two lines: sizes; positions and switches."""
    table = param_table(config)
    head = "tied" if config.tied_head else "untied"
    windows = sorted(set(config.windows)) or [0]
    details = [f"RoPE base {config.rope_theta:g}"]
    if config.rope_scaling:
        details[0] += f", scaled {config.rope_scaling}"
    details.append(f"at most {config.max_length} positions")
    details.append(f"window {', '.join(str(window or 'all') for window in windows)}")
    if config.norm_offset:
        details.append("norms times 1 + weight")
    if config.ropes:
        details.append(f"rotary positions by layer ({', '.join(sorted(set(config.ropes)))})")
    if config.norms != "pre":
        details.append(
            {"post": "norms after each part", "both": "norms around each part"}[config.norms]
        )
    if config.qk_norm:
        details.append(f"queries and keys normed by {config.qk_norm}")
    for field, words in _FACTORS.items():
        value = getattr(config, field)
        if value not in (None, 0.0, 1.0):
            details.append(f"{words} {value:g}")
    if config.qkv_bias:
        details.append("biases on q, k, v")
    return [
        f"{config.family}: {table.size:,} parameters in {len(table.hf_names())} tensors; "
        f"{config.num_layers} layers, width {config.embed_dim}, {config.num_heads} heads over "
        f"{config.num_kv_heads} KV heads of {config.head_dim}, feed-forward {config.mlp_dim} "
        f"({config.activation}), vocabulary {config.vocab_size}, head {head}",
        "; ".join(details),
    ]


def _cells(
    table: ParamTable, patchable: set[str], stored: Mapping[str, str] | None
) -> list[tuple[str, ...]]:
    """Return a line of titles, and one for each parameter."""
    cells = [("parameter", "shape", "axes", "Hugging Face name", "stored", "size", "patched")]
    for row in table:
        dtypes = ["-"]
        if stored:
            dtypes = sorted({stored[name] for name in row.hf_names if name in stored})
        cells.append(
            (
                row.path,
                " x ".join(map(str, row.shape)),
                " ".join(row.axes),
                row.hf_name.replace("{layer}", "*"),
                ", ".join(dtypes),
                f"{math.prod(row.shape):,}",
                "yes" if row.path in patchable else "no",
            )
        )
    return cells


def _aligned(cells: list[tuple[str, ...]], right: int) -> list[str]:
    """Return the lines of a table; the column `right` is aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*cells)]
    lines = []
    for line in cells:
        padded = [cell.ljust(width) for cell, width in zip(line, widths)]
        padded[right] = line[right].rjust(widths[right])
        lines.append("  ".join(padded).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    return lines
