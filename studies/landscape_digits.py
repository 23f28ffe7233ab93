"""Every searcher, with and without pruning, and hypergradients on a network that has to be trained.

    python -m studies.landscape_digits [--seeds 3] [--trainings 25] [--decays 1 65 2410] [--searchers tpe ...]

A network 64-32-10 on scikit-learn's digits: 200 images to train on, 500 to validate, 1,097 to test, drawn
anew for each seed; 200 steps of SGD with momentum on all 200 images. Tuned are the learning rate, 0.01 to
0.5, and one decay, or 65: one for the weights of each pixel and one for the rest, 1e-5 to 0.1, all on a log
scale; by hypergradients also 2,410, one for each weight. They begin in the middle of the ranges; implicit
ones leave the learning rate there. Cost is counted in training steps; everybody is given 25 trainings'
worth. What is compared is always the validation loss at the end of a plain training with the values found.
It draws landscape_digits.png in the folder --out, docs/results if not given, and prints the table of
landscape.md.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import optuna
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from torch_hypergrad import CG, Evaluation, HyperOptimizer, Hyperparameter, Implicit, Unrolled
from torch_hypergrad.bilevel import minimize
from torch_hypergrad.search import (
    best_so_far,
    create_study,
    hyper_step_cost,
    make_pruner,
    make_sampler,
    objective_of,
)

from .landscape import HYPERGRADIENT, Rows, Run, begin, draw, several, table

NUM_STEPS, EVERY = 200, 20
LR, DECAY = (0.01, 0.5), (1e-5, 0.1)
START = {"lr": math.sqrt(LR[0] * LR[1]), "decay": math.sqrt(DECAY[0] * DECAY[1])}
PRUNERS = {
    "asha": {"min_resource": EVERY, "reduction_factor": 3},
    "hyperband": {"min_resource": EVERY, "max_resource": NUM_STEPS, "reduction_factor": 3},
}


@dataclass(frozen=True)
class Digits:
    """Images and labels; ``labels`` says which decay a weight has, by the name of its parameter."""

    train: Rows
    val: Rows
    test: Rows
    labels: dict[str, Tensor]
    num_decays: int
    seed: int

    @staticmethod
    def make(seed: int, num_decays: int) -> Digits:
        """The problem with 1, 65 or 2410 decays."""
        data = load_digits()
        order = np.random.RandomState(seed).permutation(len(data.target))
        x, y = torch.tensor(data.data / 16)[order], torch.tensor(data.target)[order]
        parts = [(x[part], y[part]) for part in (slice(200), slice(200, 700), slice(700, None))]
        parameters = dict(network(seed).named_parameters())
        labels = {name: torch.tensor(num_decays // 65 and 64) for name in parameters}
        if num_decays == 65:
            labels["0.weight"] = torch.arange(64)
        elif num_decays > 65:
            numbers = torch.arange(num_decays).split([p.numel() for p in parameters.values()])
            labels = {name: n.view(p.shape) for n, (name, p) in zip(numbers, parameters.items())}
        return Digits(*parts, labels, num_decays, seed)

    def train_plainly(
        self, lr: float, decays: Tensor, after: Callable[[int, nn.Module], None] = lambda step, model: None
    ) -> nn.Module:
        """Trains as PyTorch does, and calls ``after`` each so many steps."""
        model = network(self.seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        of_weights = {name: decays[self.labels[name]] for name, _ in model.named_parameters()}
        for step in range(1, NUM_STEPS + 1):
            optimizer.zero_grad()
            loss_of(model, self.train).backward()
            for name, p in model.named_parameters():
                assert p.grad is not None
                p.grad.add_(of_weights[name] * p.detach())
            optimizer.step()
            if step % EVERY == 0:
                after(step, model)
        return model

    def losses(self, lr: float, decays: Tensor) -> tuple[float, float]:
        """Validation and test loss after a plain training."""
        model = self.train_plainly(lr, decays)
        return value(model, self.val), value(model, self.test)

    def hyper(self, tune: list[Hyperparameter], method: Any, lr: float) -> HyperOptimizer:
        """The same training, tuned."""
        model = network(self.seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        return HyperOptimizer(
            model, optimizer, loss_of, tune, method, partial(torch.optim.Adam, lr=0.3), val_loss=loss_of
        )

    def decays(self) -> Hyperparameter:
        """What a hypergradient tunes, from one value for all."""
        low, high = DECAY
        return Hyperparameter(
            "weight_decay", "label", START["decay"], low, high, log=True, labels=self.labels
        )


def network(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)).double()


def loss_of(model: nn.Module, rows: Rows) -> Tensor:
    return F.cross_entropy(model(rows[0]), rows[1])


@torch.no_grad()
def value(model: nn.Module, rows: Rows) -> float:
    return loss_of(model, rows).item()


# ---- the contestants ---------------------------------------------------------------------------------------


def study_of(problem: Digits, budget: int, sampler: str, pruner: str) -> optuna.Study:
    """One of the searchers, until the steps are spent."""
    kind = {"type": "float", "log": True}
    space = {"lr": {**kind, "low": LR[0], "high": LR[1]}}
    space |= {f"decay{i}": {**kind, "low": DECAY[0], "high": DECAY[1]} for i in range(problem.num_decays)}
    options = {"points": math.isqrt(budget // NUM_STEPS)} if sampler == "grid" else {}
    study = create_study(
        space,
        sampler=make_sampler(sampler, space, seed=problem.seed, **options),
        pruner=make_pruner(pruner, **PRUNERS[pruner]) if pruner in PRUNERS else "none",
    )

    def train(trial: optuna.Trial, settings: dict[str, Any]) -> float:
        def after(step: int, model: nn.Module) -> None:
            trial.set_user_attr("cost", step)
            trial.report(value(model, problem.val), step)
            if trial.should_prune() and step < NUM_STEPS:
                raise optuna.TrialPruned

        lr, *decays = (settings[name] for name in space)
        model = problem.train_plainly(lr, torch.tensor(decays, dtype=torch.float64), after)
        trial.set_user_attr("test", value(model, problem.test))
        return value(model, problem.val)

    def enough(study: optuna.Study, trial: optuna.trial.FrozenTrial) -> None:
        if sum(t.user_attrs["cost"] for t in study.get_trials(deepcopy=False)) >= budget:
            study.stop()

    study.optimize(objective_of(train), callbacks=[enough])
    return study


def searched(problem: Digits, budget: int, sampler: str, pruner: str) -> Run:
    """By one of the searchers."""
    study = study_of(problem, budget, sampler, pruner)
    return Run(*best_so_far(study), study.best_trial.user_attrs["test"])


def on_both_sets(problem: Digits, budget: int) -> Run:
    """By random search, then trained once more on the validation images too: the same updates, more data."""
    study = study_of(problem, budget - NUM_STEPS, "random", "none")
    both = tuple(torch.cat(pair) for pair in zip(problem.train, problem.val))
    lr, *decays = study.best_params.values()
    model = replace(problem, train=both).train_plainly(lr, torch.tensor(decays, dtype=torch.float64))
    return Run(*best_so_far(study), value(model, problem.test))


def by_unrolling(problem: Digits, budget: int) -> Run:
    """By scipy's L-BFGS-B on hypergradients through whole trainings, of the learning rate too."""
    rate = Hyperparameter("lr", init=START["lr"], low=LR[0], high=LR[1], log=True)
    hyper = problem.hyper([rate, problem.decays()], Unrolled(), START["lr"])
    costs: list[float] = []
    losses: list[float] = []

    def train() -> None:
        hyper.restart()
        for _ in range(NUM_STEPS):
            hyper.step(problem.train)

    def note(evaluation: Evaluation, values: dict[str, Tensor]) -> None:
        cost = NUM_STEPS + hyper_step_cost(hyper, evaluation, NUM_STEPS)
        costs.append(cost * (len(costs) + 1))
        losses.append(evaluation.val_loss)

    num = budget // (4 * NUM_STEPS + 1)
    found = minimize(hyper, problem.val, train, max_evals=num, callback=note, progress=False)
    lr, decays = found.hyperparameters.values()
    return Run(costs, losses, problem.losses(lr.item(), decays)[1])


