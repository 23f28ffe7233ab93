"""One weight decay for every single weight, tuned by hypergradients while the network trains.

A small network learns from few images. How much should each weight decay? The validation images say: every 20 training
steps the implicit hypergradient gives the derivative of the validation loss with respect to all decays at once, and Adam
moves them. All decays start at 0. The table compares, on test images that nothing else has seen:

- no weight decay, and the best single value of a grid, chosen by validation loss;
- that same value, trained on training and validation images together: the honest rival, since tuning thousands of decays
  reads the validation labels too;
- decay tuned per param group (one value), per tensor (four), and per element (one for each weight and bias).

    python examples/per_parameter_weight_decay.py
    python examples/per_parameter_weight_decay.py --dataset mnist --data-root data --download

The first takes scikit-learn's digits, needs no network and about a minute on two cores. It prints the table and where the
two pictures lie: the loss curves, and the learned decay of the first layer over the pixels of the image. Typical results
are in docs/results/per_parameter_weight_decay.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn
from tqdm import tqdm

from torch_hypergrad import HyperOptimizer, Hyperparameter, Implicit, Neumann

matplotlib.use("Agg")  # writes files, needs no display
import matplotlib.pyplot as plt  # noqa: E402
from matplotlib.colors import LogNorm  # noqa: E402

LR, MOMENTUM, BATCH_SIZE = 0.1, 0.9, 500
GRID = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
WARMUP = 100  # training steps before the first hyper step: the implicit method needs weights near a minimum
HYPER_EVERY = 20  # training steps between hyper steps
HYPER_LR = 1e-3  # Adam's: about how far one hyper step moves a decay
MONITOR_EVERY = 25
DEFAULT_SIZES = {"digits": (200, 500), "mnist": (5000, 5000)}
MNIST_FILES = [f"{part}-ubyte" for of in ("train", "t10k") for part in (f"{of}-images-idx3", f"{of}-labels-idx1")]

NO_DECAY, SINGLE, BOTH = "no weight decay", "best single value", "same, trained on train + validation"
TUNED = {"group": "tuned per group", "tensor": "tuned per tensor", "element": "tuned per element"}
COLORS = dict(zip([NO_DECAY, SINGLE, *TUNED.values(), BOTH], ["#999999", "#000000", "#56B4E9", "#009E73", "#D55E00", "#CC79A7"]))

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """Images as rows of pixels from 0 to 1, and their classes."""

    train: Batch
    val: Batch
    test: Batch


@dataclass
class Run:
    """One training run: its results, its loss curves, and its decays by name if they were tuned."""

    test_accuracy: float
    test_loss: float
    val_loss: float
    seconds: float
    curves: dict[str, list[float]]
    decays: dict[str, Tensor] = field(default_factory=dict)


# ---- data and model ---------------------------------------------------------------------------------------------------


def load_data(args: argparse.Namespace, seed: int) -> Data:
    """Training and validation images drawn by ``seed``; the test images are the rest, or MNIST's own."""
    images, labels = load_mnist(args, train=True) if args.dataset == "mnist" else read_digits()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    parts = order.split([args.train_size, args.val_size, len(order) - args.train_size - args.val_size])
    train, val, rest = ((images[part], labels[part]) for part in parts)
    return Data(train, val, load_mnist(args, train=False) if args.dataset == "mnist" else rest)


def read_digits() -> Batch:
    digits = load_digits()
    return torch.tensor(digits.data / 16, dtype=torch.float32), torch.tensor(digits.target)


def load_mnist(args: argparse.Namespace, train: bool) -> Batch:
    from torchvision.datasets import MNIST

    folder = Path(args.data_root) / "MNIST" / "raw"
    missing = [name for name in MNIST_FILES if not any((folder / f"{name}{end}").exists() for end in ("", ".gz"))]
    if missing and not args.download:
        raise SystemExit(f"MNIST is incomplete: {', '.join(missing)} not found in {folder}. Put the files there, or pass --download.")
    mnist = MNIST(args.data_root, train=train, download=args.download)
    return mnist.data.flatten(1) / 255, mnist.targets


