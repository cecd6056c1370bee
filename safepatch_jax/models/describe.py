"""The parameter table as text for people."""

from __future__ import annotations

import math
from collections.abc import Mapping

from safepatch_jax.models.config import DecoderConfig
from safepatch_jax.models.table import SCOPES, param_table


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
    cells = [("parameter", "shape", "axes", "Hugging Face name", "stored", "size", "patched")]
    for row in table:
        dtypes = (
            sorted({stored[name] for name in row.hf_names if name in stored}) if stored else ["-"]
        )
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
    widths = [max(map(len, column)) for column in zip(*cells)]
    right = {5}
    lines = [
        "  ".join(
            c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))
        ).rstrip()
        for line in cells
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    patched = sum(math.prod(table[path].shape) for path in patchable)
    head = [
        f"{config.family}: {table.size:,} parameters in {len(table.hf_names())} tensors; "
        f"{config.num_layers} layers, width "
        f"{config.embed_dim}, {config.num_heads} heads over {config.num_kv_heads} KV heads of "
        f"{config.head_dim}, feed-forward "
        f"{config.mlp_dim} ({config.activation}), vocabulary {config.vocab_size}, head "
        f"{'tied' if config.tied_head else 'untied'}",
        f"RoPE base {config.rope_theta:g}"
        + (f", scaled {config.rope_scaling}" if config.rope_scaling else "")
        + f"; at most {config.max_length} positions; window "
        + (
            ", ".join(str(w or "all") for w in sorted(set(config.windows)))
            if config.windows
            else "all"
        )
        + "".join(
            f"; {text}"
            for on, text in (
                (config.norm_offset, "norms times 1 + weight"),
                (config.embed_scale, "embeddings times sqrt(width)"),
                (config.qkv_bias, "biases on q, k, v"),
            )
            if on
        ),
        "",
    ]
    sizes = ", ".join(
        f"{table.size * n / 2**30:.2f} GiB in {name}"
        for name, n in (("float32", 4), ("bfloat16", 2))
    )
    return (
        head
        + lines
        + [
            "",
            f"Total {table.size:,} parameters ({sizes}); scope '{scope}' patches {patched:,} "
            f"({patched / table.size:.1%}). "
            f"Scopes: {', '.join(SCOPES)}.",
        ]
    )
