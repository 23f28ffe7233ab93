"""A kernel machine whose regularization and widths follow a smoothed error over five folds.

As in Keerthi, Sindhwani and Chapelle 2006: squared hinge, Gaussian kernel, and validation by sigmoid(-2 y f).
First the regularization and one width for all features of scikit-learn's breast cancer are tuned, by a grid
and by hypergradients; then a scale for each feature too. What is best on the folds need not be best on new
rows: the last two columns are the test.

    python examples/smoothed_svm.py
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import jsonargparse
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.optim import SGD

from command_line import table
from kernel_machine import KernelMachine, smoothed_error, squared_hinge, train
from torch_hypergrad import Cholesky, HyperOptimizer, Hyperparameter, Implicit
from torch_hypergrad.bilevel import CrossValidation, minimize, stratified_folds

Values = dict[str, Tensor]


def compare(seed: int, num_rows: int, side: int, evals: int) -> list[list[object]]:
    """A line for each way of tuning."""
    x, y = map(torch.tensor, load_breast_cancer(return_X_y=True))
    split = train_test_split(x, 2 * y.double() - 1, train_size=num_rows, stratify=y, random_state=seed)
    (x, test_x), (y, test_y) = ((part - split[0].mean(0)) / split[0].std(0) for part in split[:2]), split[2:]
    width, scales = x.new_tensor(5.0).requires_grad_(), x.new_ones(30).requires_grad_()
    tune = [Hyperparameter("weight_decay", init=1e-2, low=1e-6, high=1.0, log=True)]
    tune.append(Hyperparameter.of(width, "width", low=1.0, high=100.0, log=True))
    tune.append(Hyperparameter.of(scales, "scales", low=0.01, high=100.0, log=True))
    splits = stratified_folds(y, 5, seed)
    held_out, lines = [(x[left], y[left]) for _, left in splits], []

    def make(chosen: Sequence[int] | Tensor, num: int) -> HyperOptimizer:
        model, method = KernelMachine(x[chosen], width, scales), Implicit(Cholesky())
        given = model, SGD(model.parameters()), squared_hinge, tune[:num], method, SGD
        return HyperOptimizer(*given, val_loss=smoothed_error)

    def solve(folds: CrossValidation) -> None:
        for fold, (chosen, _) in zip(folds.folds, splits):
            train(fold, y[chosen])

    def error_at(values: Values) -> float:
        two.set_values(values)
        solve(two)
        return two.validation_loss(held_out).item()

    def add_line(name: str, cost: int, loss: float, values: Values) -> None:
        whole = make(range(num_rows), 3)
        whole.set_values({"scales": torch.ones(30), **values})
        train(whole, y)
        smooth, wrong = whole.validation_loss((test_x, test_y)), whole.model(test_x).sign() != test_y
        share = f"{100 * wrong.double().mean():.1f}"
        lines.append([f"{name}, seed {seed}", cost, f"{loss:.4f}", f"{smooth:.4f}", share])

    two, many = (CrossValidation([make(chosen, num) for chosen, _ in splits], SGD) for num in (2, 3))
    values = two.values()
    ranges = (torch.logspace(start, end, side, dtype=x.dtype) for start, end in ((-6, 0), (0, 2)))
    grid = [dict(zip(values, pair)) for pair in product(*ranges)]
    best = min(grid, key=error_at)
    add_line("2 by a grid", len(grid), error_at(best), best)
    for folds, count in ((two, evals), (many, 4 * evals)):
        folds.set_values({"scales": torch.ones(30), **values} if folds is many else values)
        found = minimize(folds, held_out, lambda folds=folds: solve(folds), max_evals=count)
        values = found.hyperparameters
        add_line(f"{len(found.x)} by hypergradients", found.nfev, found.fun, values)
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    parser = jsonargparse.ArgumentParser(description=__doc__)
    for name, default in (("num-rows", 200), ("side-of-grid", 9), ("evals", 15)):
        parser.add_argument(f"--{name}", type=PositiveInt, default=default)
    parser.add_argument("--seed", type=NonNegativeInt, default=0)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    lines = compare(args.seed, args.num_rows, args.side_of_grid, args.evals)
    print("\n" + table(["tuned", "trainings", "smoothed error, folds", "test", "wrong (%)"], lines))


if __name__ == "__main__":
    main()