def make_model(num_pixels: int, num_hidden: int, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    hidden, out = nn.Linear(num_pixels, num_hidden), nn.Linear(num_hidden, 10)
    return nn.Sequential(OrderedDict(hidden=hidden, relu=nn.ReLU(), out=out))


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    images, labels = batch
    return F.cross_entropy(model(images), labels)


@torch.no_grad()
def accuracy_of(model: nn.Module, batch: Batch) -> float:
    images, labels = batch
    return (model(images).argmax(1) == labels).float().mean().item()


# ---- training ---------------------------------------------------------------------------------------------------------


def tune_weight_decay(model: nn.Module, optimizer: torch.optim.Optimizer, per: str) -> HyperOptimizer:
    """All that tuning takes. Damping holds the Neumann series together while the loss still has negative curvature."""
    return HyperOptimizer(
        model,
        optimizer,
        loss_of,
        tune=[Hyperparameter("weight_decay", per=per, init=0.0)],
        method=Implicit(Neumann(num_terms=20, damping=0.1)),
        hyper_optimizer=partial(torch.optim.Adam, lr=HYPER_LR),
    )


def plain_step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Batch) -> Tensor:
    optimizer.zero_grad()
    loss = loss_of(model, batch)
    loss.backward()
    optimizer.step()
    return loss.detach()


def random_batches(data: Batch, num_steps: int, seed: int) -> Iterator[Batch]:
    images, labels = data
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_steps):
        chosen = torch.randperm(len(labels), generator=generator)[:BATCH_SIZE]
        yield images[chosen], labels[chosen]


def fit(
    args: argparse.Namespace, data: Data, seed: int, bar: tqdm, weight_decay: float = 0.0, per: str | None = None
) -> Run:
    """Trains one network, with a fixed weight decay or, given ``per``, with a tuned one."""
    start = time.perf_counter()
    model = make_model(data.train[0].shape[1], args.hidden, seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM, weight_decay=weight_decay)
    hyper = tune_weight_decay(model, optimizer, per) if per else None
    step = hyper.step if hyper else partial(plain_step, model, optimizer)
    curves: dict[str, list[float]] = {"step": [], "training": [], "validation": [], "test": []}
    for number, batch in enumerate(random_batches(data.train, args.steps, seed), start=1):
        step(batch)
        if hyper and number >= WARMUP and number % HYPER_EVERY == 0:
            hyper.hyper_step(data.val)
        if number % MONITOR_EVERY == 0 or number == args.steps:
            monitor(model, data, number, curves, bar)
        bar.update()
    return Run(
        test_accuracy=accuracy_of(model, data.test),
        test_loss=curves["test"][-1],
        val_loss=curves["validation"][-1],
        seconds=time.perf_counter() - start,
        curves=curves,
        decays=hyper.values() if hyper else {},
    )


@torch.no_grad()
def monitor(model: nn.Module, data: Data, number: int, curves: dict[str, list[float]], bar: tqdm) -> None:
    curves["step"].append(number)
    for name, batch in (("training", data.train), ("validation", data.val), ("test", data.test)):
        curves[name].append(loss_of(model, batch).item())
    bar.set_postfix(train=f"{curves['training'][-1]:.4f}", val=f"{curves['validation'][-1]:.4f}", refresh=False)


def compare(args: argparse.Namespace, data: Data, seed: int, bar: tqdm) -> dict[str, Run]:
    """Every method of the table on the same images, from the same initial weights."""

    def run(name: str, on: Data = data, **how) -> Run:
        bar.set_description(f"seed {seed}, {name}", refresh=False)
        return fit(args, on, seed, bar, **how)

    runs = {NO_DECAY: run(NO_DECAY)}
    grid = {value: run(f"grid {value:g}", weight_decay=value) for value in GRID}
    best = min(grid, key=lambda value: grid[value].val_loss)
    runs[SINGLE] = grid[best]
    together = Data(tuple(map(torch.cat, zip(data.train, data.val))), data.val, data.test)
    runs[BOTH] = run("train + validation", on=together, weight_decay=best)
    return runs | {name: run(name, per=per) for per, name in TUNED.items()}


# ---- report -----------------------------------------------------------------------------------------------------------


