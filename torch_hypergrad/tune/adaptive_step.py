"""A hyper optimizer that finds its own step size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..solvers.base import check_number


class AdaptiveStep(Optimizer):
    r"""Gradient descent :math:`\lambda_{k+1} = \lambda_k - \eta \nabla f(\lambda_k)` whose step size follows
    the validation loss f, which is known to a tolerance alone. With d the length of the step from
    :math:`\lambda_{k-1}` to :math:`\lambda_k`, and :math:`\Delta` the change of f over it,

    - :math:`\Delta \le -d^2 / 2\eta`: the step size grows,
    - :math:`\Delta \le -d^2 / 4\eta`: it stays,
    - :math:`\Delta \le 0`: it shrinks, for steps nearly twice too long swing about the optimum,
    - else it shrinks, and the values go back to :math:`\lambda_{k-1}` (back-off). The next step begins there,
      with loss and gradient measured anew.

    Where :math:`|f(\lambda_k) - f(\lambda_{k-1})| \le slack\, (\epsilon_{k-1} + \epsilon_k)\,
    |f(\lambda_{k-1})|`, with tolerances :math:`\epsilon`, the difference may be all error, and

    .. math:: \Delta = \tfrac12\, (\nabla f(\lambda_{k-1}) + \nabla f(\lambda_k))^\top (\lambda_k -
              \lambda_{k-1})

    stands for it, whose error gets smaller with the step. A loss that is the same as before comes from
    weights that did not move, and lets nothing grow.

    For a hyper optimizer: ``HyperOptimizer(..., hyper_optimizer=AdaptiveStep)``. The tolerance is then the
    ``rtol`` of :meth:`HyperOptimizer.hyper_step`, 0 without one; the values are those of the leaves,
    logarithms with ``log=True``. Losses are to be comparable: on the same validation batch, after trainings
    that reached their optimum, or took as many steps from the same start.

    Args:
        params: the leaves.
        lr: the first step size. None makes the first step one of length 1 in all, or less.
        growth: what the step size is multiplied with when it grows.
        shrink: the same when it shrinks.
        slack: how large the error of a validation loss may be, relative to the loss and in units of the
            tolerance. 0 believes every loss.

    Raises:
        TypeError, ValueError: for numbers out of range, or several param groups.

    Source: Pedregosa 2016, section 5.1, for the rule, to which the third case was added; Hager and Zhang
    2005, section 4, for gradients in the place of differences that errors have eaten up.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float | None = None,
        growth: float = 1.5,
        shrink: float = 0.5,
        slack: float = 10.0,
    ) -> None:
        if lr is not None:
            check_number(lr, "AdaptiveStep: lr", positive=True)
        for name, value in (("growth", growth), ("shrink", shrink)):
            check_number(value, f"AdaptiveStep: {name}", positive=True)
        if not shrink < 1 < growth:
            raise ValueError(
                f"AdaptiveStep: growth must be above 1 and shrink below 1, got {growth} and {shrink}."
            )
        check_number(slack, "AdaptiveStep: slack", positive=False)
        options = {"lr": lr, "growth": growth, "shrink": shrink, "slack": slack}
        super().__init__(params, {**options, "loss": None, "tolerance": 0.0})
        if len(self.param_groups) != 1:
            raise ValueError(
                f"AdaptiveStep has one step size for all, got {len(self.param_groups)} param groups. Pass "
                "the tensors as one list."
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], float | Tensor] | None = None, tolerance: float = 0.0) -> Any:
        """One step from the present values, or back to those before the last step.

        Args:
            closure: gives the validation loss at the present values; nothing is computed again.
            tolerance: to which the inner problem and the linear system were solved there.

        Returns:
            The validation loss.

        Raises:
            TypeError, ValueError: without a closure, or for a tolerance below 0.
        """
        if closure is None:
            raise TypeError("AdaptiveStep follows the validation loss: call step(lambda: loss).")
        check_number(tolerance, "AdaptiveStep: tolerance", positive=False)
        loss, (group,) = float(closure()), self.param_groups
        if group["loss"] is not None:
            step = self._last_step()
            change, squared = self._change(loss, tolerance, step), _dot(step, step)
            if not change <= 0:
                self._go_back()
                return loss
            asked = squared / group["lr"]
            if change > -asked / 4:
                group["lr"] *= group["shrink"]
            elif change <= -asked / 2 < 0 and loss != group["loss"]:
                group["lr"] *= group["growth"]
        group["loss"], group["tolerance"] = loss, tolerance
        self._go_on()
        return loss

    def _last_step(self) -> list[Tensor]:
        """As it was, with projection onto bounds."""
        return [p - self.state[p]["before"] for p in self._leaves]

    def _change(self, loss: float, tolerance: float, step: Sequence[Tensor]) -> float:
        """Of the validation loss over the last step, as well as it is known."""
        (group,) = self.param_groups
        change = loss - group["loss"]
        error = group["slack"] * (group["tolerance"] + tolerance) * abs(group["loss"])
        if not abs(change) <= error:
            return change
        before = [self.state[p]["gradient"] for p in self._leaves]
        return (_dot(before, step) + _dot(self._gradients, step)) / 2

    def _go_back(self) -> None:
        (group,) = self.param_groups
        group["lr"] *= group["shrink"]
        group["loss"] = None  # it may have been an error to the good, which stops every step from there
        for p in self._leaves:
            p.copy_(self.state[p]["before"])

    def _go_on(self) -> None:
        (group,) = self.param_groups
        gradients = self._gradients
        if group["lr"] is None:
            group["lr"] = 1 / max(1.0, math.sqrt(_dot(gradients, gradients)))
        for p, gradient in zip(self._leaves, gradients):
            self.state[p] = {"before": p.clone(), "gradient": gradient.clone()}
            p.add_(gradient, alpha=-group["lr"])

    @property
    def _leaves(self) -> list[Tensor]:
        (group,) = self.param_groups
        return group["params"]

    @property
    def _gradients(self) -> list[Tensor]:
        return [torch.zeros_like(p) if p.grad is None else p.grad for p in self._leaves]


def _dot(these: Sequence[Tensor], those: Sequence[Tensor]) -> float:
    return sum(float((one * other).sum()) for one, other in zip(these, those))
