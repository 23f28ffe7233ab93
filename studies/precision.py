"""float32 against float64 hypergradients: where they part, why, what helps, and what tells beforehand.

    python -m studies.precision [--data FOLDER_WITH_MNIST] [--out docs/results/precision.md] [--seed 0]

Every run is trained twice, in float32 and in float64, from the same start on the same batches, and swept
three times: float32 along float32's states (what a user gets), float64 along float32's states, and float64
along float64's states (the reference). The first two differ by rounding in the sweep, the last two because
the trajectories differ. Hypergradients of the validation loss with respect to one learning rate and one
weight decay, after T = 10, 100 and 1,000 steps; and with learning rates at the edge of stability ("edge"),
where it is decided from where on to warn.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torch_hypergrad import HyperOptimizer, Unrolled

from .precision_sweep import (
    F32,
    F64,
    TUNED,
    AdamRoot,
    Optimizer,
    Problem,
    check_against_library,
    sweep,
    train,
)
from .precision_tables import draw, report

Row = dict[str, Any]
TABLES = "<!-- tables: written by studies/precision.py -->"
SECANT = 1.01
"""The learning rate is divided and multiplied by this for a difference quotient over
a distance that a user would move."""


class Conv(nn.Conv2d):
    """A convolution as a matrix product, which many rows at once are faster with."""

    def forward(self, x: Tensor) -> Tensor:
        side = (x.shape[-1] - 1) // self.stride[0] + 1
        columns = nn.functional.unfold(x, 3, padding=1, stride=self.stride)
        return (self.weight.flatten(1) @ columns + self.bias[:, None]).unflatten(2, (side, side))


def make_mlp(num_pixels: int, num_hidden: int) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(), nn.Linear(num_pixels, num_hidden), nn.ReLU(), nn.Linear(num_hidden, 10)
    )


def make_cnn() -> nn.Module:
    conv = [Conv(1, 6, 3, stride=2, padding=1), nn.ReLU(), Conv(6, 8, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*conv, nn.Flatten(), nn.Linear(32, 10))


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    return torch.tensor(data.images, dtype=F32)[:, None] / 16, torch.tensor(data.target)


def mnist(folder: Path) -> tuple[Tensor, Tensor]:
    from torchvision.datasets import MNIST

    data = MNIST(folder, train=True)
    return data.data[:4000, None] / 255, data.targets[:4000]


def make_problem(
    make: Callable[[], nn.Module], data: tuple[Tensor, Tensor], seed: int, num_steps: int
) -> Problem:
    """Half of the data to train on, half to validate; one row. Batches of 32."""
    generator = torch.Generator().manual_seed(seed)
    x, y = (tensor[torch.randperm(len(tensor), generator=generator.manual_seed(seed))] for tensor in data)
    half = len(y) // 2
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
    start = nn.utils.parameters_to_vector(model.parameters()).detach()[None]
    picks = torch.randint(half, (num_steps, 1, 32), generator=generator)
    return Problem(model, start, x[:half], y[:half], picks, (x[half:], y[half:]))


def optimizers(rates: dict[str, tuple[float, ...]]) -> dict[str, Optimizer]:
    """One row for each learning rate and eps."""

    def rows(lrs: tuple[float, ...], **others: tuple[float, ...]) -> dict[str, Tensor]:
        grid = torch.tensor(list(product(lrs, *others.values())), dtype=F64)
        return dict(zip(["lr", *others], grid.unbind(1)))

    adam, eps = rates["adam"], (1e-8, 1e-5)
    return {
        "SGD": Optimizer(
            torch.optim.SGD, rows(rates["sgd"], weight_decay=(1e-4,)), {"lr": 1.0, "momentum": 0.9}
        ),
        "Adam": Optimizer(torch.optim.Adam, rows(adam, weight_decay=(1e-4,), eps=eps)),
        "AdamW": Optimizer(torch.optim.AdamW, rows(adam, weight_decay=(1e-2,), eps=eps[:1])),
        "Adam root": Optimizer(
            AdamRoot, rows(adam[-2:], weight_decay=(1e-4,), eps=(0.0,), eps_root=(1e-16, 1e-10))
        ),
    }


def repeated(problem: Problem, num_rows: int) -> Problem:
    picks = problem.picks.expand(-1, num_rows, -1)
    return Problem(
        problem.model, problem.starts.expand(num_rows, -1), problem.x, problem.y, picks, problem.val
    )


def compare(
    problem_name: str, problem: Problem, name: str, optimizer: Optimizer, num_steps: tuple[int, ...]
) -> list[Row]:
    """All rows of one optimizer: two trainings and three sweeps each, and what helps."""
    num_rows = len(optimizer.rows["lr"])
    problem = repeated(problem, num_rows)
    found = []
    states = {dtype: train(problem, optimizer, dtype) for dtype in (F32, F64)}
    slopes = difference_quotients(problem, optimizer, num_steps)
    for t in num_steps:
        ours = sweep(problem, optimizer, states[F32][: t + 1], F32, F32)
        same = sweep(problem, optimizer, states[F32][: t + 1], F64, F64)
        exact = sweep(problem, optimizer, states[F64][: t + 1], F64, F64)
        mixed = (
            sweep(problem, optimizer, states[F32][: t + 1], F32, F64)
            if (name, t) == ("Adam", num_steps[-1])
            else ours
        )
        losses = problem.val_losses(states[F64][t].params)
        for i, tuned in product(range(num_rows), TUNED):
            row = {
                "problem": problem_name,
                "optimizer": name,
                "T": t,
                "tuned": tuned,
                "loss": losses[i].item(),
            }
            row |= {key: values[i].item() for key, values in optimizer.rows.items()}
            for key, found_by in {"ours": ours, "same": same, "exact": exact, "mixed": mixed}.items():
                row[key] = found_by.hypergradient[tuned][i].item()
            row |= {
                "terms": ours.terms[tuned][i].item(),
                "growth": {k: v[i].item() for k, v in ours.growth.items()},
            }
            row["truncated"] = {
                k: [s.truncated[k][tuned][i].item() for s in (ours, exact)] for k in exact.truncated if k < t
            }
            row["slope"] = slopes[t][i].item() if tuned == "lr" else None
            found.append(row)
    return found


def difference_quotients(
    problem: Problem, optimizer: Optimizer, num_steps: tuple[int, ...]
) -> dict[int, Tensor]:
    """By number of steps: the validation loss's slope over two per cent of the learning rate, in float64."""
    ends = []
    for factor in (SECANT, 1 / SECANT):
        rows = {**optimizer.rows, "lr": optimizer.rows["lr"] * factor}
        states = train(problem, Optimizer(optimizer.make, rows, optimizer.options), F64, keep=num_steps)
        ends.append([problem.val_losses(state.params) for state in states])
    width = optimizer.rows["lr"] * (SECANT - 1 / SECANT)
    return {t: (high - low) / width for t, high, low in zip(num_steps, *ends)}


