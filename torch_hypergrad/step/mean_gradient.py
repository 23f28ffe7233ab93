"""The mean training gradient over several batches, and products with its derivative."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .state import PerParameter
from .traced import TracedGradient


class MeanGradient:
    """The mean of gradients at one state."""

    def __init__(self, traced: Sequence[TracedGradient]) -> None:
        self._traced = list(traced)

    @property
    def error(self) -> Tensor | None:
        """Estimated relative error of the products; None if they are exact."""
        return self._traced[0].error

    def doubts(self) -> list[Tensor]:
        """Those of each gradient that has any."""
        return [torch.stack(list(t.doubts)) for t in self._traced if t.doubts]

    def value(self) -> list[Tensor | None]:
        """The gradient for each parameter, without graph."""
        return _means([[None if g is None else g.detach() for g in t.grads] for t in self._traced])

    def product(self, v: PerParameter) -> list[Tensor | None]:
        """``(dg/dtheta)^T v`` for each parameter."""
        return _means([t.product(v) for t in self._traced])

    def mixed(self, v: PerParameter) -> list[Tensor | None]:
        """``(dg/dlambda)^T v`` for each tuned tensor of the training loss."""
        return _means([t.mixed(v) for t in self._traced])


def _means(every: Sequence[PerParameter]) -> list[Tensor | None]:
    if len(every) == 1:
        return list(every[0])
    present = [[t for t in of_one if t is not None] for of_one in zip(*every)]
    return [torch.stack(tensors).sum(0).div_(len(every)) if tensors else None for tensors in present]
