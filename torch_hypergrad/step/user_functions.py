"""The functions that users give, and what they may return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from torch import Tensor, nn

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
GradTransform: TypeAlias = Callable[[list[Tensor]], list[Tensor]]


def call_transform(grad_transform: GradTransform, grads: list[Tensor]) -> list[Tensor]:
    """What ``grad_transform`` returns for these gradients, which have graphs.

    Raises:
        TypeError: if it is no list of tensors.
        ValueError: if one has no graph, or another shape.
    """
    found = grad_transform(list(grads))
    if not isinstance(found, (list, tuple)) or not all(isinstance(g, Tensor) for g in found):
        raise TypeError(
            f"grad_transform must return a list of tensors, one for each gradient, got {found!r}."
        )
    if any(g.requires_grad and not t.requires_grad for g, t in zip(grads, found)):
        raise ValueError(
            "grad_transform returned a gradient without a graph, so its derivative would be lost. Leave out "
            ".detach(), .data and torch.no_grad(); to switch a gradient off, multiply it by 0."
        )
    if [g.shape for g in found] != [g.shape for g in grads]:
        raise ValueError(
            "grad_transform must return one gradient for each it was given, in the same shapes: it was given "
            f"{[tuple(g.shape) for g in grads]} and returned {[tuple(g.shape) for g in found]}."
        )
    return list(found)


def check_loss(loss: Any, name: str) -> None:
    """Refuses what cannot be differentiated.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if it is not a scalar, or has no graph.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{name}(model, batch) returned {type(loss).__name__}, expected a scalar tensor. Return the loss "
            "itself, not loss.item() or a tuple."
        )
    if loss.numel() != 1:
        raise ValueError(
            f"{name}(model, batch) returned a tensor of shape {tuple(loss.shape)}, expected a scalar. Reduce "
            "it with .mean() or .sum()."
        )
    if not loss.requires_grad:
        raise ValueError(
            f"{name}(model, batch) returned a tensor without a graph: nothing in it depends on a parameter "
            "that requires a gradient. Likely causes: .detach(), .item(), torch.no_grad() inside, or a "
            "model that is frozen as a whole."
        )
