"""Recorded batches without steps, evaluations, and solves that begin where the last one ended."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from problems import FROZEN, Ridge, logistic_regression, mse, random_batch, tanh_mlp, wrapped
from torch_hypergrad import (
    CG,
    Cholesky,
    ForwardMode,
    HyperOptimizer,
    Hyperparameter,
    Identity,
    Implicit,
    Neumann,
    Nystrom,
    SolverError,
    Unrolled,
)
from torch_hypergrad.bilevel import fit

DECAY = [Hyperparameter("weight_decay", init=0.1)]


def logistic(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.binary_cross_entropy_with_logits(model(x), y)


# ---- solvers ----------------------------------------------------------------------------------------------


def system(seed: int = 0, size: int = 30) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, size, size, generator=generator, dtype=torch.float64)
    return a @ a.T / size + 0.5 * torch.eye(size, dtype=torch.float64), b[0]


@pytest.mark.parametrize(
    "solver",
    [CG(max_steps=100, rtol=1e-8), Nystrom(10, max_steps=100, rtol=1e-8), Neumann(300), Identity(0.2)],
    ids=repr,
)
def test_a_start_near_the_solution_saves_products_and_a_useless_one_does_no_harm(solver):
    matrix, b = system()
    exact = torch.linalg.solve(matrix, b)
    cold, cold_info = solver.solve(lambda v: matrix @ v, b)
    near, near_info = solver.solve(lambda v: matrix @ v, b, x0=exact + 1e-6 * torch.ones_like(exact))
    wild, wild_info = solver.solve(lambda v: matrix @ v, b, x0=1e6 * torch.ones_like(exact))
    nothing, _ = solver.solve(lambda v: matrix @ v, b, x0=torch.full_like(exact, torch.nan))
    assert (near - exact).norm() <= (cold - exact).norm() + 1e-5
    if solver.keeps_rtol:
        assert near_info.num_matvecs < cold_info.num_matvecs
    for found in (wild, nothing):
        torch.testing.assert_close(found, cold, rtol=0, atol=0)
    assert wild_info.num_matvecs == cold_info.num_matvecs + 1


def test_the_start_is_not_written_to():
    matrix, b = system()
    for solver in (CG(), Nystrom(5), Neumann(), Identity(), Nystrom(5, damping=1.0, max_steps=0)):
        x0 = torch.linalg.solve(matrix, b)
        before, right = x0.clone(), b.clone()
        solver.solve(lambda v: matrix @ v, b, x0=x0)
        assert torch.equal(x0, before)
        assert torch.equal(b, right)


@pytest.mark.parametrize("make", [CG, Nystrom, Neumann])
def test_warm_start_is_true_or_false(make):
    with pytest.raises(TypeError, match="warm_start must be True or False, got 1"):
        make(warm_start=1)


# ---- through a HyperOptimizer -----------------------------------------------------------------------------


@pytest.mark.parametrize("preconditioner", [None, "second_moments"])
def test_a_warm_start_saves_products_and_gives_the_same_hypergradient(preconditioner):
    train, val = logistic_regression(width=30)

    def run(warm: bool) -> tuple[list[int], list[float]]:
        torch.manual_seed(0)
        model = nn.Linear(30, 1).double()
        method = Implicit(CG(max_steps=100, rtol=1e-7, warm_start=warm), preconditioner=preconditioner)
        hyper = HyperOptimizer(
            model, torch.optim.Adam(model.parameters(), lr=1e-2), logistic, DECAY, method, FROZEN
        )
        for _ in range(30):
            hyper.step(train)
        found = []
        for _ in range(4):
            hyper.step(train)
            found.append(hyper.evaluate(val))
        return [f.num_matvecs for f in found], [f.hypergradient["weight_decay/group0"].item() for f in found]

    (cold, expected), (warm, computed) = run(False), run(True)
    assert computed == pytest.approx(expected, rel=1e-5)
    assert warm[0] == cold[0]
    assert sum(warm[1:]) < sum(cold[1:])


def test_the_last_solution_is_a_part_of_a_checkpoint():
    train, val = logistic_regression()

    def make() -> HyperOptimizer:
        torch.manual_seed(0)
        model = nn.Linear(5, 1).double()
        return wrapped(model, DECAY, Implicit(Neumann(3, warm_start=True)), train_loss=logistic)

    hyper, other = make(), make()
    hyper.step(train)
    first = hyper.hypergradient(val)["weight_decay/group0"]
    other.load_state_dict(hyper.state_dict())
    again = [run.hypergradient(val)["weight_decay/group0"] for run in (hyper, other)]
    assert torch.equal(again[0], again[1])
    assert not torch.equal(first, again[0]), "three terms more"


def test_a_solution_of_other_parameters_is_not_started_from():
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1)).double()
    hyper = wrapped(model, DECAY, Implicit(CG(max_steps=100, rtol=1e-10, warm_start=True, damping=1.0)))
    batch, val = random_batch(20, 4, 1), random_batch(20, 4, 2)
    hyper.step(batch)
    hyper.hypergradient(val)
    model[0].requires_grad_(False)
    hyper.begin_window()
    hyper.record(batch)
    other = wrapped(model, DECAY, Implicit(CG(max_steps=100, rtol=1e-10, damping=1.0)))
    other.record(batch)
    name = "weight_decay/group0"
    torch.testing.assert_close(
        hyper.hypergradient(val)[name], other.hypergradient(val)[name], rtol=1e-8, atol=0
    )


def test_a_tolerance_is_given_per_call():
    problem = Ridge.make(width=12)
    model = nn.Linear(12, 1, bias=False).double()
    hyper = wrapped(model, DECAY, Implicit(CG(max_steps=100, rtol=1e-12)), train_loss=Ridge.loss)
    hyper.record(problem.train)
    rough, fine = hyper.evaluate(problem.val, rtol=0.1), hyper.evaluate(problem.val)
    assert rough.num_matvecs < fine.num_matvecs
    assert 1e-12 < rough.residual <= 0.1
    assert fine.residual <= 1e-12
    report = hyper.hyper_step(problem.val, rtol=0.1)
    assert (report.num_matvecs, report.residual) == (rough.num_matvecs, rough.residual)


@pytest.mark.parametrize(
    ("method", "rtol", "error", "words"),
    [
        (Unrolled(), 0.1, TypeError, "tolerance of a linear solve, and Unrolled has none"),
        (Implicit(Neumann(5)), 0.1, TypeError, "fixed amount of work and cannot keep to a tolerance"),
        (Implicit(Identity()), 0.1, TypeError, "cannot keep to a tolerance"),
        (Implicit(Nystrom(5, damping=1.0, max_steps=0)), 0.1, TypeError, "max_steps above 0"),
        (Implicit(CG()), "small", TypeError, "rtol must be a number"),
        (Implicit(CG()), -1.0, ValueError, "rtol must be finite and at least 0"),
    ],
)
def test_tolerances_that_nobody_can_keep_to_are_refused(method, rtol, error, words):
    hyper = wrapped(nn.Linear(4, 1), DECAY, method)
    with pytest.raises(error, match=words):
        hyper.hyper_step(random_batch(3, 4, 0), rtol=rtol)


# ---- batches that are recorded, and evaluations -----------------------------------------------------------


def test_a_recorded_batch_moves_nothing_and_gives_the_hypergradient_there():
    problem = Ridge.make()
    model = nn.Linear(6, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(problem.optimum())
    tune = [Hyperparameter("weight_decay", per="element", init=problem.decay)]
    hyper = wrapped(model, tune, Implicit(Cholesky()), train_loss=Ridge.loss)
    hyper.record(problem.train)
    assert torch.equal(model.weight[0], problem.optimum())
    (computed,) = hyper.hypergradient(problem.val).values()
    torch.testing.assert_close(computed[0], problem.hypergradient(), rtol=1e-10, atol=1e-12)


def test_recorded_batches_are_averaged_with_taken_ones():
    model = tanh_mlp()
    first, second, val = (random_batch(10, 4, seed) for seed in range(3))
    for method in (Implicit(CG(damping=3.0), num_batches=2),):
        recorded = wrapped(model, DECAY, method)
        recorded.record(first)
        recorded.record(second)
        whole = wrapped(model, DECAY, Implicit(CG(damping=3.0)))
        whole.record(tuple(torch.cat(parts) for parts in zip(first, second)))
        name = "weight_decay/group0"
        torch.testing.assert_close(
            recorded.hypergradient(val)[name], whole.hypergradient(val)[name], rtol=1e-6, atol=0
        )


@pytest.mark.parametrize("method", [Unrolled(), ForwardMode()], ids=repr)
def test_methods_that_differentiate_steps_refuse_to_record_without_one(method):
    hyper = wrapped(nn.Linear(4, 1), DECAY, method)
    with pytest.raises(TypeError, match=r"differentiates the training steps themselves.*method=Implicit"):
        hyper.record(random_batch(3, 4, 0))


def test_an_optimum_that_needs_the_optimizers_state_asks_for_a_step():
    model = nn.Linear(4, 1)
    hyper = HyperOptimizer(model, torch.optim.AdamW(model.parameters()), mse, DECAY, Implicit(CG()), FROZEN)
    hyper.record(tuple(part.float() for part in random_batch(3, 4, 0)))
    with pytest.raises(SolverError, match=r"depends on 'exp_avg_sq' of its state.*Call step"):
        hyper.hypergradient(tuple(part.float() for part in random_batch(3, 4, 1)))


@pytest.mark.parametrize("method", [Unrolled(), Implicit(CG(damping=3.0))], ids=repr)
def test_an_evaluation_is_loss_hypergradient_and_statistics_in_one(method):
    hyper = wrapped(tanh_mlp(), DECAY, method)
    batch, val = random_batch(10, 4, 0), random_batch(10, 4, 1)
    for _ in range(3):
        hyper.step(batch)
    found = hyper.evaluate(val)
    assert found.val_loss == hyper.validation_loss(val).item()
    assert found.hypergradient.keys() == hyper.values().keys()
    expected = hyper.hypergradient(val)["weight_decay/group0"]
    torch.testing.assert_close(found.hypergradient["weight_decay/group0"], expected, rtol=1e-12, atol=0)
    report = hyper.hyper_step(val)
    for name in ("val_loss", "num_matvecs", "residual", "product_error", "adjoint_growth", "warnings"):
        assert getattr(found, name) == getattr(report, name)


def test_a_window_can_be_begun_anew():
    batch, val = random_batch(10, 4, 0), random_batch(10, 4, 1)
    hyper = wrapped(tanh_mlp(), DECAY, Unrolled())
    hyper.step(batch)
    hyper.begin_window()
    with torch.no_grad():
        next(hyper.model.parameters()).mul_(0.5)
    hyper.step(batch)
    fresh = wrapped(tanh_mlp(), DECAY, Unrolled())
    fresh.step(batch)
    fresh.hyper_step(val)
    with torch.no_grad():
        next(fresh.model.parameters()).mul_(0.5)
    fresh.step(batch)
    assert torch.equal(
        hyper.hypergradient(val)["weight_decay/group0"], fresh.hypergradient(val)["weight_decay/group0"]
    )
    hyper.begin_window()
    hyper.set_values({"weight_decay/group0": torch.tensor(0.2)})
    assert hyper.values()["weight_decay/group0"].item() == pytest.approx(0.2)


def test_fit_goes_with_a_warm_start():
    train, val = logistic_regression()
    hyper = wrapped(
        nn.Linear(5, 1).double(), DECAY, Implicit(CG(rtol=1e-9, warm_start=True)), train_loss=logistic
    )
    counts = []
    for _ in range(2):
        fit(hyper, train, tol=1e-9)
        counts.append(hyper.evaluate(val).num_matvecs)
    assert counts[1] <= 2 < counts[0]
