"""Parameters that are updated together, as one vector."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .vectors import Layout


@dataclass(frozen=True, eq=False)
class Bucket:
    """Parameters of one param group that share device, dtype, step count and kinds of state.

    Args:
        group: the number of the param group.
        indices: where its parameters stand among all parameters of the optimizer.
        positions: where they stand in their group.
        layout: where they lie in the bucket's flat vector.
        flat: whether the rule runs on the flat vector; if not, the bucket is one parameter in its own shape.
    """

    group: int
    indices: tuple[int, ...]
    positions: tuple[int, ...]
    layout: Layout
    flat: bool
    dtype: torch.dtype
    device: torch.device

    @property
    def shape(self) -> torch.Size:
        """Shape of what the rule runs on."""
        return torch.Size([self.layout.numel]) if self.flat else self.layout.shapes[0]

    @cached_property
    def unread(self) -> Tensor:
        """Stands for a vector that nobody reads, in the memory of one number. That is NaN, so that who reads
        it all the same gets no number, wherever it lies."""
        return torch.full((), math.nan, dtype=self.dtype).expand(self.shape)

    def gather(self, tensors: Sequence[Tensor | None] | Mapping[int, Tensor]) -> Tensor:
        """What the rule runs on, copied out of tensors for each parameter of the optimizer, none of its own
        None."""
        own: list[Tensor] = [tensors[i] for i in self.indices]  # type: ignore[misc]
        return self.layout.flatten(own) if self.flat else own[0].clone()

    def scatter(self, tensor: Tensor) -> Iterator[tuple[int, Tensor]]:
        """The transpose of :meth:`gather`: each parameter's index and its view of ``tensor``."""
        return zip(self.indices, self.layout.split(tensor) if self.flat else [tensor])
