"""An Optuna objective, and the same one with hypergradients: five lines more.

    python examples/optuna_hypergradient.py
    python examples/optuna_hypergradient.py --dataset mnist --data-root data --download

The first searches width, learning rate and weight decay. In the second, hypergradients tune a weight decay
for each single weight while a trial trains, from where the search has put them. The table gives both the same
number of training steps, of which a hyper step takes as many as its products are worth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import optuna
import torch
from optuna.trial import Trial

from command_line import option_parser, parse, spread, table
from common import Data, accuracy_of, load_data, loss_of, loss_value, make_mlp, plain_step
from torch_hypergrad import HyperOptimizer, Hyperparameter, Implicit, Neumann
from torch_hypergrad.search import hypergradients  # 1

SIZES = {"digits": (200, 500), "mnist": (2000, 2000)}
EVERY = 20


def build(trial: Trial, data: Data) -> tuple[torch.nn.Sequential, torch.optim.Optimizer]:
    model = make_mlp(data.train[0].shape[1], trial.suggest_int("width", 16, 256, log=True), seed=0)
    lr = trial.suggest_float("lr", 0.01, 0.5, log=True)
    decay = trial.suggest_float("weight_decay", 1e-5, 1e-1, log=True)
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, weight_decay=decay)


def scored(trial: Trial, model: torch.nn.Module, data: Data) -> float:
    """The validation loss; test scores are kept aside, and choose nothing."""
    trial.set_user_attr("test", [accuracy_of(model, data.test), loss_value(model, data.test)])
    return loss_value(model, data.val)


def plain(trial: Trial, data: Data, num_steps: int) -> float:
    model, optimizer = build(trial, data)
    for step in range(1, num_steps + 1):
        plain_step(model, optimizer, data.train)
        if step % EVERY == 0:
            trial.set_user_attr("cost", step)
            trial.report(loss_value(model, data.val), step)
            if trial.should_prune():
                raise optuna.TrialPruned
    return scored(trial, model, data)


def with_hypergradients(trial: Trial, data: Data, num_steps: int) -> float:
    model, optimizer = build(trial, data)
    hyper = HyperOptimizer(  # 2
        model,
        optimizer,
        loss_of,
        tune=[Hyperparameter("weight_decay", per="element", log=True)],
        method=Implicit(Neumann(10, damping=0.1), curvature="gauss_newton"),
        hyper_optimizer=partial(torch.optim.Adam, lr=0.1),
    )
    with hypergradients(trial, hyper) as tuning:  # 3
        for step in range(1, num_steps + 1):
            tuning.step(data.train)  # 4
            if step % EVERY == 0:
                tuning.hyper_step(data.val)  # 5: counted, reported, and pruned
    return scored(trial, model, data)


def spent(study: optuna.Study) -> float:
    return sum(trial.user_attrs["cost"] for trial in study.trials)


def stop_at(budget: float, study: optuna.Study, _: object) -> None:
    if spent(study) >= budget:
        study.stop()


def search(objective: Callable[[Trial], float], seed: int, **until: Any) -> optuna.Study:
    sampler, pruner = optuna.samplers.TPESampler(seed=seed), optuna.pruners.MedianPruner()
    study = optuna.create_study(sampler=sampler, pruner=pruner)
    study.optimize(objective, **until)
    return study


def main(argv: Sequence[str] | None = None) -> None:
    parser = option_parser(__doc__, "optuna_hypergradient", steps=300, seeds=3)
    parser.add_argument("--trials", type=int, default=12, help="with hypergradients (%(default)s)")
    args = parse(parser, argv, SIZES, min_steps=EVERY)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    rows: dict[str, list[tuple[float, ...]]] = {}
    for seed, data in enumerate(load_data(args)):
        on = {"data": data, "num_steps": args.steps}
        tuned = search(partial(with_hypergradients, **on), seed, n_trials=args.trials)
        alone = search(partial(plain, **on), seed, callbacks=[partial(stop_at, spent(tuned))])
        for name, study in (("search alone", alone), ("with hypergradients", tuned)):
            best = study.best_trial
            row = len(study.trials), spent(study), best.value, *best.user_attrs["test"]
            rows.setdefault(name, []).append(row)
    cells = [[name, *map(spread, zip(*of_one), (0, 0, 3, 1, 3))] for name, of_one in rows.items()]
    headers = ["search", "trials", "cost (steps)", "validation loss", "test accuracy (%)", "test loss"]
    print(table(headers, cells))


if __name__ == "__main__":
    main()