def table(results: Sequence[dict[str, Run]]) -> str:
    def spread(values: Sequence[float], digits: int) -> str:
        shown = f"{statistics.mean(values):.{digits}f}"
        return f"{shown} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else shown

    rows = []
    for name in results[0]:
        runs = [result[name] for result in results]
        num_values = sum(values.numel() for values in runs[0].decays.values()) or int(name != NO_DECAY)
        accuracy, loss = [100 * run.test_accuracy for run in runs], [run.test_loss for run in runs]
        rows.append([name, num_values, spread(accuracy, 1), spread(loss, 3), spread([run.seconds for run in runs], 1)])
    headers = ["weight decay", "values", "test accuracy (%)", "test loss", "seconds"]
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=("left", *["right"] * 4))


def draw_curves(runs: dict[str, Run], path: Path) -> None:
    figure, panels = plt.subplots(1, 3, figsize=(12, 4.2), sharex=True, layout="constrained")
    for panel, kind in zip(panels, ("training", "validation", "test")):
        for name, color in COLORS.items():
            if name != BOTH or kind == "test":  # trained on both sets, it has neither curve
                panel.plot(runs[name].curves["step"], runs[name].curves[kind], color=color, label=name, linewidth=1.8)
        panel.set(title=f"{kind} loss", xlabel="training step", yscale="log")
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("cross-entropy")
    figure.legend(*panels[2].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_decay(decay: Tensor, images: Tensor, path: Path) -> None:
    """The first layer's decay, as a mean over the hidden units, beside the mean image. Pixels at 0 are left grey."""
    side = int(images.shape[1] ** 0.5)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4.2), layout="constrained")
    shown = left.imshow(images.mean(0).view(side, side), cmap="gray")
    figure.colorbar(shown, ax=left, label="brightness")
    left.set_title("mean training image")
    right.set_facecolor("#cccccc")
    mean = decay.mean(0).view(side, side)
    shown = right.imshow(mean.where(mean > 0, torch.nan), cmap="viridis", norm=LogNorm())
    figure.colorbar(shown, ax=right, label="weight decay, mean over the hidden units")
    right.set_title("learned decay of the first layer")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", choices=DEFAULT_SIZES, default="digits")
    parser.add_argument("--data-root", default="data", help="folder that holds MNIST/raw")
    parser.add_argument("--download", action="store_true", help="fetch MNIST into --data-root")
    parser.add_argument("--train-size", type=int, help="training images (digits 200, mnist 5000)")
    parser.add_argument("--val-size", type=int, help="validation images (digits 500, mnist 5000)")
    parser.add_argument("--hidden", type=int, default=256, help="hidden units (%(default)s)")
    parser.add_argument("--steps", type=int, default=1000, help="training steps of each run (%(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/per_parameter_weight_decay"), help="folder for the pictures")
    args = parser.parse_args(argv)
    args.train_size, args.val_size = (a or b for a, b in zip((args.train_size, args.val_size), DEFAULT_SIZES[args.dataset]))
    if min(args.train_size, args.val_size, args.hidden, args.seeds) < 1 or args.steps <= WARMUP:
        parser.error(f"sizes and --seeds must be positive, and --steps above {WARMUP}, where tuning begins")
    available = 60000 if args.dataset == "mnist" else 1797
    if args.train_size + args.val_size >= available:
        parser.error(f"{args.train_size} training and {args.val_size} validation images leave none of {available}")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(argv)
    datasets = [load_data(args, seed) for seed in range(args.seeds)]
    num_runs = len(GRID) + 2 + len(TUNED)
    with tqdm(total=args.seeds * num_runs * args.steps, unit="step") as bar:
        results = [compare(args, data, seed, bar) for seed, data in enumerate(datasets)]
    print(f"\n{args.dataset}: {args.train_size} training, {args.val_size} validation, {len(datasets[0].test[1])} test images")
    print(table(results))
    args.out.mkdir(parents=True, exist_ok=True)
    curves, decay = args.out / "loss_curves.png", args.out / "learned_decay.png"
    draw_curves(results[0], curves)
    draw_decay(results[0][TUNED["element"]].decays["weight_decay/hidden.weight"], datasets[0].train[0], decay)
    print(f"\nPictures of seed 0: {curves} and {decay}")


if __name__ == "__main__":
    main()
