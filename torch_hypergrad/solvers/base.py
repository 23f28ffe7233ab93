"""What a solver is: a way to solve ``A x = b`` from products with ``A`` alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, TypeAlias

import torch
from torch import Tensor

from ..errors import SolverError

Matvec: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SolveInfo:
    """What a solve cost and how good it is, in numbers that may still be on their way from a device.

    Args:
        num_matvecs: products with ``A``.
        residual: norm of ``b - A x`` over the norm of ``b``, damping included in ``A``; None where not
            computed.
        damping: what was added to the diagonal of ``A``.
        numbers: what :meth:`Solver.check` is to judge, by name: tensors of one number each.
    """

    num_matvecs: int
    residual: float | Tensor | None
    damping: float = 0.0
    numbers: Mapping[str, Tensor] = field(default_factory=dict)


class Solver(ABC):
    """Solves ``(A + damping I) x = b`` on flat vectors. Instances are immutable options and may be shared."""

    warm_start: bool = False
    """Whether to start from the solution of the hyper step before, which the caller keeps: a dataclass field
    of those that have a use for it."""

    @property
    def keeps_rtol(self) -> bool:
        """Whether a tolerance given to :meth:`solve` is kept to, as far as it can be."""
        return False

    waits: ClassVar[bool] = True
    """Whether :meth:`solve` waits for the device. One that does not, and draws no random numbers from
    generators of its own, can be recorded as a whole."""

    @abstractmethod
    def solve(
        self, matvec: Matvec, b: Tensor, *, x0: Tensor | None = None, rtol: float | None = None
    ) -> tuple[Tensor, SolveInfo]:
        """The solution, of shape ``(n,)`` as ``b``, and its statistics.

        Args:
            matvec: ``v -> A v`` for vectors of shape ``(n,)``; a new vector each time, which may be written
                to.
            b: the right-hand side, of shape ``(n,)``.
            x0: where to start, of shape ``(n,)``, if it is closer than 0; None for 0. What is exact has no
                use for it.
            rtol: a relative tolerance in place of the solver's own, where it has one.

        Raises:
            SolverError: if ``A`` is not what the solver needs, where it waits for the device in any case.
        """

    def check(self, numbers: Mapping[str, float]) -> None:  # noqa: B027  (most have nothing to refuse)
        """Refuses a solve that failed by its ``numbers``, once they have been read.

        Raises:
            SolverError: with the cause and the remedy.
        """


def check_positive_int(value: object, name: str) -> None:
    """Refuses anything but a positive int."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


def check_bool(value: object, name: str) -> None:
    """Refuses anything but True and False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}.")


def check_number(value: object, name: str, *, positive: bool) -> None:
    """Refuses anything but a finite number that is positive, or at least 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"{name} must be finite and {'above 0' if positive else 'at least 0'}, got {value}.")


def damped(matvec: Matvec, damping: float) -> Matvec:
    """``v -> (A + damping I) v``."""
    if damping == 0:
        return matvec
    return lambda v: matvec(v).add_(v, alpha=damping)


def begin(matvec: Matvec, b: Tensor, x0: Tensor | None) -> tuple[Tensor, Tensor]:
    """Where to start, and what is left of ``b`` there, ``r = b - A x``, as new vectors: ``x0`` at the price
    of one product where that leaves less than 0 does, else 0. Nothing waits for the device."""
    if x0 is None:
        return torch.zeros_like(b), b.clone()
    r = b - matvec(x0)
    is_closer = r.norm() < b.norm()
    return torch.where(is_closer, x0, torch.zeros_like(x0)), torch.where(is_closer, r, b)


def conjugate_gradients(
    matvec: Matvec,
    b: Tensor,
    max_steps: int,
    rtol: float,
    *,
    x0: Tensor | None = None,
    precondition: Matvec | None = None,
) -> tuple[Tensor, int, float]:
    """Conjugate gradients, with a symmetric positive definite approximation of the inverse or without.

    Returns:
        The solution, the number of products, and the norm of the residual over that of ``b``.

    Raises:
        IndefiniteError: for a direction without positive curvature.

    Source: Hestenes and Stiefel 1952; Saad 2003, algorithm 9.1.
    """
    norm = check_finite(b)
    x, r = begin(matvec, b, x0)
    z = r if precondition is None else precondition(r)
    p = z.clone()
    rz, residual, steps = float(r @ z), norm if x0 is None else float(r.norm()), 0
    while steps < max_steps and residual > rtol * norm:
        ap = matvec(p)
        steps += 1
        curvature = float(p @ ap)
        if not curvature > 0:
            raise IndefiniteError(curvature / float(p @ p), steps)
        x.add_(p, alpha=rz / curvature)
        r.sub_(ap, alpha=rz / curvature)
        z = r if precondition is None else precondition(r)
        old, rz = rz, float(r @ z)
        p.mul_(rz / old).add_(z)
        residual = math.sqrt(rz) if precondition is None else float(r.norm())
    return x, steps + (x0 is not None), residual / norm if norm > 0 else 0.0


class IndefiniteError(Exception):
    """A direction without positive curvature; each solver turns it into a :class:`SolverError` with its
    remedy."""

    def __init__(self, curvature: float, steps: int) -> None:
        super().__init__(curvature, steps)
        self.curvature, self.steps = curvature, steps

    def explain(self, solver: str, damping: float) -> SolverError:
        """The error for the user."""
        return SolverError(
            f"{solver} met a direction of curvature {self.curvature:.3g} in iteration {self.steps}, and "
            "needs positive ones: the training Hessian, with decay and damping, is not positive definite. "
            f"Training is not at a minimum: train longer before the hyper step, pass {solver}(damping=...) "
            f"above {damping + max(-self.curvature, 0):.3g}, or Implicit(curvature='gauss_newton'), which is "
            "never negative."
        )


def check_finite(b: Tensor) -> float:
    """The norm of the right-hand side; refuses one that is not finite. Waits for the device."""
    return check_norm(float(b.norm()))


def check_norm(norm: float) -> float:
    """Refuses a norm of the right-hand side that is not finite."""
    if not math.isfinite(norm):
        raise SolverError(
            f"The gradient of the validation loss has norm {norm}: there is nothing to solve for. Look for a "
            "validation loss that overflows, or weights that have diverged: lower the learning rate."
        )
    return norm
