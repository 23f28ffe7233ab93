"""Dense and exact, for small models."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SolverError
from .base import Matvec, SolveInfo, Solver, check_finite, check_number, damped


@dataclass(frozen=True)
class Cholesky(Solver):
    """Builds A from n products and factorizes it: exact, for a symmetric positive definite A of up to a few
    thousand rows.

    Args:
        damping: solve with ``A + damping I`` instead.

    Cost: n products, ``n^2`` memory and ``n^3 / 3`` operations for n parameters.

    Raises:
        TypeError, ValueError: for a damping out of range.
        SolverError: when solving, if A is not positive definite.

    Source: Bengio 2000.
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        check_number(self.damping, "Cholesky: damping", positive=False)

    def solve(
        self, matvec: Matvec, b: Tensor, *, x0: Tensor | None = None, rtol: float | None = None
    ) -> tuple[Tensor, SolveInfo]:
        norm = check_finite(b)
        matvec = damped(matvec, self.damping)
        identity = torch.eye(len(b), dtype=b.dtype, device=b.device)
        matrix = torch.stack([matvec(row) for row in identity])
        factor, failed = torch.linalg.cholesky_ex((matrix + matrix.T) / 2)
        if failed.item():
            smallest = (
                torch.linalg.eigvalsh((matrix + matrix.T) / 2)[0].item()
                if matrix.isfinite().all()
                else float("nan")
            )
            raise SolverError(
                f"Cholesky: the {len(b)} x {len(b)} training Hessian, with decay and damping, is not "
                f"positive definite: its smallest eigenvalue is {smallest:.3g}. Training is not at a "
                "minimum, or the minimum is not unique: train longer, add weight decay, or pass "
                f"Cholesky(damping=...) above {self.damping + max(-smallest, 0):.3g}."
            )
        x = torch.cholesky_solve(b[:, None], factor)[:, 0]
        residual = float((b - matrix @ x).norm()) / norm if norm > 0 else 0.0
        return x, SolveInfo(len(b), residual, self.damping)
