"""One weight decay for every single weight, tuned by hypergradients while the network trains.

A small network learns from few images. How much should each of its weights decay? The validation images tell:
every 20 training steps, the implicit hypergradient gives the derivative of the validation loss with respect
to all decays at once, and Adam moves their logarithms. The table compares, on test images that nothing else
has seen:

- no weight decay, and the best single value of a grid, chosen by validation loss;
- that same value, training on the training and validation images together: the honest rival,
  since tuning thousands of decays learns from the validation labels too;
- decay tuned per param group (one value), per tensor (four), and per element (one for each weight and bias).

    python examples/per_parameter_weight_decay.py
    python examples/per_parameter_weight_decay.py --dataset mnist --data-root data --download

It draws the learned decay of the first layer over the pixels of the image. The first takes a minute and a
half on two cores and no network: scikit-learn's digits. Measured: docs/results/per_parameter_weight_decay.md.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter
from torch import Tensor, nn
from tqdm import tqdm

from command_line import option_parser, parse, saved, spread, table
from common import Data, accuracy_of, joined, load_data, loss_of, make_mlp, plain_step, random_batches
from torch_hypergrad import HyperOptimizer, Hyperparameter, Implicit, Neumann

SIZES = {"digits": (200, 500), "mnist": (5000, 5000)}
LR, MOMENTUM, BATCH_SIZE = 0.1, 0.9, 500
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
INITIAL_DECAY = 1e-3  # where tuned decays start
WARMUP = 100  # training steps before the first hyper step: the implicit method assumes weights near a minimum
HYPER_EVERY = 20  # training steps between hyper steps

NO_DECAY, SINGLE, BOTH = "no weight decay", "best single value", "same, training on both sets"


@dataclass(frozen=True)
class Run:
    """What one training run gave; the decays by parameter if they were tuned."""

    val_loss: float
    test_loss: float
    test_accuracy: float
    seconds: float
    decays: dict[str, Tensor]


def tune_weight_decay(model: nn.Module, optimizer: torch.optim.Optimizer, per: str) -> HyperOptimizer:
    """All that tuning takes. Damping makes up for the negative curvature that a training loss may still have;
    weights follow their decays slowly, so that Adam's usual momentum would overshoot."""
    return HyperOptimizer(
        model,
        optimizer,
        loss_of,
        tune=[Hyperparameter("weight_decay", per=per, init=INITIAL_DECAY, log=True)],
        method=Implicit(Neumann(num_terms=20, damping=0.1)),
        hyper_optimizer=partial(torch.optim.Adam, lr=0.1, betas=(0.5, 0.9)),
    )


def fit(
    args: argparse.Namespace, data: Data, seed: int, bar: tqdm, decay: float = 0.0, per: str | None = None
) -> Run:
    """Trains one network with a fixed weight decay or, given ``per``, with a tuned one."""
    start = time.perf_counter()
    model = make_mlp(data.train[0].shape[1], args.hidden, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=decay)
    hyper = tune_weight_decay(model, optimizer, per) if per else None
    step = hyper.step if hyper else partial(plain_step, model, optimizer)
    for number, batch in enumerate(random_batches(data.train, args.steps, BATCH_SIZE, seed), start=1):
        step(batch)
        if hyper and number >= WARMUP and number % HYPER_EVERY == 0:
            hyper.hyper_step(data.val)
        bar.update()
    with torch.no_grad():
        losses = [loss_of(model, batch).item() for batch in (data.val, data.test)]
    seconds = time.perf_counter() - start
    return Run(*losses, accuracy_of(model, data.test), seconds, hyper.values() if hyper else {})


def compare(args: argparse.Namespace, data: Data, seed: int, bar: tqdm) -> dict[str, Run]:
    """Every row of the table for one seed: the same images and the same initial weights for all."""
    runs = {NO_DECAY: fit(args, data, seed, bar)}
    grid = {decay: fit(args, data, seed, bar, decay=decay) for decay in GRID}
    best = min(grid, key=lambda decay: grid[decay].val_loss)
    both = Data(joined(data.train, data.val), data.val, data.test)
    runs |= {SINGLE: grid[best], BOTH: fit(args, both, seed, bar, decay=best)}
    return runs | {
        f"tuned per {per}": fit(args, data, seed, bar, per=per) for per in ("group", "tensor", "element")
    }


def row(name: str, runs: Sequence[Run]) -> list[object]:
    num_values = sum(decay.numel() for decay in runs[0].decays.values()) or int(name != NO_DECAY)
    accuracy = spread([run.test_accuracy for run in runs], 1)
    loss = spread([run.test_loss for run in runs], 3)
    return [name, num_values, accuracy, loss, spread([run.seconds for run in runs], 1)]


def draw_decay(decay: Tensor, images: Tensor) -> Figure:
    """The first layer's mean decays over the hidden units, beside the mean image. White is the start."""
    side = int(images.shape[1] ** 0.5)
    mean = decay.log().mean(0).exp().view(side, side)
    reach = (mean / INITIAL_DECAY).log().abs().max().exp().item()
    figure = Figure(figsize=(9.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    brightness = left.imshow(images.mean(0).view(side, side).numpy(), cmap="gray")
    around_start = LogNorm(INITIAL_DECAY / reach, INITIAL_DECAY * reach)
    learned = right.imshow(mean.numpy(), cmap="PuOr_r", norm=around_start)
    left.set(title="mean training image", xticks=[], yticks=[])
    right.set(title="learned weight decay, first layer", xticks=[], yticks=[])
    figure.colorbar(brightness, ax=left, label="brightness")
    bar = figure.colorbar(learned, ax=right, label="geometric mean over the hidden units", format="{x:g}")
    bar.ax.yaxis.set(major_locator=LogLocator(subs=(1, 2, 5)), minor_formatter=NullFormatter())
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    parser = option_parser(__doc__, "per_parameter_weight_decay", steps=1000, seeds=3)
    parser.add_argument("--hidden", type=int, default=256, help="hidden units (%(default)s)")
    args = parse(parser, argv, SIZES, min_steps=WARMUP + 1)
    of_seeds = load_data(args)
    with tqdm(total=args.seeds * (len(GRID) + 5) * args.steps, unit="step") as bar:
        results = [compare(args, data, seed, bar) for seed, data in enumerate(of_seeds)]
    sizes = f"{args.train_size} training, {args.val_size} validation, {len(of_seeds[0].test[1])} test"
    print(f"\n{args.dataset}: {sizes} images\n")
    rows = [row(name, [runs[name] for runs in results]) for name in results[0]]
    print(table(["weight decay", "values", "test accuracy (%)", "test loss", "seconds per run"], rows))
    decay = results[0]["tuned per element"].decays["weight_decay/0.weight"]
    picture = draw_decay(decay, of_seeds[0].train[0])
    print(f"\nPicture of the first seed: {saved(picture, args.out / 'learned_decay.png')}")


if __name__ == "__main__":
    main()
