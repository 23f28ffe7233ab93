"""What a solver is: a way to solve ``A x = b`` from products with ``A`` alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from ..errors import SolverError
from ..readings import Reading

Matvec: TypeAlias = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class SolveInfo:
    """What a solve cost and how good it is.

    Args:
        num_matvecs: products with ``A``.
        residual: norm of ``b - A x`` over the norm of ``b``, damping included in ``A``; None where not computed. Where it
            is on a device, a reading, which raises the solver's errors when it is read.
        damping: what was added to the diagonal of ``A``.
    """

    num_matvecs: int
    residual: float | Reading[Any] | None
    damping: float = 0.0


class Solver(ABC):
    """Solves ``(A + damping I) x = b`` on flat vectors. Instances are immutable options and may be shared."""

    waits: ClassVar[bool] = True
    """Whether :meth:`solve` waits for the device. One that does not, and draws no random numbers from generators of its
    own, can be recorded as a whole; numbers that it reports are readings."""

    @abstractmethod
    def solve(self, matvec: Matvec, b: Tensor) -> tuple[Tensor, SolveInfo]:
        """The solution, of shape ``(n,)`` as ``b``, and its statistics.

        Args:
            matvec: ``v -> A v`` for vectors of shape ``(n,)``; a new vector each time, which may be written to.
            b: the right-hand side, of shape ``(n,)``.

        Raises:
            SolverError: if the solve diverged, or ``A`` is not what the solver needs.
        """


def check_positive_int(value: object, name: str) -> None:
    """Refuses anything but a positive int."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}.")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}.")


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


def conjugate_gradients(
    matvec: Matvec, b: Tensor, max_steps: int, rtol: float, precondition: Matvec | None = None
) -> tuple[Tensor, int, float]:
    """Conjugate gradients from 0, with a symmetric positive definite approximation of the inverse or without.

    Returns:
        The solution, the number of steps, and the norm of the residual over that of ``b``.

    Raises:
        IndefiniteError: for a direction without positive curvature.

    Source: Hestenes and Stiefel 1952; Saad 2003, algorithm 9.1.
    """
    norm = check_finite(b)
    x, r = torch.zeros_like(b), b.clone()
    z = r if precondition is None else precondition(r)
    p = z.clone()
    rz, residual, steps = float(r @ z), norm, 0
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
    return x, steps, residual / norm if norm > 0 else 0.0


class IndefiniteError(Exception):
    """A direction without positive curvature; each solver turns it into a :class:`SolverError` with its remedy."""

    def __init__(self, curvature: float, steps: int) -> None:
        super().__init__(curvature, steps)
        self.curvature, self.steps = curvature, steps

    def explain(self, solver: str, damping: float) -> SolverError:
        """The error for the user."""
        return SolverError(
            f"{solver} met a direction of curvature {self.curvature:.3g} in iteration {self.steps}, and needs positive ones: "
            "the training Hessian, with decay and damping, is not positive definite. Training is not at a minimum: train "
            f"longer before the hyper step, pass {solver}(damping=...) above {damping + max(-self.curvature, 0):.3g}, or "
            "Implicit(curvature='gauss_newton'), which is never negative."
        )


def check_finite(b: Tensor) -> float:
    """The norm of the right-hand side; refuses one that is not finite. Waits for the device."""
    return check_norm(float(b.norm()))


def check_norm(norm: float) -> float:
    """Refuses a norm of the right-hand side that is not finite."""
    if not math.isfinite(norm):
        raise SolverError(
            f"The gradient of the validation loss has norm {norm}: there is nothing to solve for. Look for a validation "
            "loss that overflows, or weights that have diverged: lower the learning rate."
        )
    return norm
