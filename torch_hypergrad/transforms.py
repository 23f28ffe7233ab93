"""Changes to gradients that hypergradients go through: for ``HyperOptimizer(grad_transform=)``."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor


def clip_grad_norm(max_norm: float) -> Callable[[list[Tensor]], list[Tensor]]:
    r"""Scales all gradients by one factor to a common norm of at most ``max_norm``:

    .. math:: g \mapsto \min\Big(1, \frac{c}{\lVert g \rVert + 10^{-6}}\Big)\, g.

    The numbers are those of :func:`torch.nn.utils.clip_grad_norm_`, which writes in place, and so cannot be
    differentiated: a hypergradient would lack what the factor depends on.

    Args:
        max_norm: c, positive and finite.

    Raises:
        ValueError: for another ``max_norm``.

    Source: Pascanu, Mikolov and Bengio 2013, section 3.2.
    """
    if not 0 < max_norm < math.inf:
        raise ValueError(
            f"max_norm must be positive and finite, got {max_norm}; to clip nothing, leave it out."
        )

    def clip(grads: list[Tensor]) -> list[Tensor]:
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(grad) for grad in grads]))
        factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
        return [grad * factor for grad in grads]

    return clip
