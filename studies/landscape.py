"""Every searcher and the hypergradient on one problem, as the number of values to tune grows.

    python -m studies.landscape [--seeds 5] [--evals 60] [--values 1 10 65] [--searchers tpe gp ...]

Ridge regression on scikit-learn's diabetes with all quadratic features (65), 150 rows to train on, 150 to
validate, 142 to test, drawn anew for each seed. Tuned is one decay, one for each of ten groups of features
(those that begin with the same variable), or one for each feature, between 1e-4 and 1e3 on a log scale. An
evaluation is one training and its validation loss; that of a hypergradient counts as two, as it solves once
more with the same matrix. It draws landscape_ridge.png in the folder --out, docs/results if not given, and
prints the table of landscape.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import optuna
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_diabetes
from sklearn.preprocessing import PolynomialFeatures, StandardScaler
from tabulate import tabulate
from torch import Tensor, nn

from torch_hypergrad import Cholesky, HyperOptimizer, Hyperparameter, Implicit
from torch_hypergrad.bilevel import fit, minimize
from torch_hypergrad.search import create_study, make_sampler

LOW, HIGH, START = 1e-4, 1e3, 1.0
SEARCHERS = (
    "grid",
    "random",
    "tpe",
    "gp",
    "cmaes",
    "nsga2",
    "simulated_annealing",
    "particle_swarm",
    "coordinate_descent",
    "reinforce",
)
HYPERGRADIENT = "hypergradient"

Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Ridge:
    """Rows of standardized features and targets; ``labels`` says which decay a feature has."""

    train: Rows
    val: Rows
    test: Rows
    labels: Tensor

    @staticmethod
    def make(seed: int, num_values: int) -> Ridge:
        """The problem with 1, 10 or 65 decays."""
        x, y = load_diabetes(return_X_y=True)
        powers = PolynomialFeatures(2, include_bias=False).fit(x)
        order = np.random.RandomState(seed).permutation(len(x))
        parts = order[:150], order[150:300], order[300:]
        features = powers.transform(x)
        features = StandardScaler().fit(features[parts[0]]).transform(features)
        target = (y - y[parts[0]].mean()) / y.std()
        rows = [(torch.tensor(features[part]), torch.tensor(target[part])[:, None]) for part in parts]
        first = torch.tensor((powers.powers_ > 0).argmax(1))
        labels = {1: torch.zeros_like(first), 10: first, 65: torch.arange(65)}[num_values]
        return Ridge(*rows, labels)

    def loss(self, decays: Tensor, rows: Rows) -> float:
        """The mean squared error on rows after training, in closed form."""
        (x, y), (x_other, y_other) = self.train, rows
        matrix = 2 * x.T @ x / len(x) + decays[self.labels].diag()
        w = torch.linalg.solve(matrix, 2 * x.T @ y / len(x))
        return (x_other @ w - y_other).square().mean().item()


@dataclass(frozen=True)
class Run:
    """Validation losses in the order of evaluation, what each had cost by then; the test loss at the best."""

    costs: list[float]
    losses: list[float]
    test: float


def searched(problem: Ridge, sampler: str, num_values: int, seed: int, evals: int) -> Run:
    """By one of the searchers."""
    space = {f"decay{i}": {"type": "float", "low": LOW, "high": HIGH, "log": True} for i in range(num_values)}
    options = {"points": evals} if sampler == "grid" else {}
    study = create_study(space, sampler=make_sampler(sampler, space, seed=seed, **options))

    def decays_of(values: dict[str, float]) -> Tensor:
        return torch.tensor([values[name] for name in space], dtype=torch.float64)

    def objective(trial: optuna.Trial) -> float:
        values = {name: trial.suggest_float(name, LOW, HIGH, log=True) for name in space}
        return problem.loss(decays_of(values), problem.val)

    study.optimize(objective, n_trials=evals)
    losses = [trial.value for trial in study.trials if trial.value is not None]
    return Run(
        [float(n) for n in range(1, len(losses) + 1)],
        losses,
        problem.loss(decays_of(study.best_params), problem.test),
    )


def by_hypergradient(problem: Ridge, num_values: int, seed: int, evals: int) -> Run:
    """By scipy's L-BFGS-B on implicit hypergradients, within the same cost."""
    model = nn.Linear(65, 1, bias=False).double()
    tune = Hyperparameter(
        "weight_decay",
        per="label",
        labels={"weight": problem.labels},
        init=START,
        low=LOW,
        high=HIGH,
        log=True,
    )
    hyper = HyperOptimizer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, rows: (model(rows[0]) - rows[1]).square().mean(),
        [tune],
        Implicit(Cholesky()),
        torch.optim.SGD,
    )
    losses: list[float] = []
    found = minimize(
        hyper,
        problem.val,
        lambda: fit(hyper, problem.train, tol=1e-8, method="newton"),
        max_evals=evals // 2,
        callback=lambda evaluation, values: losses.append(evaluation.val_loss),
        progress=False,
    )
    (decays,) = found.hyperparameters.values()
    return Run([2.0 * n for n in range(1, len(losses) + 1)], losses, problem.loss(decays, problem.test))


