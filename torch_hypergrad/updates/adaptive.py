"""Adaptive rates without Adam's moments: Adagrad, Adadelta, RMSprop."""

from __future__ import annotations

import torch
from torch import Tensor

from ..ground.autodiff import sqrt
from .base import (
    FRACTION,
    POSITIVE,
    RuleState,
    Settings,
    add_scaled,
    addcdiv,
    addcmul,
    decayed,
    is_on,
    l2_stationarity,
    lerp,
    register_update,
)


@register_update(
    torch.optim.Adagrad,
    {
        "lr": POSITIVE,
        "lr_decay": POSITIVE,
        "weight_decay": POSITIVE,
        "initial_accumulator_value": POSITIVE,
        "eps": POSITIVE,
    },
    stationarity=l2_stationarity,
    moves_optimum=("weight_decay",),
    preconditioner=lambda state, settings: sqrt(state["sum"]) + settings["eps"],
)
def adagrad(param: Tensor, grad: Tensor, state: RuleState, settings: Settings) -> tuple[Tensor, RuleState]:
    """Adagrad (Duchi, Hazan and Singer 2011)."""
    step = state.get("step", 0) + 1
    grad = decayed(grad, param, settings)
    start = settings["initial_accumulator_value"]
    from_start = step == 1 and (isinstance(start, Tensor) or "sum" not in state)
    total = torch.zeros_like(param) + start if from_start else state["sum"]
    total = addcmul(total, grad, grad, 1)
    rate = settings["lr"] / (1 + (step - 1) * settings["lr_decay"])
    return addcdiv(param, grad, sqrt(total) + settings["eps"], -rate), {"step": step, "sum": total}


@register_update(
    torch.optim.Adadelta,
    {"lr": POSITIVE, "rho": FRACTION, "eps": POSITIVE, "weight_decay": POSITIVE},
    stationarity=l2_stationarity,
    moves_optimum=("weight_decay",),
    preconditioner=lambda state, settings: sqrt(state["square_avg"] + settings["eps"]),
)
def adadelta(param: Tensor, grad: Tensor, state: RuleState, settings: Settings) -> tuple[Tensor, RuleState]:
    """Adadelta (Zeiler 2012)."""
    rho, eps = settings["rho"], settings["eps"]
    grad = decayed(grad, param, settings)
    zeros = torch.zeros_like(param)
    square_avg = addcmul(state.get("square_avg", zeros) * rho, grad, grad, 1 - rho)
    acc_delta = state.get("acc_delta", zeros)
    delta = sqrt(acc_delta + eps) / sqrt(square_avg + eps) * grad
    acc_delta = addcmul(acc_delta * rho, delta, delta, 1 - rho)
    new_state = {"step": state.get("step", 0) + 1, "square_avg": square_avg, "acc_delta": acc_delta}
    return add_scaled(param, delta, -settings["lr"]), new_state


def rmsprop_preconditioner(state: RuleState, settings: Settings) -> Tensor:
    """``sqrt(v) + eps``, where v of the centered form is the variance."""
    second_moment = state["square_avg"]
    if settings["centered"]:
        second_moment = (second_moment - state["grad_avg"].square()).clamp(min=0)
    return sqrt(second_moment) + settings["eps"]


@register_update(
    torch.optim.RMSprop,
    {"lr": POSITIVE, "alpha": FRACTION, "eps": POSITIVE, "weight_decay": POSITIVE, "momentum": POSITIVE},
    stationarity=l2_stationarity,
    moves_optimum=("weight_decay",),
    preconditioner=rmsprop_preconditioner,
)
def rmsprop(param: Tensor, grad: Tensor, state: RuleState, settings: Settings) -> tuple[Tensor, RuleState]:
    """RMSprop (Hinton 2012), also centered (Graves 2013) and with momentum."""
    lr, alpha, momentum = settings["lr"], settings["alpha"], settings["momentum"]
    grad = decayed(grad, param, settings)
    zeros = torch.zeros_like(param)
    square_avg = addcmul(state.get("square_avg", zeros) * alpha, grad, grad, 1 - alpha)
    new_state: RuleState = {"step": state.get("step", 0) + 1, "square_avg": square_avg}
    if settings["centered"]:
        grad_avg = lerp(state.get("grad_avg", zeros), grad, 1 - alpha)
        new_state["grad_avg"] = grad_avg
        square_avg = addcmul(square_avg, grad_avg, grad_avg, -1)
    denom = sqrt(square_avg) + settings["eps"]
    if is_on(momentum):
        buffer = addcdiv(state.get("momentum_buffer", zeros) * momentum, grad, denom, 1)
        new_state["momentum_buffer"] = buffer
        return add_scaled(param, buffer, -lr), new_state
    return addcdiv(param, grad, denom, -lr), new_state
