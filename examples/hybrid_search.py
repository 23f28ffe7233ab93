"""A hybrid search: Optuna chooses what has no gradient, hypergradients tune the rest inside each trial.

    python examples/hybrid_search.py
    python examples/hybrid_search.py --keep  # stop it and start it again, or start another beside it
    python examples/hybrid_search.py --dataset mnist --data-root data --download

Outside: width, activation, optimizer, batch size, learning rate. Inside: a weight decay for each single
weight. The rival searches one weight decay with the rest, at the same cost in training steps. The picture
shows the best validation loss so far against that cost.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial
from typing import Any

import optuna
import torch
from matplotlib.figure import Figure
from optuna.trial import Trial
from torch import nn

from command_line import option_parser, parse, saved, spread, table
from common import Data, accuracy_of, load_data, loss_of, loss_value, plain_step, random_batches
from torch_hypergrad import HyperOptimizer, Hyperparameter, Implicit, Neumann
from torch_hypergrad.search import best_so_far, create_study, hypergradients, objective_of

SIZES = {"digits": (200, 500), "mnist": (2000, 2000)}
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
OPTIMIZERS = {"sgd": partial(torch.optim.SGD, momentum=0.9), "adam": partial(torch.optim.Adam, eps=1e-5)}
OUTER = {
    "width": {"type": "int", "low": 16, "high": 256, "log": True},
    "activation": list(ACTIVATIONS),
    "optimizer": list(OPTIMIZERS),
    "batch_size": [50, 100, 200],
    "lr": {"type": "float", "low": 1e-3, "high": 0.3, "log": True},
}
DECAY = {"weight_decay": {"type": "float", "low": 1e-5, "high": 1e-1, "log": True}}
EVERY = 20


def build(data: Data, settings: dict[str, Any]) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    first, last = nn.Linear(data.train[0].shape[1], settings["width"]), nn.Linear(settings["width"], 10)
    model = nn.Sequential(first, ACTIVATIONS[settings["activation"]](), last)
    options = {"lr": settings["lr"], "weight_decay": settings.get("weight_decay", 1e-2)}
    return model, OPTIMIZERS[settings["optimizer"]](model.parameters(), **options)


def scored(trial: Trial, model: nn.Module, data: Data) -> float:
    """The validation loss; test scores are kept aside, and choose nothing."""
    trial.set_user_attr("test", [accuracy_of(model, data.test), loss_value(model, data.test)])
    return loss_value(model, data.val)


def hybrid(trial: Trial, settings: dict[str, Any], data: Data, num_steps: int) -> float:
    model, optimizer = build(data, settings)
    tune = [Hyperparameter("weight_decay", per="element", log=True)]
    method = Implicit(Neumann(10, damping=0.1), curvature="gauss_newton")
    hyper = HyperOptimizer(model, optimizer, loss_of, tune, method, partial(torch.optim.Adam, lr=0.1))
    batches = random_batches(data.train, num_steps, settings["batch_size"], seed=0)
    with hypergradients(trial, hyper) as tuning:
        for step, batch in enumerate(batches, start=1):
            tuning.step(batch)
            if step % EVERY == 0:
                tuning.hyper_step(data.val)
    return scored(trial, model, data)


def alone(trial: Trial, settings: dict[str, Any], data: Data, num_steps: int) -> float:
    model, optimizer = build(data, settings)
    batches = random_batches(data.train, num_steps, settings["batch_size"], seed=0)
    for step, batch in enumerate(batches, start=1):
        plain_step(model, optimizer, batch)
        if step % EVERY == 0:
            trial.report(loss_value(model, data.val), step)
            trial.set_user_attr("cost", step)
            if trial.should_prune():
                raise optuna.TrialPruned
    trial.set_user_attr("cost", num_steps)
    return scored(trial, model, data)


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return [trial for trial in study.trials if trial.state.is_finished()]


def spent(study: optuna.Study) -> float:
    return sum(trial.user_attrs.get("cost", 0) for trial in finished(study))


def compare(args: argparse.Namespace, data: Data, seed: int) -> dict[str, optuna.Study]:
    on = {"data": data, "num_steps": args.steps}

    def study(name: str, space: dict[str, Any]) -> optuna.Study:
        storage = f"journal:///{args.out / name}-{seed}.log" if args.keep else None
        return create_study(space, name=name, storage=storage, pruner="median", seed=seed)

    studies = {"hybrid": study("hybrid", OUTER), "search alone": study("alone", {**OUTER, **DECAY})}
    both, rival = studies.values()
    while len(finished(both)) < args.trials:
        both.optimize(objective_of(partial(hybrid, **on)), n_trials=1)
    while spent(rival) < spent(both):
        rival.optimize(objective_of(partial(alone, **on)), n_trials=1)
    return studies


def draw(of_seeds: list[dict[str, optuna.Study]]) -> Figure:
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for studies in of_seeds:
        for number, (name, study) in enumerate(studies.items()):
            label = name if studies is of_seeds[0] else None
            axes.step(*best_so_far(study), where="post", color=f"C{number}", label=label)
    axes.set(xlabel="cost (training steps)", ylabel="best validation loss so far")
    axes.legend()
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = option_parser(__doc__, "hybrid_search", steps=300, seeds=2)
    parser.add_argument("--trials", type=int, default=15, help="of the hybrid (%(default)s)")
    parser.add_argument("--keep", action="store_true", help="keep the studies in --out, and go on with them")
    args = parse(parser, argv, SIZES, min_steps=EVERY)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    every_data = load_data(args)
    args.out.mkdir(parents=True, exist_ok=True)
    of_seeds = [compare(args, data, seed) for seed, data in enumerate(every_data)]
    cells = []
    for name in of_seeds[0]:
        best = [(studies[name], studies[name].best_trial) for studies in of_seeds]
        rows = [(len(s.trials), spent(s), t.value, *t.user_attrs["test"]) for s, t in best]
        cells.append([name, *map(spread, zip(*rows), (0, 0, 3, 1, 3))])
    headers = ["search", "trials", "cost (steps)", "validation loss", "test accuracy (%)", "test loss"]
    print(table(headers, cells))
    print(f"\nSeed 0 chose {of_seeds[0]['hybrid'].best_params}.")
    print(saved(draw(of_seeds), args.out / "hybrid_search.png"))


if __name__ == "__main__":
    main()