def best_at(run: Run, cost: float) -> float:
    """The lowest validation loss within a cost."""
    within = [loss for c, loss in zip(run.costs, run.losses) if c <= cost]
    return min(within) if within else float("inf")


def runs_of(num_values: int, seeds: int, evals: int, searchers: Sequence[str]) -> dict[str, list[Run]]:
    """Of each searcher one for each seed; a grid alone where it has a point for each evaluation."""
    problems = [Ridge.make(seed, num_values) for seed in range(seeds)]
    found = {}
    for name in (*searchers, HYPERGRADIENT):
        if name == "grid" and num_values > 1:
            continue
        search = by_hypergradient if name == HYPERGRADIENT else partial(searched, sampler=name)
        began = time.perf_counter()
        found[name] = [
            search(problem, num_values=num_values, seed=seed, evals=evals)
            for seed, problem in enumerate(problems)
        ]
        print(f"{num_values} values, {name}: {time.perf_counter() - began:.0f} s", flush=True)
    return found


Found = dict[str, dict[str, list[Run]]]
"""Runs by problem and searcher."""


def draw(found: Found, budget: int, unit: str, path: Path) -> None:
    """Medians of the best so far against cost."""
    figure = Figure(figsize=(13, 4.8), layout="constrained")
    costs = np.linspace(0, budget, 241)
    for axes, (title, runs) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items()):
        lowest, highest = np.inf, 0.0
        for name, of_seeds in runs.items():
            medians = np.array([median(best_at(run, cost) for run in of_seeds) for cost in costs])
            lowest, highest = min(lowest, medians[-1]), max(highest, medians[-1])
            axes.step(costs, medians, where="post", label=name.replace("_", " "), **line_of(name))
        axes.set(
            title=title, xlabel=f"cost ({unit})", ylim=(lowest - 0.02, lowest + 2 * (highest - lowest) + 0.02)
        )
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("validation loss, best so far (median)")
    handles = {label: line for axes in figure.axes for line, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=6, fontsize=9)
    figure.savefig(path, dpi=110)


def line_of(name: str) -> dict[str, Any]:
    """Hypergradients are black, pruned searches broken."""
    if name.startswith(HYPERGRADIENT):
        return {"color": "black", "linewidth": 2.5, "linestyle": "--" if "implicit" in name else "-"}
    sampler, _, pruner = name.partition(" + ")
    style = {"": "-", "asha": "--", "hyperband": ":"}.get(pruner, "-.")
    return {"color": f"C{SEARCHERS.index(sampler)}", "linewidth": 1.2, "linestyle": style}


def table(found: Found, early: float, budget: float) -> str:
    """Medians of the best validation losses within two costs, and of the test loss where the last one is."""
    columns: list[tuple[str, Callable[[Run], float]]] = [
        (f"after {early:g}", lambda run: best_at(run, early)),
        (f"after {budget:g}", lambda run: best_at(run, budget)),
        ("test", lambda run: run.test),
    ]
    rows = []
    for name in dict.fromkeys(name for runs in found.values() for name in runs):
        row = [name.replace("_", " ")]
        for runs in found.values():
            of_seeds = runs.get(name, [])
            row += [f"{median(map(what, of_seeds)):.3f}" if of_seeds else "" for _, what in columns]
        rows.append(row)
    headers = ["", *(f"{title}: {what}" for title in found for what, _ in columns)]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True)


def begin(doc: str | None, seeds: int, **numbers: dict[str, Any]) -> argparse.Namespace:
    """What the command line says: what such studies share, and numbers of their own, with their options."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, options in {"seeds": {"default": seeds}, **numbers}.items():
        parser.add_argument(f"--{name}", type=int, **options)
    parser.add_argument("--searchers", nargs="+", default=list(SEARCHERS), choices=SEARCHERS)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    torch.set_num_threads(1)
    return parser.parse_args()


def several(*choices: int) -> dict[str, Any]:
    """Options of numbers that are all taken, if nothing is said."""
    return {"nargs": "+", "default": list(choices), "choices": choices}


def main() -> None:
    """Runs all, draws, and prints."""
    args = begin(__doc__, seeds=5, evals={"default": 60}, values=several(1, 10, 65))
    found = {
        f"{num} decay{'s' if num > 1 else ''}": runs_of(num, args.seeds, args.evals, args.searchers)
        for num in args.values
    }
    draw(found, args.evals, "trainings", args.out / "landscape_ridge.png")
    print(table(found, 20, args.evals))


if __name__ == "__main__":
    main()
