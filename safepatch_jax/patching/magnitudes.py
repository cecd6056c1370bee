"""Sums of magnitudes in the place of gradients: of samples along a vmapped axis, or of a batch's
one after the other."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from safepatch_jax.mesh import Sharder
from safepatch_jax.models.table import Param
from safepatch_jax.numerics import flushed

SAMPLES = "samples"  # the vmapped axis


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def sum_of_magnitudes(weight: jax.Array, sharding: NamedSharding) -> jax.Array:
    """Return the weight; its gradient is the sum over samples, the vmapped axis, of the magnitudes
    of theirs.

    The magnitude comes before any sum over samples, on one device or between devices. Within a scan
    over layers one layer's gradients of the samples in flight exist at once.
    """
    return weight


sum_of_magnitudes.defvjp(
    lambda weight, sharding: (weight, None),
    lambda sharding, _, gradient: (
        lax.with_sharding_constraint(lax.psum(flushed(jnp.abs(gradient)), SAMPLES), sharding),
    ),
)


@dataclasses.dataclass(frozen=True)
class Magnitudes:
    """`sum_of_magnitudes` as the decoder's tap."""

    sharder: Sharder

    def __call__(self, weight: jax.Array, row: Param) -> jax.Array:
        return sum_of_magnitudes(weight, self.sharder.sharding(row.layer_axes))


def adding(totals: Mapping[str, jax.Array], seen: set[str]) -> Callable[..., Any]:
    """Return an interceptor (`flax.linen.intercept_methods`) under which the gradient by a block's
    weight is its total and, added one by one, the magnitudes of each sample's gradient.

    What is not summed, the gradients by what enters the products, is computed for all samples at
    once, with large factors.

    Args:
      totals: what is summed so far, by the parameter's path; weights of products alone.
      seen: receives the paths whose weights a product has used: the others get no sum.
    """
    used: list[tuple[jax.Array, str]] = []  # weights, as products take them

    def call(method, args, options, context):
        if context.method_name == "weight":
            weight = method(*args, **options)
            path = "/".join((*context.module.path, args[0]))
            if path in totals:
                used.append((weight, path))
            return weight
        if context.method_name != "product":
            return method(*args, **options)
        equation, x, weight, *dtype = args
        path = next((path for known, path in used if known is weight), None)
        if path is None:
            return method(*args, **options)
        seen.add(path)

        def product(x, weight):
            return method(equation, x, weight, *dtype, **options)

        return _adding_product(product, x, weight, totals[path])

    return call


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _adding_product(product, x, weight, total):
    return product(x, weight)


def _adding_forward(product, x, weight, total):
    return product(x, weight), (x, weight, total)


def _adding_backward(product, kept, gradient):
    x, weight, total = kept
    (of_x,) = jax.linear_transpose(lambda x: product(x, weight), x)(gradient)

    def add(total, sample):
        x, gradient = (part[None] for part in sample)
        (of_weight,) = jax.linear_transpose(lambda weight: product(x, weight), weight)(gradient)
        return total + flushed(jnp.abs(of_weight)), None

    total, _ = lax.scan(add, total, (x, gradient))
    return of_x, total, None


_adding_product.defvjp(_adding_forward, _adding_backward)
