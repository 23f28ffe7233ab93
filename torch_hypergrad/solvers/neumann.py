"""The Neumann series."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import SolverError
from .base import (
    Matvec,
    SolveInfo,
    Solver,
    begin,
    check_bool,
    check_norm,
    check_number,
    check_positive_int,
    damped,
)

NUM_POWER_ITERATIONS = 8


@dataclass(frozen=True)
class Neumann(Solver):
    r"""Truncated Neumann series,

    .. math:: x_K = \alpha \sum_{k<K} (I - \alpha A)^k b,

    which tends to :math:`A^{-1} b` if the eigenvalues of A are in :math:`(0, 2/\alpha)`. The residual
    :math:`b - A x_K = (I - \alpha A)^K b` is the next term of the series; it shrinks by
    :math:`\max_i |1 - \alpha\lambda_i|` with each term.

    Args:
        num_terms: K, the number of terms.
        scale: :math:`\alpha`. None takes one over the largest eigenvalue (in absolute value), estimated by 8
            power iterations, which may fall short of it by half before the series diverges.
        damping: solve with :math:`A + damping\, I` instead.
        warm_start: start from the solution of the hyper step before, if that is closer than 0: as training
            goes on, little has changed.

    Cost: ``num_terms`` products, 8 for ``scale=None``, and one for a warm start.

    Raises:
        TypeError, ValueError: for numbers out of range.
        SolverError: when solving, if the residual has grown above 1 or is not finite.

    Source: Lorraine, Vicol and Duvenaud 2020, algorithm 3.
    """

    num_terms: int = 20
    scale: float | None = None
    damping: float = 0.0
    warm_start: bool = False

    waits: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_positive_int(self.num_terms, "Neumann: num_terms")
        check_number(self.damping, "Neumann: damping", positive=False)
        check_bool(self.warm_start, "Neumann: warm_start")
        if self.scale is not None:
            check_number(self.scale, "Neumann: scale", positive=True)

    def solve(
        self, matvec: Matvec, b: Tensor, *, x0: Tensor | None = None, rtol: float | None = None
    ) -> tuple[Tensor, SolveInfo]:
        matvec = damped(matvec, self.damping)
        estimated = self.scale is None
        scale = 1 / largest_eigenvalue(matvec, b) if self.scale is None else b.new_full((), self.scale)
        (x, term), total = begin(matvec, b, x0), torch.zeros_like(b)
        for _ in range(self.num_terms):
            total.add_(term)
            term.addcmul_(matvec(term), -scale)
        num_matvecs = self.num_terms + (NUM_POWER_ITERATIONS if estimated else 0) + (x0 is not None)
        norm, size = b.norm(), term.norm()
        return x.addcmul_(total, scale), SolveInfo(
            num_matvecs,
            size / norm.masked_fill(norm == 0, 1),
            self.damping,
            {"norm": norm, "residual": size, "scale": scale},
        )

    def check(self, numbers: Mapping[str, float]) -> None:
        norm, scale = check_norm(numbers["norm"]), numbers["scale"]
        residual = numbers["residual"] / norm if norm > 0 else 0.0
        if not math.isfinite(scale):
            raise SolverError(
                "Neumann: the training Hessian, with decay and damping, is zero, and has no inverse. The "
                "training loss is flat or linear here: add weight decay or damping."
            )
        if not math.isfinite(residual) or residual > 1.0 + 1e-6:
            raise SolverError(self._divergence(residual, scale))

    def _divergence(self, residual: float, scale: float) -> str:
        return (
            f"Neumann diverged: relative residual {residual:.3g} after {self.num_terms} terms with scale "
            f"{scale:.3g}. The series needs the eigenvalues of the training Hessian, with decay and damping, "
            f"in (0, {2 / scale:.3g}). Negative ones mean that training is not at a minimum: train longer "
            "before the hyper step, or add damping. Larger ones mean that scale is too large: lower it, or "
            "pass scale=None."
        )


def largest_eigenvalue(matvec: Matvec, like: Tensor) -> Tensor:
    """The largest absolute eigenvalue by power iteration, from a fixed random start: a lower bound. No
    synchronization, and no random number generators."""
    v = scattered(like)
    size = v.norm()
    for _ in range(NUM_POWER_ITERATIONS):
        v = matvec(v / size.clamp(min=torch.finfo(like.dtype).tiny))
        size = v.norm()
    return size


def scattered(like: Tensor) -> Tensor:
    """Numbers between -1 and 1 without a pattern, the same ones on every device: hashes of the positions. A
    generator's numbers would have to be brought to a device, or could not be recorded there.

    Source: after the finalizer of MurmurHash3, Appleby 2011.
    """
    bits = torch.arange(1, len(like) + 1, device=like.device).int()
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        bits.bitwise_xor_(bits >> shift).mul_(factor - 2**32)
    return bits.to(torch.float32).div_(2**31).to(like)