def while_training(problem: Digits, budget: int) -> Run:
    """By implicit hypergradients within trainings, which go on with the decays of the one before. After each
    a plain training tells what they are worth; it is counted too."""
    method = Implicit(CG(10, rtol=1e-2), curvature="gauss_newton")
    hyper = problem.hyper([problem.decays()], method, START["lr"])
    run = Run([], [], math.inf)
    tests, cost = [], 0.0
    while True:
        hyper.restart()
        for step in range(1, NUM_STEPS + 1):
            hyper.step(problem.train)
            if step % EVERY == 0:
                cost += hyper_step_cost(hyper, hyper.hyper_step(problem.val), EVERY)
        cost += 2 * NUM_STEPS
        if cost > budget:
            return Run(run.costs, run.losses, tests[int(np.argmin(run.losses))])
        (decays,) = hyper.values().values()
        loss, test = problem.losses(START["lr"], decays)
        run.costs.append(cost)
        run.losses.append(loss)
        tests.append(test)


def contestants(num_decays: int, searchers: Sequence[str]) -> dict[str, Callable[[Digits, int], Run]]:
    """By name. A grid has two values at most, and a search through thousands of decays is none."""
    found: dict[str, Callable[[Digits, int], Run]] = {}
    if num_decays <= 65:
        found |= {name: partial(searched, sampler=name, pruner="none") for name in searchers}
        for sampler in ("random", "tpe"):
            if sampler in searchers:
                found |= {
                    f"{sampler} + {pruner}": partial(searched, sampler=sampler, pruner=pruner)
                    for pruner in PRUNERS
                }
        found["random + training on both"] = on_both_sets
    if num_decays > 1:
        found.pop("grid", None)
    return {
        **found,
        f"{HYPERGRADIENT}, unrolled": by_unrolling,
        f"{HYPERGRADIENT}, implicit": while_training,
    }


def main() -> None:
    """Runs all, draws, and prints."""
    args = begin(__doc__, seeds=3, trainings={"default": 25}, decays=several(1, 65, 2410))
    budget, found = args.trainings * NUM_STEPS, {}
    for num in args.decays:
        runs = found[f"{num} decay{'s' if num > 1 else ''}"] = {}
        for name, search in contestants(num, args.searchers).items():
            began = time.process_time()
            runs[name] = [search(Digits.make(seed, num), budget) for seed in range(args.seeds)]
            print(f"{num} decays, {name}: {time.process_time() - began:.0f} s", flush=True)
    draw(found, budget, "training steps", args.out / "landscape_digits.png")
    print(table(found, budget // 4, budget))


if __name__ == "__main__":
    main()
