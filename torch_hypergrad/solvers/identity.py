"""The Hessian taken for a multiple of the identity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..readings import Reading, now_or_later
from .base import Matvec, SolveInfo, Solver, check_norm, check_number


@dataclass(frozen=True)
class Identity(Solver):
    """``x = scale * b``: no product at all, and the first term of the Neumann series. T1-T2 takes the learning rate as
    ``scale``, and so differentiates one step of SGD.

    Args:
        scale: the inverse of the curvature.

    Raises:
        TypeError, ValueError: for a scale that is not positive.

    Source: Luketina et al. 2016.
    """

    scale: float = 1.0

    waits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_number(self.scale, "Identity: scale", positive=True)

    def solve(self, matvec: Matvec, b: Tensor) -> tuple[Tensor, SolveInfo]:
        residual: Reading[None] | None = now_or_later([b.norm()], _no_residual)
        return self.scale * b, SolveInfo(0, residual)


def _no_residual(numbers: list[float]) -> None:
    check_norm(numbers[0])
