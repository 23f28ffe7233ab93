"""Adam and its family: AdamW, NAdam, RAdam, Adamax."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..ground.autodiff import sqrt
from .base import (
    FRACTION,
    POSITIVE,
    Pulled,
    RuleState,
    Settings,
    add_scaled,
    addcdiv,
    addcmul,
    adjoint_of,
    beside,
    decayed,
    is_on,
    l2_stationarity,
    lerp,
    register_update,
    scalar_tensor,
    scalar_value,
    signed,
)

TUNABLE = {
    "lr": POSITIVE,
    "betas.0": FRACTION,
    "betas.1": FRACTION,
    "eps": POSITIVE,
    "weight_decay": POSITIVE,
}


def decay(param: Tensor, grad: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Weight decay on the parameters (decoupled, Loshchilov and Hutter 2019) or on the gradient (L2)."""
    if not settings.get("decoupled_weight_decay", False):
        return param, decayed(grad, param, settings)
    if is_on(settings["weight_decay"]):
        param = param * (1 - settings["lr"] * settings["weight_decay"])
    return param, signed(grad, settings)


def moments(grad: Tensor, state: RuleState, settings: Settings) -> tuple[int, Tensor, Tensor]:
    """The step's number, and the running averages of the gradient and of its square."""
    beta1, beta2 = settings["betas"]
    exp_avg = state["exp_avg"] if "exp_avg" in state else torch.zeros_like(grad)
    exp_avg_sq = state["exp_avg_sq"] if "exp_avg_sq" in state else torch.zeros_like(grad)
    exp_avg = lerp(exp_avg, grad, 1 - beta1)
    exp_avg_sq = addcmul(exp_avg_sq * beta2, grad, grad, 1 - beta2)
    return state.get("step", 0) + 1, exp_avg, exp_avg_sq


def preconditioner(second_moment: Tensor, step: int, settings: Settings) -> Tensor:
    """``sqrt(v / (1 - beta2^t)) + eps``."""
    bias_correction2 = 1 - settings["betas"][1] ** step
    return sqrt(second_moment) / bias_correction2**0.5 + settings["eps"]


def adam_preconditioner(state: RuleState, settings: Settings) -> Tensor:
    """``sqrt(v / (1 - beta2^t)) + eps`` of the step taken last; with AMSGrad, of the largest v so far."""
    amsgrad = settings.get("amsgrad", False)
    return preconditioner(state["max_exp_avg_sq" if amsgrad else "exp_avg_sq"], state["step"], settings)


def decoupled_stationarity(param: Tensor, grad: Tensor, scale: Tensor | float, settings: Settings) -> Tensor:
    """``F = g + D * weight_decay * param``, with the preconditioner D frozen, which keeps dF/dparam
    symmetric."""
    return signed(grad, settings) + scale * settings["weight_decay"] * param


def adam_stationarity(param: Tensor, grad: Tensor, state: RuleState, settings: Settings) -> Tensor:
    """L2 decay: ``F = g + weight_decay * param``; decoupled decay: with the factor D = sqrt(v) + eps."""
    if not settings.get("decoupled_weight_decay", False):
        return l2_stationarity(param, grad, state, settings)
    return decoupled_stationarity(param, grad, adam_preconditioner(state, settings).detach(), settings)


