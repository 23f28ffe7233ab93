"""One weight decay for each feature of a linear regression, tuned by implicit hypergradients (Bengio 2000).

Training is solved to its optimum, the hypergradient is exact (a Cholesky factor), and a quasi-Newton method
follows it. The 10 features of scikit-learn's diabetes data with their products and squares make 65, of
variance 1 on the 150 training rows; 150 others validate, and 142 test. Errors are mean squares, with the
variance of the target over all rows as their unit. The rivals: no decay, and the best single one of a grid.

    python examples/bengio_ridge.py  # prints a table; a minute
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch
from jsonargparse import CLI
from jsonargparse.typing import PositiveFloat, PositiveInt
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from torch import Tensor, nn
from tqdm import tqdm

from command_line import spread, table
from common import Batch
from torch_hypergrad import Cholesky, HyperOptimizer, Hyperparameter, Implicit
from torch_hypergrad.bilevel import fit, minimize

GRID = np.logspace(-4, 2, 61)
NEARLY_NONE = 1e-8  # with none the optimum is not unique: sex has two values, and its square says the same


def read(seed: int) -> list[Batch]:
    """Training, validation and test rows, in a random order."""
    features, target = load_diabetes(return_X_y=True)
    products = PolynomialFeatures(2, include_bias=False).fit_transform(features)
    parts = np.split(np.random.RandomState(seed).permutation(len(target)), [150, 300])
    x = StandardScaler().fit(products[parts[0]]).transform(products)
    y = (target - target[parts[0]].mean()) / target.std()
    return [(torch.tensor(x[rows]), torch.tensor(y[rows])) for rows in parts]


def half_mse(model: nn.Module, batch: Batch) -> Tensor:
    """Half of it: then a weight decay is what ridge regression adds to the diagonal of X'X / n."""
    x, y = batch
    return (model(x)[:, 0] - y).square().mean() / 2


def ridge(decay: float, train: Batch) -> nn.Linear:
    """With one decay, by the normal equations."""
    x, y = train
    matrix = x.T @ x / len(y) + decay * torch.eye(65, dtype=x.dtype)
    model = nn.Linear(65, 1, bias=False)
    model.weight = nn.Parameter(torch.linalg.solve(matrix, x.T @ y / len(y))[None])
    return model


def tuned(start: float, train: Batch, val: Batch, evals: int) -> tuple[nn.Linear, int]:
    """With a decay for each feature, and how often it was trained."""
    model = ridge(start, train)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)  # makes no step: fit trains, with its decay
    tune = Hyperparameter("weight_decay", per="element", init=start, low=1e-5, high=1e4, log=True)
    hyper = HyperOptimizer(model, optimizer, half_mse, [tune], Implicit(Cholesky()), torch.optim.SGD)
    training = partial(fit, hyper, train, tol=1e-8, method="newton")
    return model, minimize(hyper, val, training, max_evals=evals, progress=False).nfev


def compare(seed: int, start: float, evals: int) -> dict[str, tuple[float, ...]]:
    """For each choice the number of values, that of trainings, and errors on validation and test rows."""
    train, val, test = read(seed)
    model, num_trainings = tuned(start, train, val, evals)
    best = min((ridge(decay, train) for decay in GRID), key=lambda one: half_mse(one, val))
    choices = {
        "none": (0, 1, ridge(NEARLY_NONE, train)),
        "one, best of a grid": (1, len(GRID), best),
        "one for each feature": (65, num_trainings, model),
    }
    return {
        name: (*counts, *(2 * half_mse(one, part).item() for part in (val, test)))
        for name, (*counts, one) in choices.items()
    }


def run(seeds: PositiveInt = 5, start: PositiveFloat = 1.0, evals: PositiveInt = 200) -> None:
    """See above; ``start`` is each decay at first, ``evals`` the most trainings of a search."""
    torch.set_num_threads(1)
    found = [compare(seed, start, evals) for seed in tqdm(range(seeds), unit="split")]
    rows = [[name, *map(spread, zip(*(one[name] for one in found)), (0, 0, 3, 3))] for name in found[0]]
    print(table(["weight decay", "values", "trainings", "validation error", "test error"], rows))


def main(argv: Sequence[str] | None = None) -> None:
    CLI(run, args=argv)


if __name__ == "__main__":
    main()
