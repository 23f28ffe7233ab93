"""The scale on which values are moved, and their bounds."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Scale:
    """Bounds of values, and whether the hyper optimizer moves them or their logarithms. What it moves is the
    *leaf*.

    Args:
        low: the lowest value.
        high: the highest one.
        log: the leaf is the logarithm of the values.
    """

    low: float = -math.inf
    high: float = math.inf
    log: bool = False

    @property
    def leaf_bounds(self) -> tuple[float, float]:
        """The bounds of the leaf."""
        if not self.log:
            return self.low, self.high
        low, high = (math.log(bound) if bound > 0 else -math.inf for bound in (self.low, self.high))
        return low, high

    def leaf(self, values: Tensor) -> Tensor:
        """The leaf that stands for values."""
        return values.log() if self.log else values

    def values(self, leaf: Tensor) -> Tensor:
        """A copy of the values that a leaf stands for, without graph."""
        leaf = leaf.detach()
        return leaf.exp() if self.log else leaf.clone()

    def leaf_gradient(self, gradient: Tensor, leaf: Tensor) -> Tensor:
        """A copy of the gradient with respect to the leaf, from that with respect to the values."""
        return gradient * self.values(leaf) if self.log else gradient.clone()

    def project_(self, leaf: Tensor) -> Tensor:
        """Moves a leaf into its bounds, and counts how many of its entries had to move."""
        low, high = self.leaf_bounds
        with torch.no_grad():
            clipped = ((leaf < low) | (leaf > high)).sum()
            leaf.clamp_(low, high)
        return clipped

    def check(self, name: str, values: Tensor) -> None:
        """Refuses values that are not finite, not positive on a log scale, or out of bounds.

        Raises:
            ValueError: with the name.
        """
        if not values.isfinite().all():
            raise ValueError(f"Hyperparameter {name!r}: values must be finite, got {in_brief(values)}.")
        if self.log and (values <= 0).any():
            raise ValueError(
                f"Hyperparameter {name!r}: log=True with a value of {in_brief(values.min())}. The logarithm "
                "needs a positive start: pass init=1e-5 or the like, or log=False, which may start at 0."
            )
        if self._is_out(values):
            raise ValueError(
                f"Hyperparameter {name!r}: the value {in_brief(values)} is out of the bounds [{self.low}, "
                f"{self.high}]. Pass init inside them, or other bounds as low and high: without these, a "
                "setting's legal range bounds it."
            )

    def _is_out(self, values: Tensor) -> bool:
        """Whether values are out of bounds; on a log scale by more than the rounding of logarithms, since the
        exponential of a bound's logarithm may lie beyond it."""
        if not self.log:
            return bool((values < self.low).any() or (values > self.high).any())
        leaf = values.log() if values.is_floating_point() else values.double().log()
        rounding = 4 * torch.finfo(leaf.dtype).eps
        low, high = self.leaf_bounds
        above = low - rounding * (1 + abs(low)) <= leaf
        below = leaf <= high + rounding * (1 + abs(high))  # never, if high is not positive: its log is -inf
        return not bool((above & below).all())


def in_brief(values: Tensor) -> str:
    """One number, or from where to where many go."""
    if values.numel() == 1:
        return f"{values.item():g}"
    return f"{values.min().item():g} to {values.max().item():g}"
