"""FLOPs of the matrix products in a traced program, loops included: of all devices together, before
partitioning."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax.extend.core

# Where call-like equations (pjit, remat, custom_jvp ...) keep what they run; the first one counts.
_CALLED = ("jaxpr", "call_jaxpr", "fun_jaxpr", "fwd_jaxpr")


def count_flops(jaxpr: Any, while_trips: int = 1) -> int:
    """Return the FLOPs of a program's matrix products, 2 for a multiplication and its addition.

    - A scan counts its body as often as it runs. A while loop does not say how often that is:
      `while_trips`.
    - Of a conditional's branches the one with the most FLOPs counts.
    - Rematerialised products count each time they are computed; so the sum of a train step grows
      with model.remat.
    - A shard_map counts what one device does times the devices of the mesh axes that it takes over.
    - A Pallas kernel counts the products of its body times its grid, with the blocks that a causal
      mask lets it skip, as plain attention computes them too. cuDNN's attention counts 2 products
      forward and 5 backward, as flash attention has.

    Args:
      jaxpr: Jaxpr or ClosedJaxpr, such as ``jax.stages.Traced.jaxpr``.
      while_trips: how often the body of a while loop is taken to run.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    return sum(_equation(equation, while_trips) for equation in jaxpr.eqns)


def _equation(equation: Any, while_trips: int) -> int:
    name, params = equation.primitive.name, equation.params
    inner = functools.partial(count_flops, while_trips=while_trips)
    if name == "dot_general":
        return _dot(equation)
    if name.startswith("dot_product_attention_"):
        return _cudnn(equation)
    if name == "scan":
        return params["length"] * inner(params["jaxpr"])
    if name == "while":
        return while_trips * (inner(params["body_jaxpr"]) + inner(params["cond_jaxpr"]))
    if name == "cond":
        return max(map(inner, params["branches"]))
    if name == "pallas_call":
        blocks = math.prod(n for n in params["grid_mapping"].grid if isinstance(n, int))
        return blocks * inner(params["jaxpr"])
    if name == "shard_map":
        axes = params.get("newly_manual_axes", params.get("manual_axes"))
        return math.prod(params["mesh"].shape[axis] for axis in axes) * inner(params["jaxpr"])
    for parameter in _CALLED:
        if parameter in params:
            return inner(params[parameter])
    return sum(map(inner, jax.extend.core.jaxprs_in_params(params)))


def _dot(equation: Any) -> int:
    (contracted, _), _ = equation.params["dimension_numbers"]
    left = equation.invars[0].aval.shape
    return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[d] for d in contracted)


def _cudnn(equation: Any) -> int:
    """Count cuDNN's attention by its shapes; `layout` 0 is [B, T, N, H], else [B, N, T, H]."""
    query, key = (v.aval.shape for v in equation.invars[:2])
    keys = key[1 if equation.params["layout"] == 0 else 2]
    products = 5 if "bwd" in equation.primitive.name else 2
    return products * 2 * math.prod(query) * keys
