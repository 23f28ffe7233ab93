"""A weight decay for every single weight, by the cheapest way through training: DrMAD.

A network trains for 300 steps, again and again from the same start. After each training the hypergradient
says how to change the decays of all 4,810 weights. DrMAD takes it from the first weights and the last, and a
straight line between them, at a tenth of the steps: a direction, of which only the signs are used. The table
sets beside it the same with all steps on the line, the exact derivative of training (Unrolled), the best
single value of a grid with as many trainings, and that value with training on the validation images too.

    python examples/drmad.py

Source: Fu, Luo, Feng, Low and Chua 2016. Measured: docs/results/drmad.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from functools import partial

import torch
from tqdm import tqdm

from command_line import option_parser, parse, spread, table
from common import Batch, Data, joined, load_data, loss_of, loss_value, make_mlp, plain_step, random_batches
from torch_hypergrad import DrMAD, HyperOptimizer, Hyperparameter, Method, Unrolled

SIZES = {"digits": (200, 500), "mnist": (5000, 5000)}
LR, MOMENTUM, BATCH_SIZE, HIDDEN = 0.1, 0.9, 100, 64
INITIAL_DECAY, HIGHEST_DECAY = 0.03, 0.5 / LR  # a weight that loses half of itself in a step is as good as 0
SIGNS = partial(torch.optim.Adam, lr=0.5, betas=(0.0, 0.0), eps=1e-12)
"""Adam without memory divides each derivative by its own size."""

Losses = tuple[float, float, float]
"""Of validation at the start, of validation and test at the end."""


def tuned(args: argparse.Namespace, data: Data, seed: int, method: Method, bar: tqdm) -> Losses:
    """Trains ``rounds`` times, with a hyper step after each but the last."""
    model = make_mlp(data.train[0].shape[1], HIDDEN, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    decay = Hyperparameter("weight_decay", per="element", init=INITIAL_DECAY, high=HIGHEST_DECAY, log=True)
    hyper = HyperOptimizer(model, optimizer, loss_of, [decay], method, SIGNS)
    losses = []
    for number in range(args.rounds + 1):
        hyper.restart()
        for batch in random_batches(data.train, args.steps, BATCH_SIZE, seed + number):
            hyper.step(batch)
        losses.append(loss_value(model, data.val))
        if number < args.rounds:
            hyper.hyper_step(data.val)
        bar.update()
    return losses[0], losses[-1], loss_value(model, data.test)


def fixed(args: argparse.Namespace, data: Data, train: Batch, seed: int, decay: float, bar: tqdm) -> Losses:
    """The same training with one fixed decay."""
    model = make_mlp(train[0].shape[1], HIDDEN, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=decay)
    for batch in random_batches(train, args.steps, BATCH_SIZE, seed):
        plain_step(model, optimizer, batch)
    bar.update()
    val = loss_value(model, data.val)
    return val, val, loss_value(model, data.test)


def compare(args: argparse.Namespace, data: Data, seed: int, bar: tqdm) -> dict[str, Losses]:
    """Every row of the table for one seed."""
    methods = {
        f"DrMAD, {max(1, args.steps // 10)} points": DrMAD(),
        f"DrMAD, all {args.steps} points": DrMAD(args.steps),
        "exact: Unrolled": Unrolled(),
    }
    runs = {name: tuned(args, data, seed, method, bar) for name, method in methods.items()}
    grid = {
        decay: fixed(args, data, data.train, seed, decay, bar)
        for decay in torch.logspace(-4, -1, args.rounds + 1).tolist()
    }
    best = min(grid, key=lambda decay: grid[decay][1])
    both = fixed(args, data, joined(data.train, data.val), seed, best, bar)
    return runs | {"best single value of a grid": grid[best], "same, training on both sets": both}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs all and prints the table."""
    parser = option_parser(__doc__, "drmad", steps=300, seeds=3)
    parser.add_argument("--rounds", type=int, default=15, help="hyper steps (%(default)s)")
    args = parse(parser, argv, SIZES)
    with tqdm(total=args.seeds * (4 * (args.rounds + 1) + 1), unit="training") as bar:
        runs = [compare(args, data, seed, bar) for seed, data in enumerate(load_data(args))]
    rows = [[name, *(spread(losses, 3) for losses in zip(*(run[name] for run in runs)))] for name in runs[0]]
    print(table(["weight decay", "validation loss, first", "last", "test loss"], rows))


if __name__ == "__main__":
    main()
