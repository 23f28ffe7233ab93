"""The options, tables and pictures of the examples."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import nn

from common import Batch, accuracy_of, loss_value

Sizes = dict[str, tuple[int, int]]


def option_parser(doc: str, name: str, *, steps: int, seeds: int) -> argparse.ArgumentParser:
    """The options that every example has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=["digits", "mnist"], default="digits")
    parser.add_argument(
        "--data-root", type=Path, default=Path("data"), help="folder that holds MNIST/raw (%(default)s)"
    )
    parser.add_argument("--download", action="store_true", help="fetch MNIST into --data-root")
    parser.add_argument("--train-size", type=int, help="training images")
    parser.add_argument("--val-size", type=int, help="validation images")
    parser.add_argument("--steps", type=int, default=steps, help="training steps of each run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=seeds, help="number of seeds (%(default)s)")
    parser.add_argument(
        "--threads", type=int, default=1, help="of the CPU (%(default)s: small matrices gain little)"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs") / name, help="folder for pictures (%(default)s)"
    )
    return parser


def parse(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None, sizes: Sizes, min_steps: int = 1
) -> argparse.Namespace:
    """Reads the options, with the training and validation ``sizes`` of each dataset,
    and refuses bad numbers."""
    args = parser.parse_args(argv)
    args.train_size, args.val_size = (
        default if size is None else size
        for size, default in zip((args.train_size, args.val_size), sizes[args.dataset])
    )
    if args.steps < min_steps:
        parser.error(f"--steps must be at least {min_steps}, got {args.steps}")
    for name, value in vars(args).items():
        if type(value) is int and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1, got {value}")
    torch.set_num_threads(args.threads)
    return args


def spread(values: Sequence[float], digits: int) -> str:
    """Mean, and sample standard deviation if there are several."""
    mean = f"{statistics.mean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


def scores(models: Sequence[nn.Module], batches: Sequence[Batch]) -> tuple[str, str]:
    """The cells of accuracy and loss, each model on its own batch."""
    pairs = list(zip(models, batches))
    accuracies, losses = [accuracy_of(*pair) for pair in pairs], [loss_value(*pair) for pair in pairs]
    return spread(accuracies, 1), spread(losses, 3)


def table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The first column to the left, all others to the right."""
    right = ["right"] * (len(headers) - 1)
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=("left", *right))


def saved(figure: Figure, path: Path) -> Path:
    """Where the picture is, in a folder that is made if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    return path
