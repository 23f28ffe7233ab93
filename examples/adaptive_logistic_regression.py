"""Logistic regression with a decay for each group of features, tuned over folds.

As in Do, Foo and Ng 2007. Training has 200 rows of scikit-learn's breast cancer; next to the 30 features
lie 90 probes, the same columns with their rows in random order. One decay is a compromise; two, one for
features and one for probes, find out that probes say nothing. The last line has no probes and a decay for
each of the 30 features, as a warning: these fit the folds, and not new rows.

    python examples/adaptive_logistic_regression.py
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import jsonargparse
import torch
import torch.nn.functional as F
from jsonargparse.typing import PositiveInt
from sklearn.datasets import load_breast_cancer
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

from command_line import table
from torch_hypergrad import Cholesky, HyperOptimizer, Hyperparameter, Implicit
from torch_hypergrad.bilevel import CrossValidation, fit, minimize, stratified_folds

Batch = tuple[Tensor, Tensor]
NUM_FEATURES, TOL = 30, 1e-6
decay = partial(Hyperparameter, "weight_decay", groups=[0], init=0.1, low=1e-5, high=10.0, log=True)


def load(seed: int, copies: int, num_rows: int) -> tuple[Batch, Batch]:
    """Rows for training and for the test; after the features come ``copies`` probes of each."""
    rows, labels = load_breast_cancer(return_X_y=True)
    rows, generator = torch.tensor(rows), torch.Generator().manual_seed(seed)
    for _ in range(copies * NUM_FEATURES):
        column = rows[:, rows.shape[1] % NUM_FEATURES]
        rows = torch.cat([rows, column[torch.randperm(len(rows), generator=generator), None]], dim=1)
    split = train_test_split(rows, labels, train_size=num_rows, stratify=labels, random_state=seed)
    train, test = ((part - split[0].mean(0)) / split[0].std(0) for part in split[:2])
    return (train, torch.tensor(split[2]).double()), (test, torch.tensor(split[3]).double())


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    rows, labels = batch
    return F.binary_cross_entropy_with_logits(model(rows)[:, 0], labels)


def make(width: int, tune: Hyperparameter) -> HyperOptimizer:
    model = nn.Linear(width, 1, dtype=torch.float64)
    nn.init.zeros_(model.weight)
    optimizer = torch.optim.SGD([{"params": [model.weight]}, {"params": [model.bias]}])
    return HyperOptimizer(model, optimizer, loss_of, [tune], Implicit(Cholesky()), torch.optim.SGD)


def tuned(
    train: Batch, test: Batch, tune: Hyperparameter, seed: int, num_folds: int, evals: int
) -> list[object]:
    """Hypergradients taken, decays, and mean loss over the folds; the test loss after training on all."""
    (rows, labels), width = train, train[0].shape[1]
    splits = stratified_folds(labels, num_folds, seed)
    batches, val_batches = zip(*[[(rows[i], labels[i]) for i in split] for split in splits])
    folds = CrossValidation([make(width, tune) for _ in splits], torch.optim.SGD)

    def solve() -> None:
        for fold, batch in zip(folds.folds, batches):
            fit(fold, batch, tol=TOL, method="cg-newton")

    found = minimize(folds, val_batches, solve, max_evals=evals)
    whole = make(width, tune)
    whole.set_values(found.hyperparameters)
    fit(whole, train, tol=TOL, method="cg-newton")
    decays = torch.cat([value.reshape(-1) for value in found.hyperparameters.values()])
    shown = " / ".join(f"{value:.2g}" for value in decays) if len(decays) < 3 else f"{len(decays)} values"
    return [found.nfev, shown, f"{found.fun:.3f}", f"{whole.validation_loss(test).item():.3f}"]


def main(argv: Sequence[str] | None = None) -> None:
    parser = jsonargparse.ArgumentParser(description=__doc__)
    for name, default in (("seeds", 3), ("num-rows", 200), ("folds", 5), ("evals", 15)):
        parser.add_argument(f"--{name}", type=PositiveInt, default=default)
    args, lines = parser.parse_args(argv), []
    torch.set_num_threads(1)
    labels = {"weight": (torch.arange(4 * NUM_FEATURES) >= NUM_FEATURES).long()}
    for seed in range(args.seeds):
        for name, copies, tune, evals in (
            ("90 probes, one decay", 3, decay(), args.evals),
            ("90 probes, two decays", 3, decay(per="label", labels=labels), args.evals),
            ("no probes, one decay", 0, decay(), args.evals),
            ("no probes, 30 decays", 0, decay(per="element"), 2 * args.evals),
        ):
            result = tuned(*load(seed, copies, args.num_rows), tune, seed, args.folds, evals)
            lines.append([f"{name}, seed {seed}", *result])
    print("\n" + table(["", "hypergradients", "decay", "loss over folds", "test loss"], lines))


if __name__ == "__main__":
    main()
