"""The Hessian taken for a multiple of the identity."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from .base import Matvec, SolveInfo, Solver, begin, check_norm, check_number


@dataclass(frozen=True)
class Identity(Solver):
    """``x = scale * b``: no product at all, and the first term of the Neumann series.

    With the learning rate as ``scale`` it differentiates one step of SGD taken at the current weights. T1-T2
    (Luketina et al. 2016) differentiates the step that was taken: that is ``Unrolled(truncation=1)``.

    Args:
        scale: the inverse of the curvature.

    Raises:
        TypeError, ValueError: for a scale that is not positive.

    Source: Lorraine, Vicol and Duvenaud 2020, table 1.
    """

    scale: float = 1.0

    waits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number(self.scale, "Identity: scale", positive=True)

    def solve(
        self, matvec: Matvec, b: Tensor, *, x0: Tensor | None = None, rtol: float | None = None
    ) -> tuple[Tensor, SolveInfo]:
        x, r = begin(matvec, b, x0)
        return x.add_(r, alpha=self.scale), SolveInfo(
            0 if x0 is None else 1, None, numbers={"norm": b.norm()}
        )

    def check(self, numbers: Mapping[str, float]) -> None:
        check_norm(numbers["norm"])
