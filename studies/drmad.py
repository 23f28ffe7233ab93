"""How far DrMAD's direction is from the derivative of training, by length, number of points and momentum.

    python -m studies.drmad

A network 64-32-10 with tanh on 200 of scikit-learn's digits, batches of 100, SGD, a weight decay for each
weight; float64. Compared with Unrolled on the same training: cosine of the angle, share of right signs, and
length. It prints the table of docs/results/literature.md.
"""

from __future__ import annotations

from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from tabulate import tabulate
from torch import Tensor, nn

from torch_hypergrad import DrMAD, HyperOptimizer, Hyperparameter, Method, Unrolled

SEEDS = 3


def hypergradient(method: Method, num_steps: int, lr: float, momentum: float, seed: int) -> Tensor:
    """Of all decays, after training."""
    images, labels = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    images, labels = images[order].double() / 16, labels[order]
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()
    hyper = HyperOptimizer(
        model,
        torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum),
        lambda model, rows: F.cross_entropy(model(images[rows]), labels[rows]),
        [Hyperparameter("weight_decay", per="element", init=1e-3)],
        method,
        partial(torch.optim.SGD, lr=0.0),
    )
    for _ in range(num_steps):
        hyper.step(torch.randint(200, (100,), generator=generator))
    return torch.cat([part.flatten() for part in hyper.hypergradient(torch.arange(200, 700)).values()])


def row(num_steps: int, lr: float, momentum: float) -> list[list[str]]:
    """A row for each number of points: cosine, signs and length, means over seeds."""
    exact = [hypergradient(Unrolled(), num_steps, lr, momentum, seed) for seed in range(SEEDS)]
    rows = []
    for num_points in sorted({max(1, num_steps // 10), num_steps // 2, num_steps}):
        found = [hypergradient(DrMAD(num_points), num_steps, lr, momentum, seed) for seed in range(SEEDS)]
        cosine = sum(F.cosine_similarity(a, b, dim=0).item() for a, b in zip(found, exact)) / SEEDS
        signs = sum((a.sign() == b.sign()).double().mean().item() for a, b in zip(found, exact)) / SEEDS
        length = sum((a.norm() / b.norm()).item() for a, b in zip(found, exact)) / SEEDS
        numbers = [f"{cosine:.3f}", f"{100 * signs:.0f} %", f"{length:.3g}"]
        rows.append([str(num_steps), f"{lr:g}", f"{momentum:g}", str(num_points), *numbers])
    return rows


def main() -> None:
    """Measures all and prints the table."""
    torch.set_num_threads(1)
    cases = [*product((20, 300), (0.02, 0.1), (0.0,)), (300, 0.1, 0.9)]
    rows = [line for case in cases for line in row(*case)]
    print(
        tabulate(rows, ["T", "lr", "momentum", "points", "cosine", "right signs", "length / exact"], "github")
    )


if __name__ == "__main__":
    main()
