"""A machine with squared hinge loss and a Gaussian kernel that has a scale for each feature."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torch_hypergrad import HyperOptimizer


def identity(rows: Tensor) -> Tensor:
    """With as many rows, in the same precision."""
    return torch.eye(len(rows), dtype=rows.dtype)


class KernelMachine(nn.Module):
    """f(x) = k(x, rows) L^-T beta with L L^T = k(rows, rows), so that the norm of f is that of beta.

    Args:
        rows: those to train on, of shape ``(n, d)``.
        width: of the Gaussian, one number.
        scales: of the features, ``(d,)``.
    """

    def __init__(self, rows: Tensor, width: Tensor, scales: Tensor) -> None:
        super().__init__()
        self.rows, self.width, self.scales = rows, width, scales
        self.beta = nn.Parameter(rows.new_zeros(len(rows)))

    def kernel(self, rows: Tensor) -> Tensor:
        """exp(-|a - b|^2 / 2) of the scaled rows, plus 1, which stands for a bias."""
        a, b = (part * self.scales / self.width for part in (self.rows, rows))
        distances = a.square().sum(1, keepdim=True) + b.square().sum(1) - 2 * a @ b.T
        return torch.exp(-distances / 2) + 1

    def factor(self) -> Tensor:
        """L, of a matrix that is positive definite to rounding."""
        return torch.linalg.cholesky(self.kernel(self.rows) + 1e-8 * identity(self.rows))

    def forward(self, rows: Tensor) -> Tensor:
        return torch.linalg.solve_triangular(self.factor(), self.kernel(rows), upper=False).T @ self.beta


def squared_hinge(model: KernelMachine, labels: Tensor) -> Tensor:
    """Of the rows of the model."""
    return (1 - labels * (model.factor() @ model.beta)).clamp_min(0).square().mean()


def smoothed_error(model: KernelMachine, batch: tuple[Tensor, Tensor]) -> Tensor:
    """A smooth stand-in for the share of wrong signs (Keerthi, Sindhwani and Chapelle 2006)."""
    rows, labels = batch
    return torch.sigmoid(-2 * labels * model(rows)).mean()


def train(hyper: HyperOptimizer, labels: Tensor) -> None:
    """Newton steps until the rows inside of the margin stay the same (Keerthi and DeCoste 2005): there the
    loss is quadratic, so this is the optimum itself. Records the batch."""
    factor, beta = hyper.model.factor().detach(), hyper.model.beta.data
    decay = len(labels) / 2 * hyper.values()["weight_decay/group0"] * identity(factor)
    inside, before = labels * (factor @ beta) < 1, None
    while before is None or not torch.equal(inside, before):
        active = factor[inside]
        beta.copy_(torch.linalg.solve(active.T @ active + decay, active.T @ labels[inside]))
        inside, before = labels * (factor @ beta) < 1, inside
    hyper.record(labels)
