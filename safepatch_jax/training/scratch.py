"""Memory of a train step that the next step uses again, on a CPU.

A CPU's large arrays go back to the system when they are freed, and the next ones come in new pages,
each of which costs a fault and is zeroed first: some 300,000 a step of a model of 135 M parameters.
So a step returns its two large intermediates, the gradients and what the loop over blocks keeps for
the backward pass; the next one donates them, and the compiler puts its own there.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import jax
import jax.extend
import jax.numpy as jnp

_MOST = 16  # programs that are held: each has memory maps


def gradients_and_kept(
    objective: Callable[[Any], tuple[jax.Array, Any]], params: Any, layers: int
) -> tuple[Any, Any, list[jax.Array]]:
    """Differentiate an objective within a program.

    Args:
      objective: maps parameters to (scalar, anything else).
      params: where it is differentiated.
      layers: blocks of the model.

    Returns:
      (gradients, what else the objective returned, the arrays [L, ...] that are kept between its
      forward and its backward pass, inputs of the program among them).
    """
    value, backward, other = jax.vjp(objective, params, has_aux=True)
    (gradients,) = backward(jnp.ones_like(value))
    kept = [x for x in jax.tree.leaves(backward) if x.ndim > 1 and x.shape[0] == layers]
    return gradients, other, kept


class InScratch:
    """A step as programs that compute in the memory of the step before.

    Args:
      step: maps (state, frozen, batch, ...) to (state, (gradients, what was kept), metrics).
      shardings: of the state.
      here: that of anything else on the device.
    """

    def __init__(self, step: Callable[..., tuple[Any, Any, Any]], shardings: Any, here: Any):
        self._step = jax.jit(step)  # traced, never run
        self._shardings, self.here = (shardings, here, here), here
        self._programs: dict[Any, tuple[Callable, Any]] = {}

    def program(self, *inputs: Any) -> tuple[Callable[..., Any], Any]:
        """Return (what maps (state, scratch, (frozen, ...)) to (state, scratch, metrics), donating
        the first two; the shapes and dtypes of scratch) for arrays of these shapes."""
        key = shapes_of(inputs)
        if key in self._programs:
            self._programs[key] = self._programs.pop(key)  # the last used comes last
        else:
            # Traced once: the shapes of scratch are needed before the program can be.
            traced = self._step.trace(*inputs)
            out_tree = jax.tree.structure(traced.out_info)
            flat, own = jax.extend.core.jaxpr_as_fun(traced.jaxpr), _made(traced, out_tree)

            def in_scratch(state, scratch, rest):
                out = flat(*jax.tree.leaves((state, *rest)))
                state, (gradients, kept), metrics = jax.tree.unflatten(out_tree, out)
                return state, (gradients, list(itertools.compress(kept, own))), metrics

            # In the order in which they come: arrays of one shape are donated to each other by it.
            program = jax.jit(
                in_scratch,
                donate_argnums=(0, 1),
                keep_unused=True,
                out_shardings=self._shardings,
            )
            gradients, kept = traced.out_info[1]
            if len(self._programs) >= _MOST:  # the one not used for longest
                del self._programs[next(iter(self._programs))]
            self._programs[key] = program, (gradients, list(itertools.compress(kept, own)))
        return self._programs[key]


class Reusing:
    """Takes steps each of which computes in the memory of the one before. It holds that memory: the
    gradients, and what is kept with a batch of each shape."""

    def __init__(self, steps: InScratch):
        self._steps, self._gradients = steps, None
        self._of_shape: dict[Any, tuple[Callable, Any]] = {}  # program, what was kept

    def __call__(
        self, state: Any, frozen: Any, batch: Mapping[str, jax.Array], *rest: Any
    ) -> tuple[Any, Any]:
        """Return the state after a step, and its metrics."""
        inputs = frozen, batch, *rest
        key = shapes_of(inputs)
        if key not in self._of_shape:
            program, (gradients, kept) = self._steps.program(state, *inputs)
            if self._gradients is None:
                self._gradients = self._memory(gradients)
            self._of_shape[key] = program, self._memory(kept)
        program, kept = self._of_shape[key]
        state, (self._gradients, kept), metrics = program(state, (self._gradients, kept), inputs)
        self._of_shape[key] = program, kept
        return state, metrics

    def _memory(self, abstract: Any) -> Any:
        """Return arrays of these shapes and dtypes."""
        here = self._steps.here
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype, device=here), abstract)


def shapes_of(inputs: Any) -> Hashable:
    """Return structure, shapes and dtypes of arrays."""
    leaves, tree = jax.tree.flatten(inputs)
    return tree, tuple((jnp.shape(x), jnp.result_type(x)) for x in leaves)


def _made(traced: jax.stages.Traced, out_tree: Any) -> list[bool]:
    """Tell which of the arrays that were kept the step makes, each once: others are inputs, as
    weights are, of which a copy would be returned."""
    jaxpr = traced.jaxpr.jaxpr
    _, (_, kept), _ = jax.tree.unflatten(out_tree, jaxpr.outvars)
    return [x not in jaxpr.invars and x not in kept[:i] for i, x in enumerate(kept)]
