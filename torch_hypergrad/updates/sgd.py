"""SGD and ASGD."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import (
    POSITIVE,
    Settings,
    State,
    add_scaled,
    decayed,
    is_on,
    l2_stationarity,
    register_update,
    scalar_tensor,
    scalar_value,
)


@register_update(
    torch.optim.SGD,
    {"lr": POSITIVE, "momentum": POSITIVE, "dampening": POSITIVE, "weight_decay": POSITIVE},
    stationarity=l2_stationarity,
    moves_optimum=("weight_decay",),
)
def sgd(param: Tensor, grad: Tensor, state: State, settings: Settings) -> tuple[Tensor, State]:
    """Stochastic gradient descent (Robbins and Monro 1951) with momentum (Polyak 1964, Nesterov 1983)."""
    lr, momentum = settings["lr"], settings["momentum"]
    grad = decayed(grad, param, settings)
    if is_on(momentum):
        buffer = state.get("momentum_buffer")
        first = buffer is None
        buffer = grad.clone() if first else add_scaled(buffer * momentum, grad, 1 - settings["dampening"])
        state = {"momentum_buffer": buffer}
        grad = add_scaled(grad, buffer, momentum) if settings["nesterov"] else buffer
    return add_scaled(param, grad, -lr), state


def asgd_stationarity(param: Tensor, grad: Tensor, state: State, settings: Settings) -> Tensor:
    """``F = g + (weight_decay + lambd) * param``: ASGD has two decays."""
    return add_scaled(decayed(grad, param, settings), param, settings["lambd"])


@register_update(
    torch.optim.ASGD,
    {"lr": POSITIVE, "lambd": POSITIVE, "alpha": POSITIVE, "weight_decay": POSITIVE},
    stationarity=asgd_stationarity,
    moves_optimum=("weight_decay", "lambd"),
    scalars=("eta", "mu"),
)
def asgd(param: Tensor, grad: Tensor, state: State, settings: Settings) -> tuple[Tensor, State]:
    """Averaged SGD (Polyak and Juditsky 1992). ``t0`` moves the average ``ax`` alone, never the parameters."""
    lr, lambd = settings["lr"], settings["lambd"]
    step = state.get("step", 0) + 1
    grad = decayed(grad, param, settings)
    eta = scalar_value(state["eta"] if "eta" in state else scalar_tensor(lr, param), param)
    average = state.get("ax", torch.zeros_like(param))
    param = add_scaled(param * (1 - lambd * eta), grad, -eta)
    weight = scalar_tensor(1 / max(1, step - 1 - settings["t0"])).item()
    state = {
        "step": step,
        "eta": scalar_tensor(lr / ((1 + lambd * lr * step) ** settings["alpha"]), param),
        "mu": scalar_tensor(1 / max(1, step - settings["t0"]), param),
        "ax": param.clone() if weight == 1 else average + (param - average) * weight,
    }
    return param, state
