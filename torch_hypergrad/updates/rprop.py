"""Rprop."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import POSITIVE, RuleState, Settings, addcmul, beside, register_update, signed


@register_update(
    torch.optim.Rprop,
    {
        "lr": POSITIVE,
        "etas.0": (0.0, 1.0),
        "etas.1": (1.0, float("inf")),
        "step_sizes.0": POSITIVE,
        "step_sizes.1": POSITIVE,
    },
    stationarity=lambda param, grad, state, settings: signed(grad, settings),
)
def rprop(param: Tensor, grad: Tensor, state: RuleState, settings: Settings) -> tuple[Tensor, RuleState]:
    """Resilient backpropagation (Riedmiller and Braun 1993): only the signs of the gradient count."""
    numbers = (*settings["etas"], *settings["step_sizes"])
    shrink, grow, smallest, largest = (beside(s, param) for s in numbers)
    grad = signed(grad, settings)
    first = state.get("step", 0) == 0
    step_size = torch.zeros_like(param) + settings["lr"] if first else state["step_size"]
    agreement = torch.zeros_like(grad) if first else grad * state["prev"]
    factor = torch.where(agreement > 0, grow, torch.where(agreement < 0, shrink, beside(1.0, param)))
    step_size = torch.minimum(torch.maximum(step_size * factor, smallest), largest)
    grad = grad.masked_fill(agreement < 0, 0.0)
    new_state = {"step": state.get("step", 0) + 1, "prev": grad, "step_size": step_size}
    return addcmul(param, grad.sign(), step_size, -1), new_state
