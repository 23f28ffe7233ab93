"""A list of tensors as one flat vector, and back."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors


class Layout:
    """Where each tensor of a list lies in one flat vector.

    Args:
        shapes: the shapes of the tensors, in order.
    """

    def __init__(self, shapes: Sequence[torch.Size]) -> None:
        self.shapes = tuple(shapes)
        self.sizes = tuple(shape.numel() for shape in shapes)
        self.offsets = (0, *accumulate(self.sizes))
        self._like = [torch.empty(shape, device="meta") for shape in shapes]

    @property
    def numel(self) -> int:
        """Length of the flat vector."""
        return self.offsets[-1]

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """The tensors one after the other in a new vector of shape ``(numel,)``."""
        if all(tensor.is_contiguous() for tensor in tensors):
            return torch.cat([tensor.view(-1) for tensor in tensors])
        # The gradient of a linear layer lies transposed: to turn it takes six times as long as to copy it.
        vector = tensors[0].new_empty(self.numel)
        torch._foreach_copy_(self.split(vector), list(tensors))
        return vector

    def split(self, vector: Tensor) -> list[Tensor]:
        """Views of ``vector`` with the shapes of the tensors."""
        return list(_unflatten_dense_tensors(vector.contiguous(), self._like))

    def take(self, vector: Tensor, positions: Sequence[int]) -> Tensor:
        """The parts of ``vector`` that belong to the tensors at ``positions``, one after the other."""
        if len(positions) == len(self.sizes):
            return vector
        return torch.cat([self._part(vector, i) for i in positions])

    def add_at(self, vector: Tensor, positions: Sequence[int], part: Tensor) -> None:
        """The transpose of :meth:`take`: adds ``part`` to ``vector``, in place."""
        if len(positions) == len(self.sizes):
            vector += part
            return
        for i, piece in zip(positions, part.split([self.sizes[i] for i in positions])):
            self._part(vector, i).add_(piece)

    def _part(self, vector: Tensor, i: int) -> Tensor:
        return vector.narrow(0, self.offsets[i], self.sizes[i])


def laid_out_as(piece: Tensor, param: Tensor) -> Tensor:
    """``piece`` with the strides of ``param``, which kernels go by."""
    return piece if piece.stride() == param.stride() else torch.empty_like(param).copy_(piece)


def aligned(piece: Tensor) -> Tensor:
    """``piece`` at an address that a GPU's kernels may have been compiled for: that of a tensor of its own,
    not of a part of a vector."""
    return piece if piece.device.type == "cpu" or piece.data_ptr() % 16 == 0 else piece.clone()


def has_views(tensor: Tensor) -> bool:
    """Whether another tensor shares memory with ``tensor``."""
    storage = tensor.untyped_storage()  # itself one of the users that are counted
    return torch._C._storage_Use_Count(storage._cdata) > 2


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The sum of the products of all entries."""
    if a.dtype in (torch.float32, torch.float64):  # in one pass, half the time of two
        return torch.dot(a.reshape(-1), b.reshape(-1))
    return (a * b).sum()


def _length(tensor: Tensor) -> Tensor:
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    return (
        dot(tensor, tensor).sqrt() if dtype == tensor.dtype else torch.linalg.vector_norm(tensor, dtype=dtype)
    )


def norm(tensors: Sequence[Tensor | None]) -> Tensor:
    """Euclidean norm over all tensors, at least in float32, on the device of the first: nothing waits for
    it."""
    norms = [_length(t) for t in tensors if t is not None]
    if len(norms) == 1:
        return norms[0]
    return (
        torch.linalg.vector_norm(torch.stack([n.to(norms[0]) for n in norms])) if norms else torch.zeros(())
    )