def pull_adam(
    param: Tensor,
    grad: Tensor,
    state: RuleState,
    settings: Settings,
    adj_param: Tensor,
    adj_state: Mapping[str, Tensor],
) -> Pulled | None:
    """The vector-Jacobian product of :func:`adam` where neither ``betas`` nor ``eps`` is tuned, without
    AMSGrad."""
    lr, (beta1, beta2), weight_decay = settings["lr"], settings["betas"], settings["weight_decay"]
    if settings["amsgrad"] or any(isinstance(value, Tensor) for value in (beta1, beta2, settings["eps"])):
        return None
    _, decayed_grad = decay(param, grad, settings)
    step, exp_avg, exp_avg_sq = moments(decayed_grad, state, settings)
    root, bias_correction2 = exp_avg_sq.sqrt_(), (1 - beta2**step) ** 0.5
    denominator = torch.add(beside(settings["eps"], root), root, alpha=1 / bias_correction2)
    ratio, step_size = exp_avg / denominator, lr / (1 - beta1**step)
    scaled = adj_param / denominator  # the adjoint of the ratio is -step_size times this
    adj_avg = (
        add_scaled(adj_state["exp_avg"], scaled, -step_size)
        if "exp_avg" in adj_state
        else scaled * -step_size
    )
    # d denominator / d exp_avg_sq = 1 / (2 root bias_correction2), taken as 0 where the root is 0: see
    # autodiff.sqrt.
    slope = root.reciprocal_().nan_to_num_(nan=math.nan, posinf=0.0)
    adj_sq = add_scaled(
        adj_state.get("exp_avg_sq", beside(0.0, slope)),
        slope.mul_(ratio).mul_(scaled),
        step_size / (2 * bias_correction2),
    )
    adj_grad = torch.addcmul(adj_avg * (1 - beta1), adj_sq, decayed_grad, value=2 * (1 - beta2))
    adj_before = {"exp_avg": adj_avg * beta1, "exp_avg_sq": adj_sq * beta2} if "exp_avg" in state else {}
    decoupled = settings.get("decoupled_weight_decay", False)
    adj_settings = {}
    if isinstance(lr, Tensor):
        adj_settings["lr"] = -adjoint_of(lr, adj_param, ratio) / (1 - beta1**step)
        if decoupled and is_on(weight_decay):
            adj_settings["lr"] = adj_settings["lr"] - adjoint_of(lr, adj_param, weight_decay * param)
    if isinstance(weight_decay, Tensor):
        through = adj_param * -lr if decoupled else adj_grad
        adj_settings["weight_decay"] = adjoint_of(weight_decay, through, param)
    if is_on(weight_decay):
        adj_param = (
            adj_param * (1 - lr * weight_decay)
            if decoupled
            else add_scaled(adj_param, adj_grad, weight_decay)
        )
    return Pulled(adj_param, signed(adj_grad, settings), adj_before, adj_settings)


@register_update(
    torch.optim.Adam,
    TUNABLE,
    stationarity=adam_stationarity,
    moves_optimum=("weight_decay",),
    preconditioner=adam_preconditioner,
    pull=pull_adam,
)
def adam(param: Tensor, grad: Tensor, state: RuleState, settings: Settings) -> tuple[Tensor, RuleState]:
    """Adam (Kingma and Ba 2015) with AMSGrad (Reddi et al. 2018)."""
    param, grad = decay(param, grad, settings)
    step, exp_avg, exp_avg_sq = moments(grad, state, settings)
    new_state: RuleState = {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    second_moment = exp_avg_sq
    if settings["amsgrad"]:
        second_moment = torch.maximum(state.get("max_exp_avg_sq", torch.zeros_like(param)), exp_avg_sq)
        new_state["max_exp_avg_sq"] = second_moment
    step_size = settings["lr"] / (1 - settings["betas"][0] ** step)
    return addcdiv(param, exp_avg, preconditioner(second_moment, step, settings), -step_size), new_state


def adamw_stationarity(param: Tensor, grad: Tensor, state: RuleState, settings: Settings) -> Tensor:
    """``F = g + (sqrt(v) + eps) * weight_decay * param``."""
    return adam_stationarity(param, grad, state, {**settings, "decoupled_weight_decay": True})


def pull_adamw(
    param: Tensor,
    grad: Tensor,
    state: RuleState,
    settings: Settings,
    adj_param: Tensor,
    adj_state: Mapping[str, Tensor],
) -> Pulled | None:
    """The vector-Jacobian product of :func:`adamw`."""
    return pull_adam(param, grad, state, {**settings, "decoupled_weight_decay": True}, adj_param, adj_state)


@register_update(
    torch.optim.AdamW,
    TUNABLE,
    stationarity=adamw_stationarity,
    moves_optimum=("weight_decay",),
    preconditioner=adam_preconditioner,
    pull=pull_adamw,
)
def adamw(param: Tensor, grad: Tensor, state: RuleState, settings: Settings) -> tuple[Tensor, RuleState]:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019)."""
    return adam(param, grad, state, {**settings, "decoupled_weight_decay": True})


def nadam_momenta(step: int, settings: Settings) -> tuple[Tensor | float, Tensor | float]:
    """NAdam's schedule of beta1: its values at this step and at the next."""
    beta1, momentum_decay = settings["betas"][0], settings["momentum_decay"]
    now = beta1 * (1.0 - 0.5 * (0.96 ** (step * momentum_decay)))
    following = beta1 * (1.0 - 0.5 * (0.96 ** ((step + 1) * momentum_decay)))
    return now, following


def nadam_stationarity(param: Tensor, grad: Tensor, state: RuleState, settings: Settings) -> Tensor:
    """As Adam's, where D also holds the weights of gradient and momentum in one step at rest (``exp_avg =
    g``)."""
    if not settings["decoupled_weight_decay"]:
        return l2_stationarity(param, grad, state, settings)
    mu, mu_next = nadam_momenta(state["step"], settings)
    mu_product = scalar_value(state["mu_product"], param)
    at_rest = (1.0 - mu) / (1.0 - mu_product) + mu_next / (1.0 - mu_product * mu_next)
    scale = preconditioner(state["exp_avg_sq"], state["step"], settings) / at_rest
    return decoupled_stationarity(param, grad, scale.detach(), settings)


