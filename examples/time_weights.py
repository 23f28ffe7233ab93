"""How much of the past to learn from, where the world drifts: weights of past months, tuned (Bengio 2000).

The size of the market's monthly return r since 1926, log(r^2 + 1), is forecast by a linear regression on a
constant and its last values, refit every six months on all months before. These weigh sigmoid((c - age) / s),
with c and s in years, tuned for the forecasts of months 360 to 720; later ones test. All refits are one
parameter of shape (refits, features), and the Hessian of their summed loss has a block for each.

    python examples/time_weights.py

It prints a table of mean squared errors; a minute. Needs the package arch, for its data.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from arch.data import frenchdata
from jsonargparse import CLI
from jsonargparse.typing import PositiveInt
from torch import Tensor, nn

from command_line import table
from torch_hypergrad import Cholesky, HyperOptimizer, Hyperparameter, Implicit
from torch_hypergrad.bilevel import fit, minimize

Weights = tuple[float, float]

EVERY, FIRST = 6, 360
VAL, TEST = torch.arange(360, 720, EVERY), torch.arange(720, 1109, EVERY)
STARTS = ((10.0, 2.0), (20.0, 5.0), (0.0, 8.0))
UNWEIGHTED = (100.0, 0.1)  # weighs all months alike


class Series:
    """Forecasts of ``y`` from a constant and its last ``num_lags`` values, scaled by the first 360 months."""

    def __init__(self, y: Tensor, num_lags: int) -> None:
        z, self.y, self.num_lags = (y - y[:FIRST].mean()) / y[:FIRST].std(), y, num_lags
        lags = [torch.cat([z[:lag] * 0, z[:-lag]]) for lag in range(1, num_lags + 1)]
        self.x, self.months = torch.stack([torch.ones_like(y), *lags], 1), torch.arange(len(y)).to(y)

    def train_loss(self, c: Tensor, s: Tensor, model: nn.Module, refits: Tensor) -> Tensor:
        age = refits[:, None] - self.months
        is_past = (age > 0) & (self.months >= self.num_lags)
        shares = F.logsigmoid((c - age / 12) / s).where(is_past, -torch.inf).softmax(1)
        return ((model.weight @ self.x.T - self.y).square() * shares).sum()

    def val_loss(self, model: nn.Module, refits: Tensor) -> Tensor:
        age = refits[:, None] - self.months
        is_next = (age <= 0) & (age > -EVERY)
        return (model.weight @ self.x.T - self.y)[is_next].square().mean()

    def problem(self, refits: Tensor, at: Weights) -> tuple[HyperOptimizer, partial]:
        """All refits as one model, and what trains it."""
        c, s = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in at)
        model = nn.Linear(1 + self.num_lags, len(refits), bias=False).double()  # a row for each refit
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # makes no step
        tune = [Hyperparameter.of(c, "c", low=-50.0, high=100.0)]
        tune += [Hyperparameter.of(s, "s", low=1 / 12, high=100.0, log=True)]
        method, loss = Implicit(Cholesky(blocks=len(refits))), partial(self.train_loss, c, s)
        hyper = HyperOptimizer(model, optimizer, loss, tune, method, torch.optim.SGD, val_loss=self.val_loss)
        return hyper, partial(fit, hyper, refits, tol=1e-9, method="cg-newton")

    def error(self, refits: Tensor, at: Weights) -> float:
        hyper, train = self.problem(refits, at)
        train()
        return hyper.validation_loss(refits).item()

    def tuned(self, start: Weights, evals: int) -> tuple[float, Weights]:
        """The validation error, and c and s."""
        hyper, train = self.problem(VAL, start)
        found = minimize(hyper, VAL, train, max_evals=evals, options={"gtol": 1e-7}, progress=False)
        return found.fun, tuple(value.item() for value in found.hyperparameters.values())


def run(lags: tuple[int, ...] = (0, 1, 2, 12), evals: PositiveInt = 60) -> None:
    """See above; ``lags`` are numbers of last values, ``evals`` the most trainings of a search."""
    torch.set_num_threads(1)
    r = torch.tensor(frenchdata.load()["Mkt-RF"].to_numpy())
    rows = []
    for series in [Series((r.square() + 1).log(), num_lags) for num_lags in lags]:
        _, at = min(series.tuned(start, evals) for start in STARTS)
        errors = [series.error(refits, weights) for refits in (VAL, TEST) for weights in (UNWEIGHTED, at)]
        rows.append([series.num_lags, *(f"{error:.3f}" for error in errors), *(f"{year:.2f}" for year in at)])
    headers = ["last values", "validation", "weighted", "test", "weighted", "c (years)", "s (years)"]
    print(table(headers, rows))


def main(argv: Sequence[str] | None = None) -> None:
    CLI(run, args=argv)


if __name__ == "__main__":
    main()
