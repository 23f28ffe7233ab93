"""Muon, where torch has it (2.9 and later)."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .base import FRACTION, POSITIVE, RuleState, Settings, add_scaled, beside, lerp, register_update

NEWTON_SCHULZ_DTYPE = torch.bfloat16
"""torch.optim.Muon orthogonalizes in bfloat16, whatever the parameters are: derivatives have that precision
too."""

ANY = (-math.inf, math.inf)


def of_matrix(setting: float | Tensor) -> float | Tensor:
    """A setting that is one number for the whole matrix; tuned per tensor it comes repeated for each
    entry."""
    return setting.reshape(-1)[0] if isinstance(setting, Tensor) else setting


def orthogonalize(matrix: Tensor, settings: Settings) -> Tensor:
    """About ``U V^T`` of ``matrix = U S V^T``, by Newton-Schulz iterations (Jordan et al. 2024)."""
    a, b, c = map(of_matrix, settings["ns_coefficients"])
    eps = of_matrix(settings["eps"])
    wide = matrix.size(0) <= matrix.size(1)
    x = matrix.to(NEWTON_SCHULZ_DTYPE)
    x = x if wide else x.T
    norm = x.norm()
    x = x / torch.maximum(norm, beside(eps, norm))
    for _ in range(settings["ns_steps"]):
        gram = x @ x.T
        x = _addmm(x, _addmm(gram, gram, gram, b, c), x, a, 1)
    return x if wide else x.T


def _addmm(x: Tensor, a: Tensor, b: Tensor, beta: float | Tensor, alpha: float | Tensor) -> Tensor:
    if isinstance(beta, Tensor) or isinstance(alpha, Tensor):
        return (beta * x + alpha * (a @ b)).to(x.dtype)
    return torch.addmm(x, a, b, beta=beta, alpha=alpha)


def lr_ratio(shape: torch.Size, settings: Settings) -> float:
    """The factor on ``lr`` that makes steps alike for matrices of any shape."""
    rows, columns = shape
    match settings["adjust_lr_fn"]:
        case None | "original":
            return math.sqrt(max(1, rows / columns))
        case "match_rms_adamw":
            return 0.2 * math.sqrt(max(rows, columns))
        case "spectral_unclamped":
            return math.sqrt(rows / columns)
        case other:
            raise ValueError(f"adjust_lr_fn={other!r} has no update rule.")


def muon(param: Tensor, grad: Tensor, state: RuleState, settings: Settings) -> tuple[Tensor, RuleState]:
    """Momentum orthogonalized by Newton-Schulz (Jordan et al. 2024)."""
    lr, momentum = settings["lr"], settings["momentum"]
    buffer = lerp(state.get("momentum_buffer", torch.zeros_like(grad)), grad, 1 - momentum)
    direction = lerp(grad, buffer, momentum) if settings["nesterov"] else buffer
    direction = orthogonalize(direction, settings).to(param.dtype)
    param = param * (1 - lr * settings["weight_decay"])
    return add_scaled(param, direction, -lr * lr_ratio(param.shape, settings)), {"momentum_buffer": buffer}


if hasattr(torch.optim, "Muon"):
    register_update(
        torch.optim.Muon,
        {
            "lr": POSITIVE,
            "weight_decay": POSITIVE,
            "momentum": FRACTION,
            "eps": POSITIVE,
            **{f"ns_coefficients.{i}": ANY for i in range(3)},
        },
        elementwise=False,
        whole=("eps", *(f"ns_coefficients.{i}" for i in range(3))),
    )(muon)
