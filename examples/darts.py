"""DARTS: which operations make the better cell? A mixture of all is trained, and its shares are tuned.

As in Liu, Simonyan and Yang 2019, on a cell of two edges with four operations each. Shares, the softmax of a
tensor, follow the derivative of the validation loss after each training step: through the step (order 2), or
directly alone (order 1: training reads the tensor detached). Each edge keeps its strongest operation. Of some
searches, the paper keeps the cell with the lowest validation loss when trained alone; here all 16 are.

    python examples/darts.py
    python examples/darts.py --dataset mnist --data-root data --download

It draws the shares over time; two to three minutes on scikit-learn's digits.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from command_line import option_parser, parse, saved, table
from common import Data, accuracy_of, load_data, loss_value, plain_step, random_batches, tuning_seeds
from torch_hypergrad import HyperOptimizer, Hyperparameter, t1t2

SIZES, WIDTH, BATCH_SIZE = {"digits": (500, 500), "mnist": (5000, 5000)}, 8, 32
SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.9, weight_decay=3e-4)
OPERATIONS = ("max of 3 x 3", "mean of 3 x 3", "1 x 1", "3 x 3")


class Edge(nn.Module):
    """The four candidates, weighed by shares. Each is normalized, so that none is stronger by its scale."""

    def __init__(self) -> None:
        super().__init__()
        self.pixel, self.patch = nn.Conv2d(WIDTH, WIDTH, 1), nn.Conv2d(WIDTH, WIDTH, 3, padding=1)

    def forward(self, x: Tensor, shares: Tensor) -> Tensor:
        pools = (partial(pool, kernel_size=3, stride=1, padding=1) for pool in (F.max_pool2d, F.avg_pool2d))
        candidates = (*pools, lambda x: self.pixel(x.relu()), lambda x: self.patch(x.relu()))
        return sum(share * F.group_norm(of(x), 1) for share, of in zip(shares, candidates) if share > 0)


class Network(nn.Module):
    """A convolution that halves the image, the cell, and a linear layer on the means over quarters."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.edges = nn.Conv2d(1, WIDTH, 3, 2, padding=1), nn.ModuleList([Edge(), Edge()])
        self.head = nn.Linear(WIDTH * 4, 10)

    def forward(self, images: Tensor, shares: Tensor) -> Tensor:
        side = int(images.shape[1] ** 0.5)
        x = self.stem(images.view(-1, 1, side, side)).relu()
        for edge, of_edge in zip(self.edges, shares):
            x = edge(x, of_edge)
        return self.head(F.adaptive_avg_pool2d(x, 2).flatten(1))


def mixed_loss(model: nn.Module, batch: tuple[Tensor, Tensor], mixture: Tensor) -> Tensor:
    return F.cross_entropy(model(batch[0], mixture.softmax(1)), batch[1])


def search(data: Data, num_steps: int, seed: int, order: int) -> Tensor:
    """The shares of each operation on each edge, after each step."""
    model, mixture = Network(seed), torch.zeros(2, 4, requires_grad=True)
    hyper = HyperOptimizer(
        model,
        SGD(model.parameters()),
        partial(mixed_loss, mixture=mixture if order == 2 else mixture.detach()),
        tune=[Hyperparameter.of(mixture, "mixture")],
        method=t1t2(),
        hyper_optimizer=partial(torch.optim.Adam, lr=0.02, betas=(0.5, 0.999)),
        val_loss=partial(mixed_loss, mixture=mixture),
    )
    path, val_batches = [], random_batches(data.val, num_steps, BATCH_SIZE, seed + 1)
    for batch, val_batch in zip(random_batches(data.train, num_steps, BATCH_SIZE, seed), val_batches):
        hyper.step(batch)
        hyper.hyper_step(val_batch)
        path.append(mixture.detach().softmax(1))
    return torch.stack(path)


def retrain(cell: tuple[int, int], data: Data, num_steps: int, seed: int) -> nn.Module:
    """One cell alone, as plain PyTorch: a function of images."""
    model, shares = Network(seed), F.one_hot(torch.tensor(cell), 4).float()
    alone, optimizer = partial(model, shares=shares), SGD(model.parameters())
    for batch in random_batches(data.train, num_steps, BATCH_SIZE, seed):
        plain_step(alone, optimizer, batch)
    return alone


def scores_of(cell: tuple[int, int], data: Data, num_steps: int, seeds: Sequence[int]) -> list[float]:
    """Validation loss, test loss and test accuracy, means over seeds."""
    models = [retrain(cell, data, num_steps, seed) for seed in seeds]
    measures = ((loss_value, data.val), (loss_value, data.test), (accuracy_of, data.test))
    return [statistics.mean(of(model, part) for model in models) for of, part in measures]


def draw(paths: dict[int, list[Tensor]]) -> Figure:
    """Orders in rows, edges in columns, a line for each search."""
    figure = Figure(figsize=(9.5, 6), layout="constrained")
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    for (order, number), panel in zip(product(paths, range(2)), panels):
        for place, color in enumerate(("#999999", "#E69F00", "#0072B2", "#D55E00")):
            lines = torch.stack([path[:, number, place] for path in paths[order]], dim=1)
            panel.plot(lines, color=color, label=[OPERATIONS[place]] + [None] * (lines.shape[1] - 1))
        panel.set(title=f"order {order}, edge {number + 1}", ylim=(0, 1))
        panel.grid(alpha=0.3)
    figure.supxlabel("training step")
    figure.supylabel("share")
    panels[0].legend(frameon=False)
    return figure


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(option_parser(__doc__, "darts", steps=400, seeds=4), argv, SIZES)
    data, paths = load_data(args)[0], {2: [], 1: []}
    for seed, order in tqdm(list(product(range(args.seeds), paths)), unit="search"):
        paths[order].append(search(data, args.steps, seed, order))
    found = {order: [tuple(path[-1].argmax(1).tolist()) for path in paths[order]] for order in paths}
    cells, seeds = list(product(range(4), repeat=2)), tuning_seeds(args.seeds)
    names = {cell: ", ".join(OPERATIONS[place] for place in cell) for cell in cells}
    scores = {cell: scores_of(cell, data, args.steps, seeds) for cell in tqdm(cells, unit="cell")}
    ranked, rows = sorted(cells, key=lambda cell: scores[cell][0]), []
    for rank, cell in enumerate(ranked, start=1):
        finders = [", ".join(str(seed) for seed, of in enumerate(found[o]) if of == cell) for o in paths]
        rows.append([names[cell], rank, *(f"{of:#.3g}" for of in scores[cell]), *finders])
    print(f"\n{args.dataset}: {args.steps} training steps, means of {args.seeds} retrained networks\n")
    headers = ["cell", "rank", "validation loss", "test loss", "accuracy (%)", "found by: order 2", "order 1"]
    print(table(headers, rows))
    for order in paths:
        rank, best = min((ranked.index(cell) + 1, cell) for cell in found[order])
        print(f"\nOrder {order}, the best cell found: {names[best]}: rank {rank} of {len(cells)}")
    print(f"\nPicture of the shares: {saved(draw(paths), args.out / 'shares.png')}")


if __name__ == "__main__":
    main()
