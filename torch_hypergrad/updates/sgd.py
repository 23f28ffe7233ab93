"""SGD and ASGD."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from .base import (
    POSITIVE,
    Pulled,
    RuleState,
    Settings,
    add_scaled,
    add_scaled_,
    adjoint_of,
    decayed,
    is_on,
    l2_stationarity,
    register_update,
    scalar_tensor,
    scalar_value,
    signed,
)


def direction(param: Tensor, grad: Tensor, state: RuleState, settings: Settings) -> tuple[Tensor, RuleState]:
    """What is subtracted from the parameters, ``lr`` times, and the state."""
    momentum = settings["momentum"]
    grad = decayed(grad, param, settings)
    if not is_on(momentum):
        return grad, state
    buffer, gain = state.get("momentum_buffer"), 1 - settings["dampening"]
    if buffer is None:
        buffer = grad.clone()
    elif (
        isinstance(settings["weight_decay"], Tensor)
        and not isinstance(gain, Tensor)
        and gain == 1
        and not settings["nesterov"]
    ):
        buffer = add_scaled_(grad, buffer, momentum)  # the decayed gradient is nobody else's: one pass less
    else:
        buffer = add_scaled_(buffer * momentum, grad, gain)
    return add_scaled(grad, buffer, momentum) if settings["nesterov"] else buffer, {"momentum_buffer": buffer}


def pull_sgd(
    param: Tensor,
    grad: Tensor,
    state: RuleState,
    settings: Settings,
    adj_param: Tensor,
    adj_state: Mapping[str, Tensor],
) -> Pulled | None:
    """The vector-Jacobian product of :func:`sgd` without Nesterov's momentum."""
    lr, momentum, weight_decay = settings["lr"], settings["momentum"], settings["weight_decay"]
    if settings["nesterov"] or isinstance(settings["dampening"], Tensor):
        return None
    buffer, adj_buffer = state.get("momentum_buffer"), adj_state.get("momentum_buffer")
    adj_settings, adj_before = {}, {}
    if isinstance(lr, Tensor):
        adj_settings["lr"] = -adjoint_of(lr, adj_param, direction(param, grad, state, settings)[0])
    adj_grad = adj_param * -lr if adj_buffer is None else add_scaled(adj_buffer, adj_param, -lr)
    if is_on(momentum) and buffer is not None:
        adj_before["momentum_buffer"] = adj_grad * momentum
        if isinstance(momentum, Tensor):
            adj_settings["momentum"] = adjoint_of(momentum, adj_grad, buffer)
        if settings["dampening"] != 0:
            adj_grad = adj_grad * (1 - settings["dampening"])
    elif isinstance(momentum, Tensor):
        adj_settings["momentum"] = torch.zeros_like(momentum)
    if isinstance(weight_decay, Tensor):
        adj_settings["weight_decay"] = adjoint_of(weight_decay, adj_grad, param)
    adj_param = add_scaled(adj_param, adj_grad, weight_decay) if is_on(weight_decay) else adj_param
    return Pulled(adj_param, signed(adj_grad, settings), adj_before, adj_settings)


def pull_sgd_reads(settings: Settings) -> Collection[str] | None:
    """A decay's derivative is the parameters, which are there anyway."""
    if settings["nesterov"] or isinstance(settings["dampening"], Tensor):
        return None
    if isinstance(settings["lr"], Tensor):
        return ("grad", "momentum_buffer")
    return ("momentum_buffer",) if isinstance(settings["momentum"], Tensor) else ()


@register_update(
    torch.optim.SGD,
    {"lr": POSITIVE, "momentum": POSITIVE, "dampening": POSITIVE, "weight_decay": POSITIVE},
    stationarity=l2_stationarity,
    moves_optimum=("weight_decay",),
    pull=pull_sgd,
    pull_reads=pull_sgd_reads,
)
def sgd(param: Tensor, grad: Tensor, state: RuleState, settings: Settings) -> tuple[Tensor, RuleState]:
    """Stochastic gradient descent (Robbins and Monro 1951) with momentum (Polyak 1964, Nesterov 1983)."""
    step, state = direction(param, grad, state, settings)
    return add_scaled(param, step, -settings["lr"]), state


def asgd_stationarity(param: Tensor, grad: Tensor, state: RuleState, settings: Settings) -> Tensor:
    """``F = g + (weight_decay + lambd) * param``: ASGD has two decays."""
    return add_scaled(decayed(grad, param, settings), param, settings["lambd"])


@register_update(
    torch.optim.ASGD,
    {"lr": POSITIVE, "lambd": POSITIVE, "alpha": POSITIVE, "weight_decay": POSITIVE},
    stationarity=asgd_stationarity,
    moves_optimum=("weight_decay", "lambd"),
    scalars=("eta", "mu"),
)
def asgd(param: Tensor, grad: Tensor, state: RuleState, settings: Settings) -> tuple[Tensor, RuleState]:
    """Averaged SGD (Polyak and Juditsky 1992). ``t0`` moves the average ``ax`` alone, never the
    parameters."""
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
