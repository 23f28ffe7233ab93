"""Work to an accurate hypergradient: products with the curvature that each solver needs, on trained networks.

    python -m studies.solvers [--data FOLDER] [--output docs/results] [--max_products 400]

Logistic regression on scikit-learn's digits, and an MLP and a CNN on MNIST (torchvision's layout in FOLDER;
without it on digits too) are trained with Adam and AdamW. Then each solver takes more and more products
for the hypergradient of the weight decay, per element and per group, which is compared with a dense
or converged solution in float64 at the same weights. All products are counted: power iterations, random
directions and checks of the residual.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh
from tabulate import tabulate
from torch import Tensor, nn

from benchmarks.models import Batch, loss_of
from torch_hypergrad import (
    CG,
    Cholesky,
    HyperOptimizer,
    Hyperparameter,
    Implicit,
    Neumann,
    Nystrom,
    SolveInfo,
    Solver,
    SolverError,
)

LEVELS = (1e-2, 1e-3)
DAMPING = 0.1
RANK = 20
OPTIMIZERS: dict[str, Callable] = {
    "Adam": partial(torch.optim.Adam, lr=1e-3, weight_decay=1e-3),
    "AdamW": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
}


def linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def mlp(pixels: int) -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(pixels, 256), nn.ReLU(), nn.Linear(256, 10))


def cnn(pixels: int) -> nn.Module:
    shrink, stride = (nn.AvgPool2d(2), 2) if pixels == 784 else (nn.Identity(), 1)
    return nn.Sequential(
        shrink,
        nn.Conv2d(1, 6, 3, stride=stride),
        nn.ReLU(),
        nn.Conv2d(6, 12, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(192, 10),
    )


def digits() -> Batch:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.images, dtype=torch.float32)[order, None]
    return (images - images.mean()) / images.std(), torch.tensor(data.target)[order]


def mnist(folder: str) -> Batch:
    from torchvision.datasets import MNIST

    data = MNIST(folder)
    images = data.data[:2000, None].float()
    return (images - images.mean()) / images.std(), data.targets[:2000]


@dataclass
class Problem:
    """A trained model, and the batches that its hypergradient is taken on."""

    name: str
    optimizer_name: str
    model: nn.Module
    optimizer: torch.optim.Optimizer
    train: Batch
    val: Batch

    def wrapped(self, method: Implicit, *, double: bool = False, per: str = "element") -> HyperOptimizer:
        """A copy at the trained weights, with the training batch recorded."""
        model = copy.deepcopy(self.model)
        optimizer = OPTIMIZERS[self.optimizer_name](model.parameters())
        optimizer.load_state_dict(copy.deepcopy(self.optimizer.state_dict()))
        if double:
            model.double()
            optimizer.load_state_dict(optimizer.state_dict())  # casts the state
        tune = [Hyperparameter("weight_decay", per=per)]
        hyper = HyperOptimizer(model, optimizer, loss_of, tune, method, partial(torch.optim.SGD, lr=0.0))
        weights = [p.detach().clone() for p in model.parameters()]
        hyper.step(self.cast(self.train, double))
        with torch.no_grad():
            for p, w in zip(model.parameters(), weights):
                p.copy_(w)
        return hyper

    def cast(self, batch: Batch, double: bool) -> Batch:
        return (batch[0].double(), batch[1]) if double else batch

    def hypergradient(self, method: Implicit, *, double: bool = False) -> Tensor:
        found = self.wrapped(method, double=double).hypergradient(self.cast(self.val, double))
        return torch.cat([part.reshape(-1) for part in found.values()]).double()


def trained(
    name: str, optimizer_name: str, make: Callable[[], nn.Module], data: Batch, num: int, num_steps: int
) -> Problem:
    torch.manual_seed(0)
    model = make()
    optimizer = OPTIMIZERS[optimizer_name](model.parameters())
    train, val = (data[0][:num], data[1][:num]), (data[0][num : 2 * num], data[1][num : 2 * num])
    for _ in range(num_steps):
        chosen = torch.randint(num, (128,))
        optimizer.zero_grad()
        loss_of(model, (train[0][chosen], train[1][chosen])).backward()
        optimizer.step()
    return Problem(name, optimizer_name, model, optimizer, train, val)


# ---- measuring ---------------------------------------------------------------------------------------------


class Remembered:
    """Products by their place in a run: a solver run again with a larger budget takes only the new ones."""

    def __init__(self, matvec: Callable[[Tensor], Tensor]) -> None:
        self.matvec, self.known, self.place = matvec, [], 0

    def __call__(self, v: Tensor) -> Tensor:
        key = torch.stack([v.sum(), v.abs().sum(), v.norm(), v[: len(v) // 2].sum()])
        if self.place < len(self.known) and (key - self.known[self.place][0]).norm() > 1e-4 * key.norm():
            del self.known[self.place :]  # another run from here on
        if self.place == len(self.known):
            self.known.append((key, self.matvec(v)))
        self.place += 1
        return self.known[self.place - 1][1].clone()


@dataclass(frozen=True)
class Fixed(Solver):
    """Gives what it is told, to learn how the hypergradient depends on the solution."""

    def solve(self, matvec: Callable, b: Tensor) -> tuple[Tensor, SolveInfo]:
        return torch.ones_like(b), SolveInfo(0, None)


@dataclass(frozen=True)
class Curve:
    """The error of one solver on one problem."""

    products: list[int] = field(default_factory=list)
    per_element: list[float] = field(default_factory=list)
    per_group: list[float] = field(default_factory=list)
    end: str = ""

    def reached(self, level: float, errors: list[float]) -> str:
        """Products after which the error stays at or below ``level``."""
        last = max((i for i, e in enumerate(errors) if not e <= level), default=-1)
        if last + 1 < len(errors):
            return str(self.products[last + 1])
        return self.end or (f"> {self.products[-1]}" if self.products else "-")


@dataclass(frozen=True, eq=False)
class Measure(Solver):
    """Runs a solver with one budget after the other on the system that it is given."""

    make: Callable[[int], Solver]
    budgets: list[int]
    slope: Tensor  # the derivative of each entry of the hypergradient in each entry of the solution
    reference: Tensor
    curve: dict[str, Curve] = field(default_factory=dict)

    def solve(self, matvec: Callable, b: Tensor) -> tuple[Tensor, SolveInfo]:
        remembered, curve = Remembered(matvec), Curve()
        for budget in self.budgets:
            remembered.place = 0
            try:
                x, info = self.make(budget).solve(remembered, b)
            except SolverError as error:
                curve = Curve(
                    curve.products, curve.per_element, curve.per_group, f"fails: {str(error).split(':')[0]}"
                )
                break
            found = self.slope * x.double()
            curve.products.append(info.num_matvecs)
            curve.per_element.append(float((found - self.reference).norm() / self.reference.norm()))
            curve.per_group.append(abs(float(found.sum() / self.reference.sum()) - 1))
            stopped = len(curve.products) > 1 and curve.products[-1] == curve.products[-2]
            if stopped or max(curve.per_element[-1], curve.per_group[-1]) < LEVELS[-1] / 3:
                break
        self.curve["found"] = curve
        return torch.zeros_like(b), SolveInfo(0, None)


CONTESTANTS: dict[str, tuple[Callable[[float], Callable[[int], Solver]], str | None]] = {
    "Neumann": (lambda damping: lambda k: Neumann(k, damping=damping), None),
    "CG": (lambda damping: lambda k: CG(k, rtol=0.0, damping=damping), None),
    "Nystrom": (lambda damping: lambda k: Nystrom(RANK, damping, max_steps=k, rtol=0.0), None),
    "Nystrom alone": (lambda damping: lambda k: Nystrom(k, damping, max_steps=0), None),
    "Neumann, preconditioned": (lambda damping: lambda k: Neumann(k, damping=damping), "second_moments"),
    "CG, preconditioned": (lambda damping: lambda k: CG(k, rtol=0.0, damping=damping), "second_moments"),
}


def budgets(largest: int) -> list[int]:
    """1, 2, 3, ... and then a seventh more each time."""
    found = [1]
    while found[-1] < largest:
        found.append(min(largest, max(found[-1] + 1, int(found[-1] * 1.15))))
    return found


def reference(problem: Problem, curvature: str, damping: float) -> Tensor:
    """The hypergradient in float64: dense where that is possible, else converged."""
    if sum(p.numel() for p in problem.model.parameters()) < 1000:
        solver: Solver = Cholesky(damping)
    else:
        solver = CG(2000, rtol=1e-8, damping=damping)
    own_units = problem.optimizer_name == "AdamW" and damping == 0
    method = Implicit(solver, curvature=curvature, preconditioner="second_moments" if own_units else None)
    return problem.hypergradient(method, double=True)


def compete(
    problem: Problem, curvature: str, damping: float, expected: Tensor, max_products: int
) -> Iterator[tuple[str, Curve]]:
    for name, (make, preconditioner) in CONTESTANTS.items():
        if (damping > 0 and preconditioner is not None) or (damping == 0 and name == "Nystrom alone"):
            continue  # damping in other units is another system; and without damping there is no inverse
        method = partial(Implicit, curvature=curvature, preconditioner=preconditioner)
        slope = problem.hypergradient(method(Fixed()))
        largest = min(100, max_products) if name == "Nystrom alone" else max_products
        steps = [1, 5, 20, 50, 100] if name == "Nystrom alone" else budgets(largest)
        measure = Measure(make(damping), steps, slope, expected)
        problem.wrapped(method(measure)).hypergradient(problem.val)
        yield name, measure.curve["found"]


def ends_of_the_spectrum(problem: Problem, curvature: str) -> tuple[float, float]:
    """Of the curvature with decay: the least and the greatest, by Lanczos."""
    found: list[float] = []

    class Lanczos(Solver):
        def solve(self, matvec: Callable, b: Tensor) -> tuple[Tensor, SolveInfo]:
            product = lambda v: matvec(torch.from_numpy(v.reshape(-1)).to(b)).double().numpy()  # noqa: E731
            operator = LinearOperator((len(b), len(b)), matvec=product, dtype=np.float64)
            start = np.random.default_rng(0).standard_normal(len(b))
            ends = eigsh(operator, k=2, which="BE", v0=start, ncv=30, tol=0.05, return_eigenvectors=False)
            found.extend((ends.min(), ends.max()))
            return torch.zeros_like(b), SolveInfo(0, None)

    problem.wrapped(Implicit(Lanczos(), curvature=curvature)).hypergradient(problem.val)
    return found[0], found[1]


def outcomes(problem: Problem) -> list[list[str]]:
    """What each solver says on the Hessian as it is."""
    rows = []
    for name, (make, preconditioner) in CONTESTANTS.items():
        if name == "Nystrom alone":
            continue
        for budget in (20, 200):
            method = Implicit(make(0.0)(budget), preconditioner=preconditioner)
            try:
                report = problem.wrapped(method).hyper_step(problem.val)
                says = f"gives a value, residual {report.residual:.2g}"
            except SolverError as error:
                says = "SolverError: " + str(error).split(":")[0].split(". ")[0]
            rows.append([f"{problem.name}, {problem.optimizer_name}", f"{name}, {budget} steps", says])
    return rows


@dataclass
class Found:
    """What the tables and the plot show."""

    spectra: list[list[object]] = field(default_factory=list)
    rows: list[list[object]] = field(default_factory=list)
    said: list[list[str]] = field(default_factory=list)
    agreements: list[list[str]] = field(default_factory=list)
    curves: dict[tuple[str, str, float, str], Curve] = field(default_factory=dict)

    def tables(self) -> str:
        levels = [f"{100 * level:g} %, {per}" for level in LEVELS for per in ("element", "group")]
        heads = {
            ("problem", "weights", "least eigenvalue", "greatest"): self.spectra,
            ("problem", "curvature", "solver", *levels): self.rows,
            ("problem", "solver", "on the Hessian as it is"): self.said,
            ("problem", "Gauss-Newton's hypergradient from the Hessian's"): self.agreements,
        }
        return "\n\n".join(tabulate(r, head, "github", disable_numparse=True) for head, r in heads.items())


def study(problem: Problem, max_products: int, found: Found) -> None:
    """Everything about one problem."""
    title, logistic = f"{problem.name}, {problem.optimizer_name}", "logistic" in problem.name
    low, high = ends_of_the_spectrum(problem, "hessian")
    num_weights = sum(p.numel() for p in problem.model.parameters())
    found.spectra.append([title, num_weights, f"{low:.2g}", f"{high:.2g}"])
    if low < 0:
        found.said += outcomes(problem)
    race(problem, title, "hessian" if logistic else "gauss_newton", 0.0, max_products, found)
    if not logistic and problem.optimizer_name == "Adam":
        expected = race(problem, title, "hessian", DAMPING, max_products, found)
        other = reference(problem, "gauss_newton", DAMPING)
        found.agreements.append([title, f"{float((other - expected).norm() / expected.norm()):.2g}"])


def race(
    problem: Problem, title: str, curvature: str, damping: float, max_products: int, found: Found
) -> Tensor:
    """Lets all solvers compete on one system; the reference."""
    expected = reference(problem, curvature, damping)
    for name, curve in compete(problem, curvature, damping, expected, max_products):
        found.curves[title, curvature, damping, name] = curve
        errors = (curve.per_element, curve.per_group)
        hits = [curve.reached(level, of_kind) for level in LEVELS for of_kind in errors]
        found.rows.append([title, curvature + (f", damping {damping}" if damping else ""), name, *hits])
        print(*found.rows[-1], sep=" | ", flush=True)
    return expected


def kinds(folder: str | None) -> list[tuple[str, Callable[[], nn.Module], Batch, int, int]]:
    """Name, model, data, number of images and of steps of each problem."""
    pictures, source = (mnist(folder), "MNIST") if folder else (digits(), "digits")
    pixels = pictures[0][0].numel()
    return [
        ("logistic regression, digits", linear, digits(), 800, 3000),
        (f"MLP, {source}", partial(mlp, pixels), pictures, 500, 1500),
        (f"CNN, {source}", partial(cnn, pixels), pictures, 500, 1500),
    ]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder with MNIST in torchvision's layout; without it, digits")
    parser.add_argument("--output", type=Path, help="folder for solvers_table.md and solvers.png")
    parser.add_argument("--max_products", type=int, default=400)
    return parser.parse_args()


def main() -> None:
    options, found = parse(), Found()
    torch.set_num_threads(1)
    for (name, *rest), optimizer_name in product(kinds(options.data), OPTIMIZERS):
        start = time.perf_counter()
        study(trained(name, optimizer_name, *rest), options.max_products, found)
        print(f"{name}, {optimizer_name}: {time.perf_counter() - start:.0f} s", flush=True)
    print(found.tables())
    if options.output:
        options.output.mkdir(parents=True, exist_ok=True)
        (options.output / "solvers_table.md").write_text(found.tables() + "\n")
        plot(found.curves, options.output / "solvers.png")


def plot(curves: dict[tuple[str, str, float, str], Curve], file: Path) -> None:
    from matplotlib.figure import Figure

    panels = list(dict.fromkeys(key[:2] for key in curves if key[2] == 0))
    figure = Figure(figsize=(12, 6.5), layout="constrained")
    axes = figure.subplots(2, (len(panels) + 1) // 2, sharey=True)
    for axis, panel in zip(axes.T.reshape(-1), panels):
        for i, name in enumerate(CONTESTANTS):
            curve = curves.get((*panel, 0.0, name))
            if curve is not None:
                axis.loglog(curve.products, curve.per_element, label=name, color=f"C{i}")
        for level in LEVELS:
            axis.axhline(level, color="0.7", linewidth=0.8)
        axis.set(title="\n".join(panel), xlabel="products", ylim=(LEVELS[-1] / 5, 3))
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error, per element")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
