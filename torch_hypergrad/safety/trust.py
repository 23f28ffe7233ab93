"""When a hypergradient should not be trusted. The two limits were measured: see
``docs/results/precision.md``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..methods import Statistics

MAX_AMPLIFIED_ROUNDING = 1e-3
"""Growth of adjoints times machine epsilon, above which the number itself may be wrong."""

MAX_GROWTH = 1e3
"""Growth of adjoints above which a derivative, however exact, does not foretell what a step of one per cent
does."""


MAX_ERROR = 0.5
"""Estimated relative error of products, or relative residual of a solve, that deserves a word."""


def warnings_of(statistics: Statistics, params: Sequence[Tensor]) -> list[str]:
    """Sentences about why a hypergradient should not be trusted; empty if nothing speaks against it."""
    numbers = (statistics.adjoint_growth, statistics.product_error, statistics.residual)
    growth, error, residual = (None if number is None else float(number) for number in numbers)
    warnings = [] if growth is None else _growth_warnings(growth, params)
    if error is not None and not error <= MAX_ERROR:
        warnings.append(
            f"Products by finite differences may be off by {error:.0%}: with two step lengths they differ by "
            "as much, as they do where gradients jump (ReLU, max-pooling). Use second_order='reverse' or "
            "'forward'."
        )
    if residual is not None and not residual <= MAX_ERROR:
        warnings.append(
            f"The linear solve left {residual:.0%} of its right-hand side unsolved, so the hypergradient is "
            "far from that of the implicit function theorem. Take more terms or steps, or another solver."
        )
    return warnings


def _growth_warnings(growth: float, params: Sequence[Tensor]) -> list[str]:
    found = []
    coarsest = max({p.dtype for p in params}, key=lambda dtype: torch.finfo(dtype).eps)
    if not growth * torch.finfo(coarsest).eps <= MAX_AMPLIFIED_ROUNDING:  # not a number: warn
        found.append(
            f"The hypergradient may be wrong in its first digit: adjoints grew {growth:.1e} times over the "
            f"sweep, and rounding errors of training in {coarsest} grow with them. Train in a wider dtype or "
            "less sensitively."
        )
    if not growth <= MAX_GROWTH:
        found.append(
            f"The hypergradient may hold for tiny changes alone: adjoints grew {growth:.1e} times over the "
            "sweep, as they do where training is chaotic. Lower the learning rate, shorten the window with "
            "Unrolled(truncation=...), or raise Adam's eps."
        )
    return found
