"""Conjugate gradients."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import (
    IndefiniteError,
    Matvec,
    SolveInfo,
    Solver,
    check_bool,
    check_number,
    check_positive_int,
    conjugate_gradients,
    damped,
)


@dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients, for a symmetric positive definite A.

    Args:
        max_steps: at most so many iterations; the residual in the report tells how far they came.
        rtol: stop when the norm of the residual is below ``rtol`` times that of ``b``.
        damping: solve with ``A + damping I`` instead.
        warm_start: start from the solution of the hyper step before, if that is closer than 0: as training
            goes on, little has changed.

    Cost: one product for each iteration, one synchronization each; one product for a warm start.

    Raises:
        TypeError, ValueError: for numbers out of range.
        SolverError: when solving, if A shows a direction without positive curvature, or something is not
            finite.

    Source: Hestenes and Stiefel 1952; for hypergradients Pedregosa 2016.
    """

    max_steps: int = 50
    rtol: float = 1e-6
    damping: float = 0.0
    warm_start: bool = False

    def __post_init__(self) -> None:
        check_positive_int(self.max_steps, "CG: max_steps")
        check_number(self.rtol, "CG: rtol", positive=False)
        check_number(self.damping, "CG: damping", positive=False)
        check_bool(self.warm_start, "CG: warm_start")

    @property
    def keeps_rtol(self) -> bool:
        return True

    def solve(
        self, matvec: Matvec, b: Tensor, *, x0: Tensor | None = None, rtol: float | None = None
    ) -> tuple[Tensor, SolveInfo]:
        rtol = self.rtol if rtol is None else rtol
        try:
            x, num_matvecs, residual = conjugate_gradients(
                damped(matvec, self.damping), b, self.max_steps, rtol, x0=x0
            )
        except IndefiniteError as error:
            raise error.explain("CG", self.damping) from None
        return x, SolveInfo(num_matvecs, residual, self.damping)
