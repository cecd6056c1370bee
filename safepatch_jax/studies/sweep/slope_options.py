"""What of the plane of alpha and beta is looked at. Needs no JAX."""

from __future__ import annotations

import dataclasses

Place = tuple[float, float]  # alpha, beta


@dataclasses.dataclass(frozen=True)
class SlopeOptions:
    """What of the plane is looked at.

    Attributes:
      alpha, beta: the largest ones.
      step: of the finite differences, as a share of both.
      checks: how many points are checked by true models.
    """

    alpha: float = 2.0
    beta: float = 4.0
    step: float = 0.5
    checks: int = 4

    def __post_init__(self):
        if not (self.alpha > 0 and self.beta > 0 and 0 < self.step <= 1 and self.checks >= 0):
            raise ValueError(
                "alpha and beta must be above 0, step in (0, 1] and checks 0 at least; got "
                f"{self.alpha}, {self.beta}, {self.step} and {self.checks}."
            )

    @property
    def corners(self) -> tuple[Place, ...]:
        """The backbone, a step along alpha, along beta, and along both."""
        a, b = self.step * self.alpha, self.step * self.beta
        return (0.0, 0.0), (a, 0.0), (0.0, b), (a, b)
