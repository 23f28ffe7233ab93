"""How the tolerance of an inner problem, and of a linear solve, tightens from one hyper step to the next.

Hypergradients of which the errors have a finite sum lead to where exact ones do (Pedregosa 2016, theorem 2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import count

from ..solvers.base import check_number


def exponential(start: float = 0.1, factor: float = 0.9, least: float = 1e-12) -> Iterator[float]:
    r""":math:`\epsilon_k = \epsilon_1\, factor^{k-1}`, never below ``least``, without end.

    Args:
        start: the first tolerance.
        factor: below 1.
        least: what the solves can reach; about 1e-8 for ``fit`` by gradients alone, in float64.

    Raises:
        TypeError, ValueError: for numbers out of range.

    Example:
        >>> for tolerance, _ in zip(exponential(0.1, factor=0.5), range(3)):
        ...     print(tolerance)
        0.1
        0.05
        0.025

    Source: Pedregosa 2016, section 5.1.
    """
    check_number(factor, "exponential: factor", positive=True)
    if not factor < 1:
        raise ValueError(f"exponential: factor must be below 1: the tolerance is to tighten; got {factor}.")
    return _falling("exponential", start, lambda k: factor ** (k - 1), least)


def quadratic(start: float = 0.1, least: float = 1e-12) -> Iterator[float]:
    r""":math:`\epsilon_k = \epsilon_1 / k^2`, never below ``least``; see :func:`exponential`."""
    return _falling("quadratic", start, lambda k: k**-2, least)


def cubic(start: float = 0.1, least: float = 1e-12) -> Iterator[float]:
    r""":math:`\epsilon_k = \epsilon_1 / k^3`, never below ``least``; see :func:`exponential`."""
    return _falling("cubic", start, lambda k: k**-3, least)


def _falling(name: str, start: float, factor: Callable[[int], float], least: float) -> Iterator[float]:
    check_number(start, f"{name}: start", positive=True)
    check_number(least, f"{name}: least", positive=True)
    if not least <= start:
        raise ValueError(f"{name}: least must be at most start, got least={least} and start={start}.")
    return (max(start * factor(k), least) for k in count(1))
