"""Conjugate gradients."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SolverError
from .base import Matvec, SolveInfo, Solver, check_finite, check_number, check_positive_int, damped


@dataclass(frozen=True)
class CG(Solver):
    """Conjugate gradients, for a symmetric positive definite A.

    Args:
        max_steps: at most so many iterations; the residual in the report tells how far they came.
        rtol: stop when the norm of the residual is below ``rtol`` times that of ``b``.
        damping: solve with ``A + damping I`` instead.

    Cost: one product for each iteration, one synchronization each.

    Raises:
        TypeError, ValueError: for numbers out of range.
        SolverError: when solving, if A shows a direction without positive curvature, or something is not finite.

    Source: Hestenes and Stiefel 1952; for hypergradients Pedregosa 2016.
    """

    max_steps: int = 50
    rtol: float = 1e-6
    damping: float = 0.0

    def __post_init__(self) -> None:
        check_positive_int(self.max_steps, "CG: max_steps")
        check_number(self.rtol, "CG: rtol", positive=False)
        check_number(self.damping, "CG: damping", positive=False)

    def solve(self, matvec: Matvec, b: Tensor) -> tuple[Tensor, SolveInfo]:
        norm = check_finite(b)
        matvec = damped(matvec, self.damping)
        x, r, p = torch.zeros_like(b), b, b
        rr = float(r @ r)
        steps = 0
        while steps < self.max_steps and math.sqrt(rr) > self.rtol * norm:
            ap = matvec(p)
            steps += 1
            curvature = float(p @ ap)
            if not curvature > 0:
                raise SolverError(self._not_positive(curvature / float(p @ p), steps))
            x = x + rr / curvature * p
            r = r - rr / curvature * ap
            old, rr = rr, float(r @ r)
            p = r + rr / old * p
        return x, SolveInfo(steps, math.sqrt(rr) / norm if norm > 0 else 0.0)

    def _not_positive(self, curvature: float, steps: int) -> str:
        return (
            f"CG met a direction of curvature {curvature:.3g} in iteration {steps}, and needs positive ones: the training "
            "Hessian, with decay and damping, is not positive definite. Training is not at a minimum: train longer before "
            f"the hyper step, or pass CG(damping=...) above {self.damping + max(-curvature, 0):.3g}."
        )
