"""Problems whose training optimum, hypergradient or unrolled recursion is known in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from torch_hypergrad import HyperOptimizer, Hyperparameter, Unrolled
from torch_hypergrad.methods import Method

FROZEN = partial(torch.optim.SGD, lr=0.0)
"""A hyper optimizer that changes nothing."""

REPLAY = Unrolled(memory=0)
"""Every step is taken again."""

SGD = partial(torch.optim.SGD, lr=0.1)


def mse(model: nn.Module, batch: Any) -> Tensor:
    """Mean squared error."""
    x, y = batch
    return (model(x) - y).square().mean()


def random_batch(num: int, width: int, seed: int, outputs: int = 1) -> tuple[Tensor, Tensor]:
    """Standard normal inputs and targets in float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(num, width, generator=generator, dtype=torch.float64)
    return x, torch.randn(num, outputs, generator=generator, dtype=torch.float64)


def tanh_mlp(seed: int = 0) -> nn.Module:
    """A small smooth network, 4-5-1, in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()


def wrapped(
    model: nn.Module, tune: Any, method: Method, optimizer: Any = SGD, **options: Any
) -> HyperOptimizer:
    """A HyperOptimizer on mean squared error whose values stay where they are."""
    loss = options.pop("train_loss", mse)
    return HyperOptimizer(model, optimizer(model.parameters()), loss, tune, method, FROZEN, **options)


@dataclass(frozen=True)
class Ridge:
    r"""Ridge regression with one decay for each feature.

    Training minimizes :math:`\tfrac1{2n}\|Xw - y\|^2 + \tfrac12 \sum_i \lambda_i w_i^2`, so
    :math:`(H + \Lambda) w^* = X^\top y / n` with :math:`H = X^\top X / n`, and for the validation loss
    :math:`L = \tfrac1{2m}\|X'w - y'\|^2`

    .. math:: dL/d\lambda_i = -w^*_i\, [(H + \Lambda)^{-1} \nabla L(w^*)]_i.
    """

    train: tuple[Tensor, Tensor]
    val: tuple[Tensor, Tensor]
    decay: Tensor

    @staticmethod
    def make(width: int = 6, seed: int = 0) -> Ridge:
        generator = torch.Generator().manual_seed(seed)
        decay = 0.1 + torch.rand(width, generator=generator, dtype=torch.float64)
        return Ridge(random_batch(20, width, seed + 1), random_batch(15, width, seed + 2), decay)

    @staticmethod
    def loss(model: nn.Module, batch: Any) -> Tensor:
        return mse(model, batch) / 2

    def matrix(self) -> Tensor:
        """:math:`H + \\Lambda`."""
        x, _ = self.train
        return x.T @ x / len(x) + self.decay.diag()

    def optimum(self) -> Tensor:
        """:math:`w^*`."""
        x, y = self.train
        return torch.linalg.solve(self.matrix(), x.T @ y / len(x))[:, 0]

    def val_gradient(self, w: Tensor) -> Tensor:
        """:math:`\\nabla L(w)`."""
        x, y = self.val
        return x.T @ (x @ w - y[:, 0]) / len(x)

    def hypergradient(self) -> Tensor:
        """:math:`dL/d\\lambda` at the optimum."""
        w = self.optimum()
        return -w * torch.linalg.solve(self.matrix(), self.val_gradient(w))

    def at_optimum(self, method: Method, per: str = "element", **options: Any) -> HyperOptimizer:
        """A HyperOptimizer whose weights are at the optimum (one step with rate 0 records the batch)."""
        model = nn.Linear(len(self.decay), 1, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(self.optimum())
        tune = [Hyperparameter("weight_decay", per=per, init=self.decay)]  # type: ignore[arg-type]
        optimizer = options.pop("optimizer", partial(torch.optim.SGD, lr=0.0))
        hyper = wrapped(model, tune, method, optimizer, train_loss=self.loss, **options)
        hyper.step(self.train)
        return hyper


@dataclass(frozen=True)
class GradientDescent:
    r"""Gradient descent on the quadratic :math:`\tfrac12 w^\top H w - c^\top w`, with its own recursion.

    .. math:: w_{t+1} = w_t - \eta (H w_t - c + \lambda w_t), \qquad
              \dot w_{t+1} = (I - \eta (H + \lambda)) \dot w_t - \dot\eta (H w_t - c + \lambda w_t)
              - \eta \dot\lambda w_t
    """

    hessian: Tensor
    c: Tensor
    start: Tensor
    target: Tensor

    @staticmethod
    def make(width: int = 4, seed: int = 0) -> GradientDescent:
        generator = torch.Generator().manual_seed(seed)
        a, c, start, target = torch.randn(4, width, width, generator=generator, dtype=torch.float64)
        return GradientDescent(
            a @ a.T / width + 0.1 * torch.eye(width, dtype=torch.float64), c[0], start[0], target[0]
        )

    def model(self) -> nn.Module:
        """Holds the vector w."""
        module = nn.Module()
        module.w = nn.Parameter(self.start.clone())
        return module

    def train_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return model.w @ self.hessian @ model.w / 2 - self.c @ model.w

    def val_loss(self, model: nn.Module, batch: Any) -> Tensor:
        return (model.w - self.target).square().sum() / 2

    def hypergradient(self, lr: float, weight_decay: float, num_steps: int) -> tuple[float, float]:
        """dL/d(lr) and dL/d(weight_decay) after ``num_steps``, by the recursion above."""
        w, by_lr, by_decay = self.start, torch.zeros_like(self.start), torch.zeros_like(self.start)
        matrix = self.hessian + weight_decay * torch.eye(len(w), dtype=w.dtype)
        for _ in range(num_steps):
            by_lr = by_lr - lr * matrix @ by_lr - (matrix @ w - self.c)
            by_decay = by_decay - lr * matrix @ by_decay - lr * w
            w = w - lr * (matrix @ w - self.c)
        error = w - self.target
        return float(error @ by_lr), float(error @ by_decay)


def logistic_regression(
    seed: int = 0, num: int = 60, width: int = 5
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training and validation batches for binary classification with labels 0 and 1 that overlap."""
    batches = []
    for part in range(2):
        x, noise = random_batch(num, width, seed + part)
        batches.append((x, (x[:, :1] + 0.5 * x[:, 1:2] + noise > 0).double()))
    return batches[0], batches[1]