def flat_spot(data: tuple[Tensor, Tensor], seed: int) -> list[Row]:
    """The derivative at weight decay 0 after 100 steps of Adam,
    beside slopes over larger and larger distances."""
    variants = {"eps": [1e-8, 1e-5, 1e-3, 0.0, 0.0], "eps_root": [0.0, 0.0, 0.0, 1e-16, 1e-10]}
    rows = {name: torch.tensor(values, dtype=F64) for name, values in variants.items()}
    rows |= {"lr": torch.full((5,), 0.01, dtype=F64), "weight_decay": torch.zeros(5, dtype=F64)}
    problem = repeated(make_problem(lambda: make_mlp(64, 64), data, seed, 100), 5)
    optimizer = Optimizer(AdamRoot, rows)
    states = train(problem, optimizer, F64)
    exact = sweep(problem, optimizer, states, F64, F64)
    states32 = train(problem, optimizer, F32)
    ours = sweep(problem, optimizer, states32, F32, F32)
    base = problem.val_losses(states[-1].params)
    found = [{k: v[i].item() for k, v in rows.items()} for i in range(5)]
    for i, row in enumerate(found):
        row |= {
            "exact": exact.hypergradient["weight_decay"][i].item(),
            "growth": exact.growth["params"][i].item(),
        }
        row["ours"] = ours.hypergradient["weight_decay"][i].item()
    for step in (1e-10, 1e-8, 1e-6, 1e-4, 1e-2):
        moved = Optimizer(AdamRoot, {**rows, "weight_decay": torch.full((5,), step, dtype=F64)})
        losses = problem.val_losses(train(problem, moved, F64)[-1].params)
        for i, row in enumerate(found):
            row[f"slope {step:.0e}"] = ((losses[i] - base[i]) / step).item()
    return found


