"""What the examples train: a small network on images of digits."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """Images, as rows of pixels from 0 to 1, and their classes."""

    train: Batch
    val: Batch
    test: Batch


def make_mlp(num_pixels: int, num_hidden: int, seed: int) -> nn.Sequential:
    """A network with one hidden layer and random weights."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(num_pixels, num_hidden), nn.ReLU(), nn.Linear(num_hidden, 10))


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy."""
    images, labels = batch
    return F.cross_entropy(model(images), labels)


@torch.no_grad()
def loss_value(model: nn.Module, batch: Batch) -> float:
    """Infinite if training has diverged."""
    loss = loss_of(model, batch).item()
    return loss if math.isfinite(loss) else math.inf


@torch.no_grad()
def accuracy_of(model: nn.Module, batch: Batch) -> float:
    """In percent."""
    images, labels = batch
    return 100 * (model(images).argmax(1) == labels).float().mean().item()


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> None:
    """One training step as PyTorch has it."""
    optimizer.zero_grad()
    loss_of(model, batch).backward()
    optimizer.step()


def random_batches(data: Batch, num_steps: int, batch_size: int, seed: int) -> Iterator[Batch]:
    """The whole data at each step where it fits in a batch."""
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        chosen = torch.randperm(len(labels), generator=generator)[:batch_size]
        yield images[chosen], labels[chosen]


def tuning_seeds(number: int) -> range:
    """For training runs that choose something: the seeds of a comparison begin at 0."""
    return range(1000, 1000 + number)


def load_data(args: argparse.Namespace) -> list[Data]:
    """For each seed, training and validation images at random;
    the test images are the rest, or MNIST's own."""
    images, labels = read_mnist(args, train=True) if args.dataset == "mnist" else read_digits()
    mnist_test = read_mnist(args, train=False) if args.dataset == "mnist" else None
    num_used = args.train_size + args.val_size
    if num_used >= len(labels):
        raise SystemExit(
            f"--train-size and --val-size ask for {num_used} images, and {args.dataset} has {len(labels)}."
        )
    of_seeds = []
    for seed in range(args.seeds):
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
        train, val, rest = (
            (images[part], labels[part]) for part in order.tensor_split([args.train_size, num_used])
        )
        of_seeds.append(Data(train, val, mnist_test or rest))
    return of_seeds


def read_digits() -> Batch:
    """scikit-learn's 1797 digits of 8 x 8 pixels."""
    digits = load_digits()
    return torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)


def read_mnist(args: argparse.Namespace, train: bool) -> Batch:
    """60,000 or 10,000 digits of 28 x 28 pixels."""
    from torchvision.datasets import MNIST  # takes a second, and digits do without

    folder = Path(args.data_root, "MNIST", "raw")
    files = [
        folder / f"{part}-{kind}-ubyte"
        for part in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]
    missing = [file.name for file in files if not file.exists()]
    if missing and not args.download:
        raise SystemExit(
            f"MNIST: {', '.join(missing)} not found in {folder}. Put them there, or pass --download."
        )
    mnist = MNIST(args.data_root, train=train, download=args.download)
    return mnist.data.flatten(1) / 255, mnist.targets


def joined(*batches: Batch) -> Batch:
    """All images, and all labels."""
    images, labels = zip(*batches)
    return torch.cat(images), torch.cat(labels)
