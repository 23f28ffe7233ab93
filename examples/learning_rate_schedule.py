"""One learning rate for each training step, learned by differentiating through whole training runs.

As in Maclaurin, Duvenaud and Adams 2015: train a small network for 50 steps, differentiate the validation
loss at the end with respect to all 50 learning rates, move their logarithms, start again. Every run has new
initial weights and new batches, so that the schedule cannot fit one of them. The rivals are a constant
learning rate and a cosine schedule, each with the best peak of a grid. All are chosen by the same validation
images, and compared on test images and on initial weights and batches that nobody has seen.

    python examples/learning_rate_schedule.py
    python examples/learning_rate_schedule.py --dataset mnist --data-root data --download

It prints a table and draws the schedules and the loss curves; less than a minute on scikit-learn's digits.
More episodes learn more. Measured: docs/results/literature.md.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import nn
from tqdm import tqdm

from command_line import option_parser, parse, saved, scores, table
from common import Data, load_data, loss_of, loss_value, make_mlp, random_batches, tuning_seeds
from torch_hypergrad import HyperOptimizer, Hyperparameter, Unrolled

SIZES = {"digits": (500, 500), "mnist": (5000, 5000)}
NUM_HIDDEN, BATCH_SIZE, MOMENTUM = 64, 100, 0.9
GRID = (0.03, 0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5)
NUM_GRID_SEEDS = 5
INITIAL_LR, HYPER_LR = 0.1, 0.1

Schedule = Sequence[float]


def make(num_pixels: int, seed: int) -> tuple[nn.Module, torch.optim.SGD]:
    model = make_mlp(num_pixels, NUM_HIDDEN, seed)
    return model, torch.optim.SGD(model.parameters(), lr=INITIAL_LR, momentum=MOMENTUM)


def learn_schedule(data: Data, num_steps: int, num_episodes: int) -> Schedule:
    """All of the tuning: one training run for each hyper step."""
    num_pixels = data.train[0].shape[1]
    model, optimizer = make(num_pixels, seed=0)
    hyper = HyperOptimizer(
        model,
        optimizer,
        loss_of,
        tune=[Hyperparameter("lr", per="step", num_steps=num_steps, log=True)],
        method=Unrolled(),
        hyper_optimizer=partial(torch.optim.Adam, lr=HYPER_LR),
    )
    for seed in (bar := tqdm(tuning_seeds(num_episodes), unit="episode")):
        hyper.restart()
        model.load_state_dict(make(num_pixels, seed)[0].state_dict())
        for batch in random_batches(data.train, num_steps, BATCH_SIZE, seed):
            hyper.step(batch)
        report = hyper.hyper_step(data.val)
        bar.set_postfix(val=f"{report.val_loss:.4f}", refresh=False)
    return hyper.values()["lr/group0"].tolist()


def train(data: Data, schedule: Schedule, seed: int) -> tuple[nn.Module, list[float]]:
    """The trained network, and its training loss at each step: plain PyTorch."""
    model, optimizer = make(data.train[0].shape[1], seed)
    losses = []
    for lr, batch in zip(schedule, random_batches(data.train, len(schedule), BATCH_SIZE, seed)):
        optimizer.param_groups[0]["lr"] = lr
        optimizer.zero_grad()
        loss = loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return model, losses


def best_peak(data: Data, shape: Schedule) -> Schedule:
    """The shape times that peak of the grid with which the validation loss at the end is lowest."""

    def val_loss(schedule: Schedule) -> float:
        models = [train(data, schedule, seed)[0] for seed in tuning_seeds(NUM_GRID_SEEDS)]
        return sum(loss_value(model, data.val) for model in models)

    return min(([peak * factor for factor in shape] for peak in GRID), key=val_loss)


def row(name: str, schedule: Schedule, models: Sequence[nn.Module], data: Data) -> list[object]:
    rates = [f"{schedule[0]:.2f}", f"{max(schedule):.2f}", f"{schedule[-1]:.3f}"]
    _, val_loss = scores(models, [data.val] * len(models))
    accuracy, test_loss = scores(models, [data.test] * len(models))
    return [name, *rates, val_loss, test_loss, accuracy]


def draw(schedules: dict[str, Schedule], curves: dict[str, list[float]]) -> Figure:
    figure = Figure(figsize=(10.5, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for (name, schedule), color in zip(schedules.items(), ("#999999", "#0072B2", "#D55E00")):
        left.plot(range(1, len(schedule) + 1), schedule, color=color, marker=".", label=name)
        right.plot(range(1, len(schedule) + 1), curves[name], color=color, label=name)
    left.set(title="learning rate", xlabel="training step", ylabel="learning rate", ylim=0)
    right.set_title("training loss, mean over the runs")
    right.set(xlabel="training step", ylabel="cross-entropy", yscale="log")
    right.yaxis.set(
        major_locator=LogLocator(subs=(1, 2, 5)), major_formatter="{x:g}", minor_formatter=NullFormatter()
    )
    for panel in (left, right):
        panel.grid(alpha=0.3)
    left.legend(frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = option_parser(__doc__, "learning_rate_schedule", steps=50, seeds=10)
    parser.add_argument("--episodes", type=int, default=22, help="training runs to learn from (%(default)s)")
    args = parse(parser, argv, SIZES)
    data = load_data(args)[0]
    cosine = [(1 + math.cos(math.pi * step / args.steps)) / 2 for step in range(args.steps)]
    schedules = {
        "best constant of a grid": best_peak(data, [1.0] * args.steps),
        "best cosine of a grid": best_peak(data, cosine),
        "learned": learn_schedule(data, args.steps, args.episodes),
    }
    rows, curves = [], {}
    for name, schedule in schedules.items():
        models, losses = zip(*(train(data, schedule, seed) for seed in range(args.seeds)))
        rows.append(row(name, schedule, models, data))
        curves[name] = torch.tensor(losses).mean(0).tolist()
    fresh = f"{args.seeds} runs with fresh initial weights and batches"
    print(f"\n{args.dataset}: {args.steps} training steps; {fresh}\n")
    losses_and_accuracy = ["validation loss", "test loss", "test accuracy (%)"]
    print(table(["learning rate", "first", "peak", "last", *losses_and_accuracy], rows))
    of_grid, learning = len(GRID) * NUM_GRID_SEEDS * args.steps, args.episodes * (4 * args.steps + 1)
    print(
        f"\nCost in training steps, a replayed one counted as 3: {of_grid:,} of a grid, {learning:,} to learn"
    )
    print(f"\nPicture: {saved(draw(schedules, curves), args.out / 'schedules.png')}")


if __name__ == "__main__":
    main()
