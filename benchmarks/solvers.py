"""Work to an accurate hypergradient: products with the curvature that each solver needs, on trained networks.

    python benchmarks/solvers.py [--data FOLDER] [--output docs/results] [--max_products 400]

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
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy.sparse.linalg import LinearOperator, eigsh
from tabulate import tabulate
from torch import Tensor, nn

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

Batch = tuple[Tensor, Tensor]
LEVELS = (1e-2, 1e-3)
DAMPING = 0.1
RANK = 20
OPTIMIZERS: dict[str, Callable] = {
    "Adam": partial(torch.optim.Adam, lr=1e-3, weight_decay=1e-3),
    "AdamW": partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.1),
}


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


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


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", help="folder with MNIST in torchvision's layout; without it, digits")
    parser.add_argument("--output", type=Path, help="folder for solvers_table.md and solvers.png")
    parser.add_argument("--max_products", type=int, default=400)
    options = parser.parse_args()
    torch.set_num_threads(1)
    pictures = mnist(options.data) if options.data else digits()
    pixels = pictures[0][0].numel()
    kinds = [
        ("logistic regression, digits", linear, digits(), 800, 3000),
        ("MLP" + (", MNIST" if options.data else ", digits"), partial(mlp, pixels), pictures, 500, 1500),
        ("CNN" + (", MNIST" if options.data else ", digits"), partial(cnn, pixels), pictures, 500, 1500),
    ]
    rows, spectra, agreements, said, curves = [], [], [], [], {}
    for kind, optimizer_name in ((kind, o) for kind in kinds for o in OPTIMIZERS):
        start = time.perf_counter()
        problem = trained(kind[0], optimizer_name, *kind[1:])
        title = f"{problem.name}, {optimizer_name}"
        low, high = ends_of_the_spectrum(problem, "hessian")
        spectra.append(
            [title, sum(p.numel() for p in problem.model.parameters()), f"{low:.2g}", f"{high:.2g}"]
        )
        settings = [("gauss_newton", 0.0)] if "logistic" not in kind[0] else [("hessian", 0.0)]
        if low < 0:
            said += outcomes(problem)
        if "logistic" not in kind[0] and optimizer_name == "Adam":
            settings.append(("hessian", DAMPING))
        for curvature, damping in settings:
            expected = reference(problem, curvature, damping)
            if damping:
                other = reference(problem, "gauss_newton", damping)
                agreements.append([title, f"{float((other - expected).norm() / expected.norm()):.2g}"])
            for name, curve in compete(problem, curvature, damping, expected, options.max_products):
                curves[title, curvature, damping, name] = curve
                hits = [
                    curve.reached(level, errors)
                    for level in LEVELS
                    for errors in (curve.per_element, curve.per_group)
                ]
                rows.append([title, curvature + (f", damping {damping}" if damping else ""), name, *hits])
                print(*rows[-1], sep=" | ", flush=True)
        print(f"{title}: {time.perf_counter() - start:.0f} s", flush=True)
    shown = [
        tabulate(
            spectra, ["problem", "weights", "least eigenvalue", "greatest"], "github", disable_numparse=True
        ),
        tabulate(
            rows,
            [
                "problem",
                "curvature",
                "solver",
                "1 %, element",
                "1 %, group",
                "0.1 %, element",
                "0.1 %, group",
            ],
            "github",
            disable_numparse=True,
        ),
        tabulate(said, ["problem", "solver", "on the Hessian as it is"], "github", disable_numparse=True),
        tabulate(
            agreements,
            ["problem", "Gauss-Newton's hypergradient from the Hessian's"],
            "github",
            disable_numparse=True,
        ),
    ]
    print("\n\n".join(shown))
    if options.output:
        (options.output / "solvers_table.md").write_text("\n\n".join(shown) + "\n")
        plot(curves, options.output / "solvers.png")


def plot(curves: dict, file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = list(
        dict.fromkeys((title, curvature) for title, curvature, damping, _ in curves if damping == 0)
    )
    figure, axes = plt.subplots(
        2, (len(panels) + 1) // 2, figsize=(12, 6.5), sharey=True, constrained_layout=True
    )
    for axis, (title, curvature) in zip(axes.T.reshape(-1), panels):
        for i, name in enumerate(CONTESTANTS):
            curve = curves.get((title, curvature, 0.0, name))
            if curve is not None:
                axis.loglog(curve.products, curve.per_element, label=name, color=f"C{i}")
        for level in LEVELS:
            axis.axhline(level, color="0.7", linewidth=0.8)
        axis.set(title=f"{title}\n{curvature}", xlabel="products", ylim=(LEVELS[-1] / 5, 3))
    for axis in axes[:, 0]:
        axis.set_ylabel("relative error, per element")
    axes[0, 0].legend(fontsize=8)
    figure.savefig(file, dpi=110)


if __name__ == "__main__":
    main()
