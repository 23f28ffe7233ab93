"""What a solver is: a way to solve ``A x = b`` from products with ``A`` alone."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

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
    """

    num_matvecs: int
    residual: float | Reading[Any] | None


class Solver(ABC):
    """Solves ``(A + damping I) x = b`` on flat vectors. Instances are immutable options and may be shared."""

    @abstractmethod
    def solve(self, matvec: Matvec, b: Tensor) -> tuple[Tensor, SolveInfo]:
        """The solution, of shape ``(n,)`` as ``b``, and its statistics.

        Args:
            matvec: ``v -> A v`` for vectors of shape ``(n,)``.
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
    return lambda v: matvec(v) + damping * v


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
