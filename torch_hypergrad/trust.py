"""When a hypergradient should not be trusted. The two limits were measured: see ``docs/results/precision.md``."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MAX_AMPLIFIED_ROUNDING = 1e-3
"""Growth of adjoints times machine epsilon, above which the number itself may be wrong."""

MAX_GROWTH = 1e3
"""Growth of adjoints above which a derivative, however exact, does not foretell what a step of one per cent does."""


def growth_warnings(growth: float | None, params: Sequence[Tensor]) -> list[str]:
    """Sentences about a hypergradient whose adjoints grew so often over the sweep; None for methods without one."""
    if growth is None:
        return []
    found = []
    coarsest = max({p.dtype for p in params}, key=lambda dtype: torch.finfo(dtype).eps)
    if not growth * torch.finfo(coarsest).eps <= MAX_AMPLIFIED_ROUNDING:  # not a number: warn
        found.append(
            f"The hypergradient may be wrong in its first digit: adjoints grew {growth:.1e} times over the sweep, and "
            f"rounding errors of training in {coarsest} grow with them. Train in a wider dtype or less sensitively."
        )
    if not growth <= MAX_GROWTH:
        found.append(
            f"The hypergradient may hold for tiny changes alone: adjoints grew {growth:.1e} times over the sweep, as they do "
            "where training is chaotic. Lower the learning rate, shorten the window with Unrolled(truncation=...), or raise "
            "Adam's eps."
        )
    return found
