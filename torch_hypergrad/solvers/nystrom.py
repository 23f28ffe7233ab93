"""A low-rank picture of the matrix from random products, and conjugate gradients for what it leaves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import SolverError
from .base import (
    IndefiniteError,
    Matvec,
    SolveInfo,
    Solver,
    begin,
    check_bool,
    check_finite,
    check_number,
    check_positive_int,
    conjugate_gradients,
    damped,
)


@dataclass(frozen=True)
class Nystrom(Solver):
    r"""Conjugate gradients preconditioned with a Nystrom approximation, for a symmetric positive definite A.

    Products with random orthonormal :math:`\Omega` give :math:`Y = A\Omega` and the approximation
    :math:`Y (\Omega^\top Y)^{-1} Y^\top = U \Lambda U^\top \approx A`. The preconditioner brings its
    eigenvalues down to the smallest one among them, :math:`\lambda_r`:

    .. math:: P^{-1} = (\lambda_r + \mu)\, U (\Lambda + \mu)^{-1} U^\top + (I - U U^\top).

    With ``max_steps=0`` there are no iterations, and the answer is that of the approximation (Woodbury's
    formula), :math:`x = U (\Lambda + \mu)^{-1} U^\top b + (I - U U^\top) b / \mu`, which is good only where
    the damping :math:`\mu` is well above the eigenvalues that are left out.

    Args:
        rank: r, the number of random directions.
        damping: :math:`\mu`: solve with :math:`A + \mu I` instead.
        max_steps: at most so many iterations.
        rtol: stop when the norm of the residual is below ``rtol`` times that of ``b``.
        warm_start: start from the solution of the hyper step before, if that is closer than 0: as training
            goes on, little has changed.

    Cost: ``rank`` products, then one for each iteration (with ``max_steps=0`` one for the residual) and one
    for a warm start; memory
    of ``2 * rank`` vectors. The directions come from a fixed seed; the global random number generators are
    not touched.

    Raises:
        TypeError, ValueError: for numbers out of range, or ``max_steps=0`` without damping.
        SolverError: when solving, if A with damping shows a direction without positive curvature.

    Source: Frangella, Tropp and Udell 2021; for hypergradients Hataya and Yamada 2023.
    """

    rank: int = 20
    damping: float = 0.0
    max_steps: int = 50
    rtol: float = 1e-6
    warm_start: bool = False

    def __post_init__(self) -> None:
        check_positive_int(self.rank, "Nystrom: rank")
        check_number(self.damping, "Nystrom: damping", positive=False)
        check_number(self.rtol, "Nystrom: rtol", positive=False)
        check_bool(self.warm_start, "Nystrom: warm_start")
        if self.max_steps != 0 or isinstance(self.max_steps, bool):
            check_positive_int(self.max_steps, "Nystrom: max_steps")
        elif self.damping == 0:
            raise ValueError(
                "Nystrom: max_steps=0 needs damping above 0, got 0: without iterations, what the "
                "approximation leaves out has no inverse but that of the damping."
            )

    @property
    def keeps_rtol(self) -> bool:
        return self.max_steps > 0

    def solve(
        self, matvec: Matvec, b: Tensor, *, x0: Tensor | None = None, rtol: float | None = None
    ) -> tuple[Tensor, SolveInfo]:
        norm = check_finite(b)
        rank, damping = min(self.rank, len(b)), self.damping
        basis, eigenvalues = self._approximate(matvec, b, rank)
        smallest = eigenvalues.min() if len(eigenvalues) else eigenvalues.sum()

        def inverse(r: Tensor, rest: float | Tensor) -> Tensor:
            """``(U Lambda U^T + mu)^-1 r``, where what is outside of U counts 1 / rest."""
            inside = basis.T @ r
            return torch.addmv(r / rest, basis, inside / (eigenvalues + damping) - inside / rest)

        if self.max_steps == 0:
            x, r = begin(damped(matvec, damping), b, x0)
            x.add_(inverse(r, damping))
            residual = float((b - damped(matvec, damping)(x)).norm()) / norm if norm > 0 else 0.0
            return x, SolveInfo(rank + 1 + (x0 is not None), residual, damping)
        rest = torch.where(smallest + damping > 0, smallest + damping, 1.0)
        try:
            x, num_matvecs, residual = conjugate_gradients(
                damped(matvec, damping),
                b,
                self.max_steps,
                self.rtol if rtol is None else rtol,
                x0=x0,
                precondition=lambda r: inverse(r, rest),
            )
        except IndefiniteError as error:
            raise error.explain("Nystrom", damping) from None
        return x, SolveInfo(rank + num_matvecs, residual, damping)

    def _approximate(self, matvec: Matvec, b: Tensor, rank: int) -> tuple[Tensor, Tensor]:
        """U, of shape (n, r), and the diagonal of Lambda, from random directions along which A is
        positive."""
        generator = torch.Generator().manual_seed(0)
        rows = [torch.randn(b.shape, generator=generator, dtype=torch.float64).to(b) for _ in range(rank)]
        directions = torch.linalg.qr(torch.stack(rows, dim=1)).Q
        products = torch.stack([matvec(column) for column in directions.T.contiguous()], dim=1)
        core = directions.T @ products
        if not bool(core.isfinite().all()):
            raise SolverError(
                "Nystrom: a product with the training Hessian is not finite. Look for weights or a training "
                "loss that have diverged: lower the learning rate."
            )
        values, vectors = torch.linalg.eigh((core + core.T) / 2)
        noise = values.abs().max() * rank * torch.finfo(b.dtype).eps
        if values[0] + self.damping < -noise:
            raise IndefiniteError(float(values[0]) + self.damping, 0).explain("Nystrom", self.damping)
        keep = values > noise
        factor = products @ (vectors[:, keep] / values[keep].sqrt())
        basis, roots, _ = torch.linalg.svd(factor, full_matrices=False)
        return basis, roots.square()
