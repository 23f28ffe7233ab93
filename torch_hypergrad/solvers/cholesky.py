"""Dense and exact, for small models."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SolverError
from .base import (
    Matvec,
    SolveInfo,
    Solver,
    check_finite,
    check_number,
    check_positive_int,
    damped,
)


@dataclass(frozen=True)
class Cholesky(Solver):
    """Builds A from n products and factorizes it: exact, for a symmetric positive definite A of up to a few
    thousand rows.

    Args:
        damping: solve with ``A + damping I`` instead.
        blocks: A consists of so many blocks of one size on its diagonal, and nothing beside them, as where
            the training losses of several small models, stacked in one parameter of shape ``(blocks,
            ...)``, are summed. Then ``n / blocks`` products are enough, one for the same column of all.

    Cost: ``m = n / blocks`` products and, with blocks, one more to check that they are apart; ``n m`` memory
    and ``n m^2 / 3`` operations for n parameters.

    Raises:
        TypeError, ValueError: for numbers out of range.
        SolverError: when solving, if A is not positive definite, n is not a multiple of ``blocks``, or the
            blocks depend on each other.

    Source: Bengio 2000.
    """

    damping: float = 0.0
    blocks: int = 1

    def __post_init__(self) -> None:
        check_number(self.damping, "Cholesky: damping", positive=False)
        check_positive_int(self.blocks, "Cholesky: blocks")

    @property
    def keeps_rtol(self) -> bool:
        return True

    def solve(
        self, matvec: Matvec, b: Tensor, *, x0: Tensor | None = None, rtol: float | None = None
    ) -> tuple[Tensor, SolveInfo]:
        norm, matvec = check_finite(b), damped(matvec, self.damping)
        matrices = self._matrices(matvec, b)
        symmetric = (matrices + matrices.mT) / 2
        factors, failed = torch.linalg.cholesky_ex(symmetric)
        if bool(failed.any()):
            raise self._indefinite(symmetric, failed)
        x = torch.cholesky_solve(b.view(self.blocks, -1, 1), factors)
        rest = b - ((matrices @ x).flatten() if self.blocks == 1 else matvec(x.flatten()))
        if self.blocks > 1:
            self._check_apart(rest, b, matrices, x)
        residual, num_matvecs = float(rest.norm()), matrices.shape[-1] + (self.blocks > 1)
        return x.flatten(), SolveInfo(num_matvecs, residual / norm if norm > 0 else 0.0, self.damping)

    def _matrices(self, matvec: Matvec, b: Tensor) -> Tensor:
        """The blocks, of shape ``(blocks, m, m)``; a product gives a row of each, as A is symmetric."""
        size, rest = divmod(len(b), self.blocks)
        if rest:
            raise SolverError(
                f"Cholesky(blocks={self.blocks}): the {len(b)} parameters do not fall into {self.blocks} "
                "blocks of one size. Stack the models in one parameter whose first dimension counts them."
            )
        rows = torch.eye(size, dtype=b.dtype, device=b.device)
        products = [matvec(row.repeat(self.blocks)).view(self.blocks, size) for row in rows]
        return torch.stack(products, dim=1)

    def _indefinite(self, matrices: Tensor, failed: Tensor) -> SolverError:
        smallest, worst = math.nan, int(failed.argmax())
        if bool(matrices.isfinite().all()):
            of_each = torch.linalg.eigvalsh(matrices)[:, 0]
            smallest, worst = float(of_each.min()), int(of_each.argmin())
        apart = "" if self.blocks == 1 else f"block {worst} (of {self.blocks}, counted from 0) of "
        layout = "" if self.blocks == 1 else f" Or the blocks depend on each other. {self._layout}."
        return SolverError(
            f"Cholesky: {apart}the training Hessian, {matrices.shape[-1]} x {matrices.shape[-1]} with decay "
            f"and damping, is not positive definite: its smallest eigenvalue is {smallest:.3g}. Training is "
            "not at a minimum, or the minimum is not unique: train longer, add weight decay, or pass "
            f"Cholesky(damping=...) above {self.damping + max(-smallest, 0):.3g}.{layout}"
        )

    def _check_apart(self, rest: Tensor, b: Tensor, matrices: Tensor, x: Tensor) -> None:
        """Refuses what is left of any block beyond rounding: a large block must not hide a small one."""
        left, given = (of.view(self.blocks, -1).norm(dim=1) for of in (rest, b))
        sizes = matrices.norm(dim=(1, 2)) * x.norm(dim=(1, 2))
        rounding = torch.finfo(b.dtype).eps
        excess = left - (rounding**0.5 * given + 10 * matrices.shape[-1] * rounding * sizes)
        if not bool((excess <= 0).all()):
            worst = int(excess.argmax())
            raise SolverError(
                f"Cholesky(blocks={self.blocks}): the solution leaves a residual of {float(left[worst]):.3g} "
                f"in block {worst} (counted from 0), where the right-hand side has "
                f"{float(given[worst]):.3g}: the blocks depend on each other, or do not lie one after the "
                f"other. {self._layout}, or leave blocks out."
            )

    @property
    def _layout(self) -> str:
        return (
            f"Stack the models in one parameter of shape ({self.blocks}, ...) with a loss that is a sum over "
            "its first dimension"
        )