def one_coordinate() -> list[Row]:
    """Ten steps of Adam with gradient 0, then ten with gradient c:
    the derivative of the end with respect to c."""
    found = []
    for c in (0.0, 1e-24, 1e-20, 1e-12, 1e-8, 1e-6, 1e-4):
        row: Row = {"c": c}
        for eps in (1e-8, 1e-5):
            model = nn.Linear(1, 1, bias=False)
            force = torch.tensor(c, requires_grad=True)
            hyper = HyperOptimizer(
                model,
                torch.optim.Adam(model.parameters(), lr=1e-3, eps=eps),
                lambda model, on, force=force: (on * force * model.weight).sum(),
                [("force", force)],
                Unrolled(),
                partial(torch.optim.SGD, lr=0.0),
                val_loss=lambda model, on: -model.weight.sum(),
            )
            for t in range(20):
                hyper.step(torch.tensor(float(t >= 10)))
            row[f"eps {eps:.0e}, float32"] = hyper.hypergradient(None)["force"].item()
            row[f"eps {eps:.0e}, formula"] = sum(1e-3 * adam_slope(c, eps, t + 1, 10) for t in range(10, 20))
        found.append(row)
    return found


def adam_slope(c: float, eps: float, step: int, num_zeros: int) -> float:
    """Derivative of Adam's step over lr with respect to a gradient c that began after ``num_zeros`` zeros."""
    first = (1 - 0.9 ** (step - num_zeros)) / (1 - 0.9**step)
    second = math.sqrt((1 - 0.999 ** (step - num_zeros)) / (1 - 0.999**step))
    return first * eps / (second * abs(c) + eps) ** 2


def study(options: argparse.Namespace) -> dict[str, list[Row]]:
    """All measurements."""
    data = digits()
    wide = {"sgd": (0.01, 0.1, 0.3, 0.6, 1.0, 1.5), "adam": (1e-3, 1e-2, 3e-2, 1e-1)}
    edge = {"sgd": (0.25, 0.35, 0.4, 0.45, 0.5, 0.55, 0.65, 0.7), "adam": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3)}
    few = {"sgd": (0.1, 1.0), "adam": (1e-2, 1e-1)}
    problems = {
        "digits MLP": (
            make_problem(lambda: make_mlp(64, 32), data, options.seed, 1000),
            wide,
            (10, 100, 1000),
        ),
        "digits MLP, edge": (
            make_problem(lambda: make_mlp(64, 32), data, options.seed + 10, 200),
            edge,
            (60, 100, 200),
        ),
        "digits CNN": (make_problem(make_cnn, data, options.seed, 1000), few, (10, 100, 1000)),
    }
    if options.data is not None:
        model = make_problem(lambda: make_mlp(784, 256), mnist(options.data), options.seed, 100)
        problems["MNIST MLP"] = (model, few, (10, 100))
    rows = []
    for problem_name, (problem, rates, num_steps) in problems.items():
        if options.only not in (None, problem_name):
            continue
        for name, optimizer in optimizers(rates).items():
            if problem_name != "digits MLP" and name not in ("SGD", "Adam"):
                continue  # for time
            short = Problem(**{**vars(problem), "picks": problem.picks[:10]})
            check_against_library(repeated(short, len(optimizer.rows["lr"])), optimizer)
            rows += [
                row | {"seed": options.seed}
                for row in compare(problem_name, problem, name, optimizer, num_steps)
            ]
            print(f"{problem_name}, {name}: done", flush=True)
    return {"runs": rows, "flat spot": flat_spot(data, options.seed), "one coordinate": one_coordinate()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", type=Path, help="a folder with MNIST as torchvision keeps it; without, only digits"
    )
    parser.add_argument(
        "--out", type=Path, help="write the tables there, below what stands there, and a plot"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", help="one of the problems, for instance 'digits MLP, edge'")
    parser.add_argument(
        "--rows", type=Path, nargs="+", help="read measurements from these files, do not measure"
    )
    parser.add_argument("--save", type=Path, help="write the measurements there, as JSON")
    options = parser.parse_args()
    files = [json.loads(path.read_text()) for path in options.rows or ()] or [study(options)]
    found = {key: [row for file in files for row in file[key]] for key in files[0]}
    if options.save is not None:
        options.save.write_text(json.dumps(found))
    text = report(found)
    print(text)
    if options.out is not None:
        above = options.out.read_text().split(TABLES)[0] if options.out.exists() else ""
        options.out.write_text(f"{above}{TABLES}\n\n{text}")
        draw(found["runs"], options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
