"""Every solver, row by row: what all of them promise. A new solver is its file, a line in
``solvers/__init__``, and a row here."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

import torch_hypergrad
from problems import Ridge
from torch_hypergrad import CG, Cholesky, Identity, Implicit, Neumann, Nystrom, Solver, SolverError
from torch_hypergrad.device import readings

RIDGE = Ridge.make()
A = RIDGE.matrix()
B = RIDGE.val_gradient(RIDGE.optimum())
EIGENVALUES = torch.linalg.eigvalsh(A)


@dataclass(frozen=True)
class Row:
    """A solver with options that make it exact, if it can be.

    Args:
        rtol: how exact.
        damped: the same with a damping of 0.5; None if it has none.
        coarse: the same stopped early by its own tolerance; None if it has none.
    """

    solver: Solver
    rtol: float = 1e-9
    damped: Solver | None = None
    coarse: Solver | None = None


ROWS = [
    Row(Neumann(600), damped=Neumann(600, damping=0.5)),
    Row(CG(50, 1e-13), damped=CG(50, 1e-13, damping=0.5), coarse=CG(50, 0.3)),
    Row(Nystrom(3, rtol=1e-13), damped=Nystrom(3, 0.5, rtol=1e-13), coarse=Nystrom(3, rtol=0.3)),
    Row(Cholesky(), damped=Cholesky(0.5)),
    Row(Identity(0.1), rtol=float("inf")),
]


def rows(chosen: list[Row]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", chosen, ids=lambda row: type(row.solver).__name__)


each = rows(ROWS)


def product(v: Tensor) -> Tensor:
    return A @ v


def relative(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).norm() / exact.norm())


def test_every_solver_has_a_row() -> None:
    exported = {getattr(torch_hypergrad, name) for name in torch_hypergrad.__all__}
    solvers = {kind for kind in exported if isinstance(kind, type) and issubclass(kind, Solver)} - {Solver}
    assert {type(row.solver) for row in ROWS} == solvers


@each
def test_the_solution_and_its_residual(row: Row) -> None:
    x, info = row.solver.solve(product, B)
    assert relative(x, torch.linalg.solve(A, B)) < row.rtol
    if info.residual is not None:
        assert float(info.residual) == pytest.approx(float((B - A @ x).norm() / B.norm()), abs=1e-12)
    row.solver.check({name: float(number) for name, number in info.numbers.items()})


@each
def test_products_are_counted(row: Row) -> None:
    calls = 0

    def counted(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return A @ v

    for x0 in (None, torch.ones_like(B)):
        calls = 0
        _, info = row.solver.solve(counted, B, x0=x0)
        assert info.num_matvecs in (calls, calls - 1)  # the start's own residual may be left out


@rows([row for row in ROWS if row.damped])
def test_damping_is_added_to_the_diagonal(row: Row) -> None:
    assert row.damped is not None
    x, info = row.damped.solve(product, B)
    assert relative(x, torch.linalg.solve(A + 0.5 * torch.eye(len(B), dtype=B.dtype), B)) < row.rtol
    assert info.damping == 0.5


@each
def test_it_goes_on_from_a_start(row: Row) -> None:
    """From the solution nothing is left to do, and from anywhere else it gets where it gets from 0."""
    exact = torch.linalg.solve(A, B)
    kept = exact.clone()
    x, _ = row.solver.solve(product, B, x0=exact)
    assert relative(x, exact) < 1e-9
    assert torch.equal(exact, kept), "the start was written to"
    x, _ = row.solver.solve(product, B, x0=torch.ones_like(B))
    assert relative(x, exact) < row.rtol


@rows([row for row in ROWS if row.coarse])
def test_a_tolerance_takes_the_place_of_its_own(row: Row) -> None:
    assert row.coarse is not None
    _, coarse = row.coarse.solve(product, B)
    _, fine = row.coarse.solve(product, B, rtol=1e-10)
    _, loose = row.solver.solve(product, B, rtol=0.3)
    assert loose.num_matvecs == coarse.num_matvecs < fine.num_matvecs


@each
def test_what_says_that_it_does_not_wait_does_not(row: Row, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a number of a tensor is what waits."""
    waited = []

    def item(tensor: Tensor) -> float:
        waited.append(tensor)
        return tensor.detach().numpy().item()

    for name in ("item", "__float__", "__bool__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, item)
    row.solver.solve(product, B)
    assert bool(len(waited)) == row.solver.waits


@each
def test_what_is_not_finite_is_refused(row: Row) -> None:
    def solve() -> None:
        _, info = row.solver.solve(product, B * float("nan"))
        row.solver.check({name: float(number) for name, number in info.numbers.items()})

    with pytest.raises(SolverError, match="norm nan"):
        solve()


@each
@pytest.mark.parametrize("late", [False, True])
def test_hypergradients_of_ridge_regression(row: Row, late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if late:
        monkeypatch.setattr(readings, "at_once", lambda tensor: False)
    hyper = RIDGE.at_optimum(Implicit(row.solver))
    (found,) = hyper.hypergradient(RIDGE.val).values()
    assert relative(found[0], RIDGE.hypergradient()) < row.rtol
    report = hyper.hyper_step(RIDGE.val)
    assert isinstance(report.num_matvecs, int)
    assert report.residual is None or isinstance(report.residual, float)


@each
def test_options_are_checked_and_instances_compare(row: Row) -> None:
    assert row.solver == replace(row.solver)  # type: ignore[type-var]
    assert hash(row.solver) == hash(replace(row.solver))  # type: ignore[type-var]
