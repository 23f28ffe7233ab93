"""What a traced gradient is: the training gradient at one state, and products with its derivative."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .state import Buffers, PerParameter


class Products(NamedTuple):
    """Adjoints of what a gradient stage reads: one tensor for each parameter, each tuned tensor of the loss,
    and each buffer; None for zero."""

    params: list[Tensor | None]
    tensors: list[Tensor | None]
    buffers: Buffers | None = None


class TracedGradient(ABC):
    r"""The training gradient :math:`g(\theta, \lambda)` of one step at one state, as the update rule gets it,
    and the buffers that the loss leaves.

    ``grads`` has one tensor for each parameter, None where the loss does not depend on it, or where a kept
    graph has given up the values; ``loss`` is the loss where it was computed.
    """

    grads: list[Tensor | None]
    loss: Tensor | None = None
    error: Tensor | None = None
    """Estimated relative error of the products so far; None if they are exact."""

    doubts: Sequence[Tensor] = ()
    """Numbers that tell whether the products are right, once they have been read."""

    @abstractmethod
    def pull(self, adj_grads: PerParameter, adj_buffers: Buffers | None = None) -> Products:
        r"""The products :math:`(\partial g/\partial x)^\top v` for all x that the stage reads, and those of
        the buffers after it with their adjoints. Can be called once.

        Args:
            adj_grads: v, one tensor for each parameter; None stands for zeros.
            adj_buffers: one tensor for each buffer; None stands for zeros.
        """

    @abstractmethod
    def product(self, v: PerParameter) -> list[Tensor | None]:
        r""":math:`(\partial g/\partial\theta)^\top v` alone, as often as one likes."""

    @abstractmethod
    def mixed(self, v: PerParameter) -> list[Tensor | None]:
        r""":math:`(\partial g/\partial\lambda)^\top v` alone, for each tuned tensor of the loss, likewise."""
