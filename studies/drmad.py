"""DrMAD's open questions: which path between the first weights and the last, how many points, which step.

    python -m studies.drmad --out docs/results

Digits and a network with one hidden layer of 32, a weight decay for each weight; float64, means over seeds.
Directions are compared with the exact derivative of the same training (Unrolled): cosine of the angle, share
of right signs, and length. Paths are compared by plain PyTorch (studies/drmad_paths.py), which agrees with
the library where that has them, as is checked first. It takes about ten minutes on one core, most of them for
the loops over 15 trainings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import jsonargparse
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor, nn

from studies.drmad_paths import BATCH_SIZE, DECAY, NUM_TRAIN, Sweep, data, paths, trained, visited
from studies.drmad_paths import hypergradient as by_hand
from torch_hypergrad import DrMAD, HyperOptimizer, Hyperparameter, Method, Unrolled

TABLES = "<!-- tables: written by studies/drmad.py -->"
T, LR, ROUNDS = 300, 0.1, 15
POINTS = (T // 100, T // 30, T // 10, T // 4, T // 2, T)
MOMENTA = (0.0, 0.9)
VAL, TEST = torch.arange(NUM_TRAIN, NUM_TRAIN + 500), torch.arange(NUM_TRAIN + 500, 1797)
SCALINGS = {
    "each point once": Sweep(),
    "the sum times T/P": Sweep(factor=T / POINTS[2]),
    "the learning rate times T/P": Sweep(lr_factor=T / POINTS[2]),
    "each point T/P times": Sweep(per_point=T // POINTS[2]),
}
Row = list[str]


def wrapped(
    images: Tensor, labels: Tensor, tune: Hyperparameter, method: Method, momentum: float, lr: float, steps
) -> HyperOptimizer:
    """The network of the paths, as a module, whose hyper optimizer is ``steps``."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Tanh(), nn.Linear(32, 10)).double()

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        return F.cross_entropy(model(images[rows]), labels[rows])

    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum)
    return HyperOptimizer(model, sgd, loss, [tune], method, steps)


def by_library(
    method: Method, num_steps: int, lr: float, momentum: float, seed: int, tune: Hyperparameter
) -> Tensor:
    """The hypergradient after training from random weights."""
    torch.manual_seed(seed)
    images, labels, generator = data(seed)
    hyper = wrapped(images, labels, tune, method, momentum, lr, partial(torch.optim.SGD, lr=0.0))
    for _ in range(num_steps):
        hyper.step(torch.randint(NUM_TRAIN, (BATCH_SIZE,), generator=generator))
    return joined(hyper.hypergradient(VAL).values())


def joined(parts) -> Tensor:
    return torch.cat([part.flatten() for part in parts])


def compared(found: Sequence[Tensor], exact: Sequence[Tensor]) -> tuple[float, float, float]:
    """Cosine, share of right signs, and length over the right one: means over pairs."""
    pairs = list(zip(found, exact))
    numbers = (
        [F.cosine_similarity(a, b, dim=0).item() for a, b in pairs],
        [(a.sign() == b.sign()).double().mean().item() for a, b in pairs],
        [(a.norm() / b.norm()).item() for a, b in pairs],
    )
    cosine, signs, length = (sum(kind) / len(pairs) for kind in numbers)
    return cosine, signs, length


def cells(found: Sequence[Tensor], exact: Sequence[Tensor]) -> Row:
    cosine, signs, length = compared(found, exact)
    return [f"{cosine:.3f}", f"{100 * signs:.0f} %", f"{length:.2g}"]


# ---- what is measured --------------------------------------------------------------------------------------


def check_against_the_library() -> None:
    """The same training, by hand and by the library: exactly, and on the straight line."""
    run, tune = trained(30, LR, 0.9, 0), Hyperparameter("weight_decay", per="element", init=DECAY)
    for method, name, num_points in ((Unrolled(), "states of training", 30), (DrMAD(7), "straight line", 7)):
        hyper = wrapped(run.images, run.labels, tune, method, 0.9, LR, partial(torch.optim.SGD, lr=0.0))
        nn.utils.vector_to_parameters(run.states[0].clone(), hyper.model.parameters())
        for rows in run.batches:
            hyper.step(rows)
        how = Sweep(factor=30 / num_points)
        expected = by_hand(run, paths(run)[name], visited(30, num_points), how)
        found = joined(hyper.hypergradient(VAL).values())
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-15)