@register_update(
    torch.optim.NAdam,
    {**TUNABLE, "momentum_decay": POSITIVE},
    stationarity=nadam_stationarity,
    moves_optimum=("weight_decay",),
    scalars=("mu_product",),
    preconditioner=adam_preconditioner,
)
def nadam(param: Tensor, grad: Tensor, state: RuleState, settings: Settings) -> tuple[Tensor, RuleState]:
    """Adam with Nesterov momentum (Dozat 2016)."""
    lr = settings["lr"]
    param, grad = decay(param, grad, settings)
    step, exp_avg, exp_avg_sq = moments(grad, state, settings)
    mu, mu_next = nadam_momenta(step, settings)
    product = scalar_tensor((state["mu_product"] if "mu_product" in state else scalar_tensor(1.0)) * mu)
    mu_product = scalar_value(product, param)
    denom = sqrt(exp_avg_sq / (1 - settings["betas"][1] ** step)) + settings["eps"]
    param = addcdiv(param, grad, denom, -lr * (1.0 - mu) / (1.0 - mu_product))
    param = addcdiv(param, exp_avg, denom, -lr * mu_next / (1.0 - mu_product * mu_next))
    return param, {"step": step, "mu_product": product, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


def radam_factors(exp_avg_sq: Tensor, step: int, settings: Settings) -> tuple[Tensor | float, Tensor | float]:
    """RAdam's factors on the step: the adaptive rate and its rectification, both 1 while the variance is
    untractable."""
    beta2 = settings["betas"][1]
    bias_correction2 = 1 - beta2**step
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * step * beta2**step / bias_correction2
    rectified = rho > 5.0
    if not isinstance(rho, Tensor):
        if not rectified:
            return 1.0, 1.0
    else:
        rho = rho.masked_fill(~rectified, 6.0)
        rho_inf = rho_inf.masked_fill(~rectified, 6.0)
    rect = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
    adaptive = bias_correction2**0.5 / (sqrt(exp_avg_sq) + settings["eps"])
    if isinstance(rho, Tensor):
        return adaptive.masked_fill(~rectified, 1.0), rect.masked_fill(~rectified, 1.0)
    return adaptive, rect


def radam_stationarity(param: Tensor, grad: Tensor, state: RuleState, settings: Settings) -> Tensor:
    """As Adam's, with D the inverse of the rectified adaptive rate."""
    if not settings["decoupled_weight_decay"]:
        return l2_stationarity(param, grad, state, settings)
    adaptive, rect = radam_factors(state["exp_avg_sq"].detach(), state["step"], settings)
    return decoupled_stationarity(param, grad, 1 / (adaptive * rect), settings)


@register_update(
    torch.optim.RAdam,
    TUNABLE,
    stationarity=radam_stationarity,
    moves_optimum=("weight_decay",),
    preconditioner=adam_preconditioner,
)
def radam(param: Tensor, grad: Tensor, state: RuleState, settings: Settings) -> tuple[Tensor, RuleState]:
    """Adam with rectified variance (Liu et al. 2020)."""
    param, grad = decay(param, grad, settings)
    step, exp_avg, exp_avg_sq = moments(grad, state, settings)
    corrected = exp_avg / (1 - settings["betas"][0] ** step)
    adaptive, rect = radam_factors(exp_avg_sq, step, settings)
    param = param - corrected * settings["lr"] * adaptive * rect
    return param, {"step": step, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}


@register_update(
    torch.optim.Adamax,
    TUNABLE,
    stationarity=l2_stationarity,
    moves_optimum=("weight_decay",),
    preconditioner=lambda state, settings: state["exp_inf"],
)
def adamax(param: Tensor, grad: Tensor, state: RuleState, settings: Settings) -> tuple[Tensor, RuleState]:
    """Adam with the infinity norm (Kingma and Ba 2015, section 7)."""
    beta1, beta2 = settings["betas"]
    step = state.get("step", 0) + 1
    grad = decayed(grad, param, settings)
    zeros = torch.zeros_like(param)
    exp_avg = lerp(state.get("exp_avg", zeros), grad, 1 - beta1)
    exp_inf = torch.maximum(state.get("exp_inf", zeros) * beta2, grad.abs() + settings["eps"])
    step_size = settings["lr"] / (1 - beta1**step)
    return addcdiv(param, exp_avg, exp_inf, -step_size), {
        "step": step,
        "exp_avg": exp_avg,
        "exp_inf": exp_inf,
    }
