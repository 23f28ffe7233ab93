"""How the tolerance of an inner problem, and of a linear solve, tightens from one hyper step to the next.

Hypergradients of which the errors have a finite sum lead to where exact ones do (Pedregosa 2016, theorem 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

from ..solvers.base import check_number


def exponential(start: float = 0.1, factor: float = 0.9, least: float = 1e-12) -> Iterator[float]:
    r""":math:`\epsilon_k = \epsilon_1\, factor^{k-1}`, never below ``least``.

    Args:
        start: the first tolerance.
        factor: below 1.
        least: what can be reached at all.

    Raises:
        TypeError, ValueError: for numbers out of range.

    Source: Pedregosa 2016, section 5.1.
    """
    check_number(factor, "exponential: factor", positive=True)
    if not factor < 1:
        raise ValueError(f"exponential: factor must be below 1: the tolerance is to tighten; got {factor}.")
    return _falling(start, lambda k: factor ** (k - 1), least)


def quadratic(start: float = 0.1, least: float = 1e-12) -> Iterator[float]:
    r""":math:`\epsilon_k = \epsilon_1 / k^2`, never below ``least``; see :func:`exponential`."""
    return _falling(start, lambda k: k**-2, least)


def cubic(start: float = 0.1, least: float = 1e-12) -> Iterator[float]:
    r""":math:`\epsilon_k = \epsilon_1 / k^3`, never below ``least``; see :func:`exponential`."""
    return _falling(start, lambda k: k**-3, least)


def _falling(start: float, factor: Callable[[int], float], least: float) -> Iterator[float]:
    check_number(start, "start", positive=True)
    check_number(least, "least", positive=True)
    return (max(start * factor(k), least) for k in count(1))