def lengths_of_training(seeds: int) -> list[Row]:
    """The library's DrMAD over shorter and longer training."""
    tune, rows = Hyperparameter("weight_decay", per="element", init=DECAY), []
    for num_steps, lr, momentum in [*product((20, T), (0.02, 0.1), (0.0,)), (T, LR, 0.9)]:
        found = {
            num: [
                by_library(DrMAD(num) if num else Unrolled(), num_steps, lr, momentum, seed, tune)
                for seed in range(seeds)
            ]
            for num in (0, num_steps // 10, num_steps // 2, num_steps)
        }
        exact = found.pop(0)
        case = [str(num_steps), f"{lr:g}", f"{momentum:g}"]
        rows += [[*case, str(num), *cells(vectors, exact)] for num, vectors in found.items()]
    return rows


def what_is_tuned(seeds: int) -> list[Row]:
    """The same for settings of the way, of which most have few values."""
    rows = []
    for momentum, (name, per) in product(
        MOMENTA, product(("weight_decay", "lr", "momentum"), ("tensor", "element"))
    ):
        if name == "momentum" and momentum == 0:
            continue
        start = {"weight_decay": DECAY, "lr": LR, "momentum": momentum}[name]
        tune = Hyperparameter(name, per=per, init=start)  # type: ignore[arg-type]
        methods = (Unrolled(), DrMAD(T // 10), DrMAD(T))
        exact, *found = (
            [by_library(m, T, LR, momentum, seed, tune) for seed in range(seeds)] for m in methods
        )
        rows.append([f"{momentum:g}", name, per, *(cell for v in found for cell in cells(v, exact))])
    return rows


def which_path(momentum: float, seeds: int) -> tuple[list[Row], list[Row], dict[str, list[float]]]:
    """Rows of paths, and of ways to count the points; cosines by path for each number of points."""
    runs = [trained(T, LR, momentum, seed) for seed in range(seeds)]
    known = [paths(run) for run in runs]

    def found(name: str, num_points: int, how: Sweep) -> list[Tensor]:
        points = visited(T, num_points)
        return [by_hand(run, of_run[name], points, how) for run, of_run in zip(runs, known)]

    exact = found("states of training", T, Sweep())
    rows, cosines = [], {}
    for name in known[0]:
        vectors = [found(name, num, Sweep(factor=T / num)) for num in POINTS]
        cosines[name] = [compared(v, exact)[0] for v in vectors]
        shown = [vectors[POINTS.index(num)] for num in (T // 10, T)]
        rows.append([f"{momentum:g}", name, *(cell for v in shown for cell in cells(v, exact))])
    names = ("straight line", "line, by the distance from the start", "last state only", "states of training")
    ways = [
        [f"{momentum:g}", way, name, *cells(found(name, T // 10, how), exact)]
        for (way, how), name in product(SCALINGS.items(), names)
    ]
    return rows, ways, cosines


class Longest(torch.optim.SGD):
    """SGD by gradients whose largest entry is 1."""

    def step(self, closure=None):
        params = [p for group in self.param_groups for p in group["params"]]
        largest = max(p.grad.abs().max() for p in params)
        for p in params:
            p.grad.div_(largest)
        return super().step(closure)


STEPS: dict[str, list[Callable]] = {
    "signs, 0.5": [partial(torch.optim.Adam, lr=0.5, betas=(0.0, 0.0), eps=1e-12)],
    "signs, 0.1": [partial(torch.optim.Adam, lr=0.1, betas=(0.0, 0.0), eps=1e-12)],
    "Adam, 0.5": [partial(torch.optim.Adam, lr=0.5, eps=1e-12)],
    "the largest entry 0.5, 2 or 8": [partial(Longest, lr=lr) for lr in (0.5, 2, 8)],
    "as it is, times 10, 100 or 1000": [partial(torch.optim.SGD, lr=lr) for lr in (10, 100, 1000)],
}


def tuned(steps: Callable, method: Method, seed: int) -> Tensor:
    """Validation loss at the start and the end of 15 rounds, and the test loss there."""
    torch.manual_seed(seed)
    images, labels, _ = data(seed)
    tune = Hyperparameter("weight_decay", per="element", init=0.03, high=0.5 / LR, log=True)
    hyper = wrapped(images, labels, tune, method, 0.9, LR, steps)
    losses = []
    for number in range(ROUNDS + 1):
        hyper.restart()
        generator = torch.Generator().manual_seed(1000 * seed + number)
        for _ in range(T):
            hyper.step(torch.randint(NUM_TRAIN, (BATCH_SIZE,), generator=generator))
        losses.append(hyper.validation_loss(VAL))
        if number < ROUNDS:
            hyper.hyper_step(VAL)
    return torch.stack([losses[0], losses[-1], hyper.validation_loss(TEST)])


def which_step(seeds: int) -> list[Row]:
    """For each kind of steps, the losses of the best of its lengths."""
    methods = {"DrMAD, T/10 points": DrMAD(), "exact (Unrolled)": Unrolled()}
    rows = []
    for (kind, sizes), (name, method) in product(STEPS.items(), methods.items()):
        every = [torch.stack([tuned(steps, method, s) for s in range(seeds)]).mean(0) for steps in sizes]
        best = min(every, key=lambda losses: losses[1].nan_to_num(torch.inf).item())
        rows.append([kind, name, *(f"{loss:.3f}" for loss in best.tolist())])
        print(rows[-1], flush=True)
    return rows


# ---- the page ----------------------------------------------------------------------------------------------


def draw(cosines: dict[float, dict[str, list[float]]]) -> Figure:
    """Cosine against the number of points."""
    shown = (
        "straight line",
        "line, by the distance from the start",
        "last state only",
        "first state only",
        "states of training",
    )
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    for axes, (momentum, by_path) in zip(figure.subplots(1, len(cosines), sharey=True), cosines.items()):
        for name in shown:
            axes.semilogx(POINTS, by_path[name], ".-", label=name)
        axes.set(title=f"momentum {momentum:g}", xlabel="points", ylabel="cosine with the derivative")
        axes.set_xticks(POINTS, map(str, POINTS), minor=False)
        axes.minorticks_off()
    axes.legend(fontsize="small")
    return figure


def main() -> None:
    """Measures all, prints the tables, and writes them below what stands on the page."""
    parser = jsonargparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, help="folder of drmad.md and drmad.png")
    options = parser.parse_args()
    torch.set_num_threads(1)
    check_against_the_library()
    measured = {momentum: which_path(momentum, options.seeds) for momentum in MOMENTA}
    numbers = ["cosine", "right signs", "length / exact"]
    tenth_and_all = [f"{points}: {number}" for points in ("T/10", "T") for number in numbers]
    tables = {
        "Paths": (
            ["momentum", "path", *tenth_and_all],
            [r for rows, _, _ in measured.values() for r in rows],
        ),
        "What a point stands for": (
            ["momentum", "T/10 points", "path", *numbers],
            [row for _, rows, _ in measured.values() for row in rows],
        ),
        "Lengths of training": (
            ["T", "lr", "momentum", "points", *numbers],
            lengths_of_training(options.seeds),
        ),
        "What is tuned": (["momentum", "setting", "per", *tenth_and_all], what_is_tuned(options.seeds)),
        "Steps": (
            ["step on log values", "by", "validation, first", "last", "test"],
            which_step(options.seeds),
        ),
    }
    text = "\n\n".join(
        f"## {title}\n\n{tabulate(rows, headers, 'github', disable_numparse=True)}"
        for title, (headers, rows) in tables.items()
    )
    print(text)
    if options.out is not None:
        page = options.out / "drmad.md"
        above = page.read_text().split(TABLES)[0] if page.exists() else ""
        page.write_text(f"{above}{TABLES}\n\n{text}\n")
        figure = draw({momentum: cosines for momentum, (_, _, cosines) in measured.items()})
        figure.savefig(options.out / "drmad.png", dpi=110)


if __name__ == "__main__":
    main()
