"""A hyper optimizer that finds its own step size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class AdaptiveStep(Optimizer):
    r"""Gradient descent :math:`\lambda_{k+1} = \lambda_k - \eta_k \nabla f(\lambda_k)` whose step size
    follows the validation loss: after the step from :math:`\lambda_{k-1}` to :math:`\lambda_k` of length d,

    - :math:`f(\lambda_k) \le f(\lambda_{k-1}) - d^2 / 2\eta`: the step size grows,
    - :math:`f(\lambda_k) \le f(\lambda_{k-1}) + slack`: it stays,
    - else it shrinks, and the next step is taken from :math:`\lambda_{k-1}` once more (back-off).

    For a hyper optimizer: ``HyperOptimizer(..., hyper_optimizer=AdaptiveStep)``. The values are those of the
    leaves, logarithms with ``log=True``.

    Args:
        params: the leaves.
        lr: the first step size. None makes the first step one of length 1 in all, or less.
        growth: what the step size is multiplied with when it grows.
        shrink: the same when it shrinks.
        slack: by how much the validation loss may rise because it is not exact, relative to itself.

    Raises:
        TypeError, ValueError: for numbers out of range, or several param groups.

    Source: Pedregosa 2016, section 5.1. His code compares the length of the step after it has overwritten the
    values before it, so that it is always 0, and takes no step back.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float | None = None,
        growth: float = 1.5,
        shrink: float = 0.5,
        slack: float = 0.0,
    ) -> None:
        for name, value, low, high in (
            ("lr", lr, 0.0, math.inf),
            ("growth", growth, 1.0, math.inf),
            ("shrink", shrink, 0.0, 1.0),
        ):
            if value is not None and not low < value < high:
                raise ValueError(
                    f"AdaptiveStep: {name} must be above {low:g} and below {high:g}, got {value}."
                )
        if not slack >= 0:
            raise ValueError(f"AdaptiveStep: slack must be at least 0, got {slack}.")
        super().__init__(params, {"lr": lr, "growth": growth, "shrink": shrink, "slack": slack, "loss": None})
        if len(self.param_groups) != 1:
            raise ValueError(
                f"AdaptiveStep has one step size for all, got {len(self.param_groups)} param groups. Pass "
                "the tensors as one list."
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], float | Tensor] | None = None) -> Any:
        """One step, from the gradients at the present values.

        Args:
            closure: gives the validation loss there; nothing is computed again.

        Raises:
            TypeError: without one.
        """
        if closure is None:
            raise TypeError("AdaptiveStep follows the validation loss: call step(lambda: loss).")
        loss, (group,) = float(closure()), self.param_groups
        leaves = [p for p in group["params"] if p.grad is not None]
        if group["lr"] is None:
            length = math.sqrt(sum(float(p.grad.square().sum()) for p in leaves))
            group["lr"] = min(1.0, 1 / length) if length > 0 else 1.0
        if group["loss"] is not None and not self._accepts(loss, leaves):
            group["lr"] *= group["shrink"]
            for p in leaves:
                p.copy_(self.state[p]["before"])
        else:
            group["loss"] = loss
            for p in leaves:
                self.state[p] = {"before": p.clone(), "grad": p.grad.clone()}
        for p in leaves:
            p.add_(self.state[p]["grad"], alpha=-group["lr"])
        return loss

    def _accepts(self, loss: float, leaves: list[Tensor]) -> bool:
        """Whether the last step was good enough to go on from; one that was better makes the steps larger."""
        (group,) = self.param_groups
        before, slack = group["loss"], group["slack"] * abs(group["loss"])
        squared = sum(float((p - self.state[p]["before"]).square().sum()) for p in leaves)
        if loss <= before - squared / (2 * group["lr"]) + slack:
            group["lr"] *= group["growth"]
        return loss <= before + slack
