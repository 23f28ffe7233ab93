"""Implicit hypergradients and solvers against closed forms and dense linear algebra."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from problems import GradientDescent, Ridge, logistic_regression, mse, random_batch, tanh_mlp, wrapped
from torch_hypergrad import (
    CG,
    Cholesky,
    HyperOptimizer,
    Hyperparameter,
    Identity,
    Implicit,
    Neumann,
    SolverError,
    Unrolled,
)
from torch_hypergrad.solvers import Solver
from torch_hypergrad.testing import derivative

RIDGE = Ridge.make()
EXACT: list[Solver] = [Cholesky(), CG(max_steps=50, rtol=1e-13), Neumann(num_terms=2000)]
name_of: Callable[[Any], str] = lambda value: type(value).__name__  # noqa: E731


def entry(hypergradient: dict[str, Tensor]) -> Tensor:
    (only,) = hypergradient.values()
    return only.reshape(-1)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("solver", EXACT, ids=name_of)
def test_ridge_with_one_decay_per_feature(solver: Solver) -> None:
    hyper = RIDGE.at_optimum(Implicit(solver))
    assert relative_error(entry(hyper.hypergradient(RIDGE.val)), RIDGE.hypergradient()) < 1e-8


@pytest.mark.parametrize("per", ["group", "tensor"])
def test_ridge_with_one_decay_for_all(per: str) -> None:
    """The derivative in the direction of all ones is the sum over the features; all decays are equal here."""
    ridge = Ridge(RIDGE.train, RIDGE.val, torch.full((6,), 0.3, dtype=torch.float64))
    model = nn.Linear(6, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(ridge.optimum())
    tune = [Hyperparameter("weight_decay", per=per, init=0.3)]  # type: ignore[arg-type]
    hyper = wrapped(
        model, tune, Implicit(Cholesky()), partial(torch.optim.SGD, lr=0.0), train_loss=ridge.loss
    )
    hyper.step(ridge.train)
    assert entry(hyper.hypergradient(ridge.val)).item() == pytest.approx(
        ridge.hypergradient().sum().item(), rel=1e-10
    )


def test_gradient_transform_does_not_move_the_optimum() -> None:
    hyper = RIDGE.at_optimum(Implicit(Cholesky()), grad_transform=lambda grads: [0.1 * g for g in grads])
    assert relative_error(entry(hyper.hypergradient(RIDGE.val)), RIDGE.hypergradient()) < 1e-8


@pytest.mark.parametrize("num_terms", [1, 5, 20, 80])
def test_neumann_follows_its_error_curve(num_terms: int) -> None:
    """In the eigenbasis of A the error of term K is exactly (1 - scale * eigenvalue)^K times the solution."""
    scale = 1.0 / float(torch.linalg.eigvalsh(RIDGE.matrix())[-1])
    w = RIDGE.optimum()
    eigenvalues, basis = torch.linalg.eigh(RIDGE.matrix())
    shrink = 1 - (1 - scale * eigenvalues) ** num_terms
    q = basis @ (shrink / eigenvalues * (basis.T @ RIDGE.val_gradient(w)))
    hyper = RIDGE.at_optimum(Implicit(Neumann(num_terms, scale=scale)))
    assert relative_error(entry(hyper.hypergradient(RIDGE.val)), -w * q) < 1e-10
    report = hyper.hyper_step(RIDGE.val)
    residual = RIDGE.val_gradient(w) - RIDGE.matrix() @ q
    assert report.residual == pytest.approx(float(residual.norm() / RIDGE.val_gradient(w).norm()), rel=1e-8)
    assert report.num_matvecs == num_terms


def test_the_scale_from_power_iterations_converges() -> None:
    hyper = RIDGE.at_optimum(Implicit(Neumann(num_terms=300)))
    assert relative_error(entry(hyper.hypergradient(RIDGE.val)), RIDGE.hypergradient()) < 1e-6


def test_the_scale_from_power_iterations_is_not_far_off() -> None:
    """Between the inverse of the largest eigenvalue and 2 over it, where the series still converges."""
    from torch_hypergrad.solvers.neumann import largest_eigenvalue

    for seed in range(20):
        matrix = Ridge.make(width=30, seed=seed).matrix()
        largest = float(torch.linalg.eigvalsh(matrix)[-1])
        found = float(largest_eigenvalue(lambda v, matrix=matrix: matrix @ v, matrix[0]))
        assert largest / 2 < found <= largest * (1 + 1e-12)


def test_power_iterations_start_without_a_pattern() -> None:
    """Uniform between -1 and 1: of 10^5 numbers, moments and correlations are off by 1 / sqrt(10^5) or so."""
    from torch_hypergrad.solvers.neumann import scattered

    v = scattered(torch.zeros(100_000, dtype=torch.float64))
    assert v.abs().max() <= 1
    moments = torch.stack(
        [v.mean(), v.square().mean() - 1 / 3, *((v[:-k] * v[k:]).mean() for k in (1, 2, 7, 64, 1000))]
    )
    assert moments.abs().max() < 0.01


def test_divergent_neumann_raises() -> None:
    scale = 2.5 / float(torch.linalg.eigvalsh(RIDGE.matrix())[-1])
    hyper = RIDGE.at_optimum(Implicit(Neumann(num_terms=200, scale=scale)))
    with pytest.raises(SolverError, match=r"diverged: relative residual .* lower it, or pass scale=None"):
        hyper.hypergradient(RIDGE.val)


@pytest.mark.parametrize(
    "solver", [Neumann(500, damping=0.2), CG(100, rtol=1e-12, damping=0.2), Cholesky(0.2)], ids=name_of
)
def test_damping_is_added_to_the_hessian(solver: Solver) -> None:
    w = RIDGE.optimum()
    damped = RIDGE.matrix() + 0.2 * torch.eye(6, dtype=torch.float64)
    expected = -w * torch.linalg.solve(damped, RIDGE.val_gradient(w))
    hyper = RIDGE.at_optimum(Implicit(solver))
    assert relative_error(entry(hyper.hypergradient(RIDGE.val)), expected) < 1e-8


def test_identity_is_the_derivative_of_one_step_of_sgd() -> None:
    """A step of SGD taken at the optimum: T1-T2's product, one step later."""
    w = RIDGE.optimum()
    hyper = RIDGE.at_optimum(Implicit(Identity(scale=0.05)))
    assert relative_error(entry(hyper.hypergradient(RIDGE.val)), -0.05 * w * RIDGE.val_gradient(w)) < 1e-12


def train_to_optimum(hyper: HyperOptimizer, batches: list[Any], num_steps: int) -> None:
    for step in range(num_steps):
        hyper.step(batches[step % len(batches)])


def test_logistic_regression_against_a_dense_solve() -> None:
    """Newton's method finds the optimum; the Hessian is written out by hand."""
    (x, y), val = logistic_regression()
    decay, w = 0.1, torch.zeros(5, dtype=torch.float64)
    for _ in range(30):
        p = torch.sigmoid(x @ w)
        hessian = x.T @ (x * (p * (1 - p))[:, None]) / len(x) + decay * torch.eye(5, dtype=torch.float64)
        w = w - torch.linalg.solve(hessian, x.T @ (p - y[:, 0]) / len(x) + decay * w)
    val_gradient = val[0].T @ (torch.sigmoid(val[0] @ w) - val[1][:, 0]) / len(val[0])
    expected = -w * torch.linalg.solve(hessian, val_gradient)

    def loss(model: nn.Module, batch: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch[0]), batch[1])

    for solver in EXACT:
        model = nn.Linear(5, 1, bias=False).double()
        with torch.no_grad():
            model.weight.copy_(w)
        tune = [Hyperparameter("weight_decay", per="element", init=decay)]
        hyper = wrapped(model, tune, Implicit(solver), partial(torch.optim.SGD, lr=0.0), train_loss=loss)
        hyper.step((x, y))
        assert relative_error(entry(hyper.hypergradient(val)), expected) < 1e-8


OPTIMIZERS: dict[str, Any] = {
    "SGD": partial(torch.optim.SGD, lr=0.2, momentum=0.5),
    "ASGD": partial(torch.optim.ASGD, lr=0.2, lambd=0.02),
    "Adam": partial(torch.optim.Adam, lr=0.01),
    "RMSprop": partial(torch.optim.RMSprop, lr=0.001),
    "Adagrad": partial(torch.optim.Adagrad, lr=0.3),
    "Adamax": partial(torch.optim.Adamax, lr=0.01),
    "maximize": partial(torch.optim.SGD, lr=0.2, maximize=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_added_decay_has_the_same_optimum_whatever_the_optimizer(kind: str) -> None:
    """Ridge again: every rule whose decay is added to the gradient has
    the closed form's optimum, ASGD with lambd."""
    decay = RIDGE.decay - 0.02 if kind == "ASGD" else RIDGE.decay
    model = nn.Linear(6, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(RIDGE.optimum())
    sign = -1.0 if kind == "maximize" else 1.0
    hyper = HyperOptimizer(
        model,
        OPTIMIZERS[kind](model.parameters()),
        lambda model, batch: sign * RIDGE.loss(model, batch),
        [Hyperparameter("weight_decay", per="element", init=decay)],
        Implicit(Cholesky()),
        partial(torch.optim.SGD, lr=0.0),
        val_loss=RIDGE.loss,
    )
    hyper.step(RIDGE.train)
    with torch.no_grad():
        model.weight.copy_(RIDGE.optimum())  # adaptive rules leave even an optimum in their first step
    assert relative_error(entry(hyper.hypergradient(RIDGE.val)), RIDGE.hypergradient()) < 1e-8


@pytest.mark.parametrize(
    "kind",
    [
        partial(torch.optim.AdamW, lr=0.05, betas=(0.8, 0.9), eps=0.1),
        partial(torch.optim.AdamW, lr=0.05, betas=(0.8, 0.9), eps=0.1, amsgrad=True),
        partial(torch.optim.NAdam, lr=0.05, betas=(0.8, 0.9), eps=0.1, decoupled_weight_decay=True),
        partial(torch.optim.RAdam, lr=0.05, betas=(0.8, 0.9), eps=0.1, decoupled_weight_decay=True),
    ],
    ids=lambda kind: kind.func.__name__ + ("_amsgrad" if "amsgrad" in kind.keywords else ""),
)
def test_decoupled_decay_has_the_optimum_that_training_reaches(kind: Any) -> None:
    """At rest the preconditioned gradient balances the decay. F must vanish where training has come to rest,
    and its dense hypergradient with the preconditioner D frozen is -(H + D W)^-1 D w, written out by hand."""
    decay = 0.5
    model = nn.Linear(6, 1, bias=False).double()
    optimizer = kind(model.parameters(), weight_decay=decay)
    for _ in range(800):
        optimizer.zero_grad()
        RIDGE.loss(model, RIDGE.train).backward()
        optimizer.step()
    tune = [Hyperparameter("weight_decay", per="element")]
    hyper = wrapped(model, tune, Implicit(Cholesky()), lambda params: optimizer, train_loss=RIDGE.loss)
    hyper.step(RIDGE.train)
    w = model.weight.detach()[0].clone()
    x, y = RIDGE.train
    gradient = x.T @ (x @ w - y[:, 0]) / len(x)
    assert gradient.abs().min() > 1e-4
    at_rest = -gradient / (decay * w)  # D, read off the balance g + D decay w = 0
    matrix = x.T @ x / len(x) + (decay * at_rest).diag()
    expected = -at_rest * w * torch.linalg.solve(matrix, RIDGE.val_gradient(w))
    assert relative_error(entry(hyper.hypergradient(RIDGE.val)), expected) < 1e-5


def test_mean_over_the_last_batches() -> None:
    """Two halves of the data, averaged, are the whole."""
    x, y = RIDGE.train
    halves = [(x[:10], y[:10]), (x[10:], y[10:])]
    hyper = RIDGE.at_optimum(Implicit(Cholesky(), num_batches=2))
    for half in halves:
        hyper.step(half)
    assert relative_error(entry(hyper.hypergradient(RIDGE.val)), RIDGE.hypergradient()) < 1e-8


def test_mean_over_batches_with_batch_norm() -> None:
    """Two forward passes, each of which writes the running statistics, before either is differentiated twice.
    The hypergradient is linear in the mean only through A, so the reference is a dense solve with
    autograd's Hessian."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).double()
    tune = [Hyperparameter("weight_decay", init=0.5)]
    hyper = wrapped(
        model, tune, Implicit(Cholesky(damping=4.0), num_batches=2), partial(torch.optim.SGD, lr=0.0)
    )
    batches, val = [random_batch(8, 4, seed) for seed in range(2)], random_batch(8, 4, 9)
    for batch in batches:
        hyper.step(batch)
    statistics = model[1].running_mean.clone()
    computed = entry(hyper.hypergradient(val)).item()
    assert torch.equal(statistics, model[1].running_mean)

    def mean_loss(flat: Tensor, batches: list[Any]) -> Tensor:
        parts = flat.split([p.numel() for p in model.parameters()])
        named = {n: part.view_as(p) for (n, p), part in zip(model.named_parameters(), parts)}
        outputs = [torch.func.functional_call(model, named, batch[0]) for batch in batches]
        return torch.stack([(out - batch[1]).square().mean() for out, batch in zip(outputs, batches)]).mean()

    w = torch.cat([p.detach().reshape(-1) for p in model.parameters()])
    hessian = torch.autograd.functional.hessian(lambda v: mean_loss(v, batches), w)
    val_gradient = torch.autograd.functional.jacobian(lambda v: mean_loss(v, [val]), w)
    expected = -w @ torch.linalg.solve(hessian + 4.5 * torch.eye(len(w), dtype=w.dtype), val_gradient)
    assert computed == pytest.approx(float(expected), rel=1e-8)


def test_a_long_unroll_tends_to_the_implicit_answer() -> None:
    def unrolled(num_steps: int) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(6, 1, bias=False).double()
        tune = [Hyperparameter("weight_decay", per="element", init=RIDGE.decay)]
        hyper = wrapped(
            model, tune, Unrolled(max_snapshots=20), partial(torch.optim.SGD, lr=0.3), train_loss=RIDGE.loss
        )
        train_to_optimum(hyper, [RIDGE.train], num_steps)
        return entry(hyper.hypergradient(RIDGE.val))

    errors = [relative_error(unrolled(num_steps), RIDGE.hypergradient()) for num_steps in (10, 50, 400)]
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-8


def minimize(model: nn.Module, loss: Callable[[], Tensor]) -> None:
    """Minimization to machine precision: torch's own LBFGS, then two steps of Newton's method."""
    optimizer = torch.optim.LBFGS(
        model.parameters(),
        max_iter=2000,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    optimizer.step(closure)
    params = list(model.parameters())
    for _ in range(2):
        gradient = torch.autograd.grad(loss(), params, create_graph=True)
        flat = torch.cat([g.reshape(-1) for g in gradient])
        rows = [torch.autograd.grad(entry, params, retain_graph=True) for entry in flat]
        hessian = torch.stack([torch.cat([r.reshape(-1) for r in row]) for row in rows])
        step = torch.linalg.solve(hessian, flat.detach())
        with torch.no_grad():
            for p, part in zip(params, step.split([p.numel() for p in params])):
                p -= part.view_as(p)


def test_implicit_against_finite_differences_of_training_to_convergence() -> None:
    """A tanh network with one decay for each tensor, trained to its optimum
    by another optimizer for each value."""
    batch, val = random_batch(30, 4, 0), random_batch(30, 4, 1)
    model = tanh_mlp(1)

    def val_loss_at_optimum(decays: list[float]) -> float:
        def penalized() -> Tensor:
            penalty = sum(d * p.square().sum() for d, p in zip(decays, model.parameters()))
            return mse(model, batch) + penalty / 2

        minimize(model, penalized)
        return mse(model, val).item()

    for i in range(4):
        decays = [0.1] * 4

        def loss_at(shift: float, i: int = i) -> float:
            return val_loss_at_optimum([0.1 + shift if j == i else 0.1 for j in range(4)])

        reference, _ = derivative(loss_at, 0.01)
        val_loss_at_optimum(decays)
        tune = [Hyperparameter("weight_decay", per="tensor", init=0.1)]
        hyper = wrapped(copy.deepcopy(model), tune, Implicit(Cholesky()), partial(torch.optim.SGD, lr=0.0))
        hyper.step(batch)
        computed = list(hyper.hypergradient(val).values())[i].item()
        assert computed == pytest.approx(reference, rel=1e-5)


def test_tuned_tensors_in_the_training_loss() -> None:
    """One weight for each training example: -(x_i r_i) . q at the optimum of weighted ridge,
    written out by hand."""
    x, y = RIDGE.train
    weights = torch.ones(len(x), dtype=torch.float64, requires_grad=True)

    def train_loss(model: nn.Module, batch: Any) -> Tensor:
        return (weights * (model(batch[0]) - batch[1])[:, 0].square()).mean() / 2

    model = nn.Linear(6, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(RIDGE.optimum())
    optimizer = torch.optim.SGD([{"params": model.parameters(), "weight_decay": 0.3}], lr=0.0)
    ridge = Ridge(RIDGE.train, RIDGE.val, torch.full((6,), 0.3, dtype=torch.float64))
    with torch.no_grad():
        model.weight.copy_(ridge.optimum())
    hyper = HyperOptimizer(
        model,
        optimizer,
        train_loss,
        [("example_weights", weights)],
        Implicit(Cholesky()),
        partial(torch.optim.SGD, lr=0.0),
        val_loss=ridge.loss,
    )
    hyper.step(ridge.train)
    w = ridge.optimum()
    q = torch.linalg.solve(ridge.matrix(), ridge.val_gradient(w))
    expected = -(x @ w - y[:, 0]) * (x @ q) / len(x)
    computed = hyper.hypergradient(ridge.val)
    assert list(computed) == ["example_weights"]
    assert relative_error(computed["example_weights"], expected) < 1e-10


@pytest.mark.parametrize("solver", [CG(), Cholesky()], ids=name_of)
def test_an_indefinite_hessian_is_refused(solver: Solver) -> None:
    model = nn.Linear(2, 1, bias=False).double()
    tune = [Hyperparameter("weight_decay", init=0.1)]
    saddle = lambda model, batch: model.weight[0, 0] ** 2 - model.weight[0, 1] ** 2  # noqa: E731
    hyper = wrapped(model, tune, Implicit(solver), partial(torch.optim.SGD, lr=0.0), train_loss=saddle)
    hyper.step(None)
    with pytest.raises(SolverError, match=r"not positive definite.*damping"):
        hyper.hypergradient(None)


def test_a_loss_without_curvature_is_refused() -> None:
    model = nn.Linear(2, 1, bias=False).double()
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    hyper = HyperOptimizer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.0),
        lambda model, batch: model.weight.sum(),
        [("scale", scale)],
        Implicit(CG()),
        partial(torch.optim.SGD, lr=0.0),
        val_loss=lambda model, batch: model.weight.square().sum(),
    )
    hyper.step(None)
    with pytest.raises(SolverError, match="linear"):
        hyper.hypergradient(None)


@pytest.mark.parametrize("num_steps", [1, 2, 10])
def test_unrolled_gradient_descent_follows_its_own_recursion(num_steps: int) -> None:
    problem = GradientDescent.make()
    model = problem.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.05)
    tune = [Hyperparameter("lr"), Hyperparameter("weight_decay")]
    hyper = HyperOptimizer(
        model,
        optimizer,
        problem.train_loss,
        tune,
        Unrolled(),
        partial(torch.optim.SGD, lr=0.0),
        val_loss=problem.val_loss,
    )
    for _ in range(num_steps):
        hyper.step(None)
    by_lr, by_decay = problem.hypergradient(0.1, 0.05, num_steps)
    computed = hyper.hypergradient(None)
    assert computed["lr/group0"].item() == pytest.approx(by_lr, rel=1e-10)
    assert computed["weight_decay/group0"].item() == pytest.approx(by_decay, rel=1e-10)


def test_truncation_counts_the_last_steps_alone() -> None:
    """With K of T steps, the recursion starts at step T - K from the weights that training had reached."""
    problem = GradientDescent.make()
    model = problem.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.05)
    hyper = HyperOptimizer(
        model,
        optimizer,
        problem.train_loss,
        [Hyperparameter("lr")],
        Unrolled(truncation=4),
        partial(torch.optim.SGD, lr=0.0),
        val_loss=problem.val_loss,
    )
    for t in range(10):
        if t == 6:
            later = GradientDescent(problem.hessian, problem.c, model.w.detach().clone(), problem.target)
        hyper.step(None)
    assert hyper.hypergradient(None)["lr/group0"].item() == pytest.approx(
        later.hypergradient(0.1, 0.05, 4)[0], rel=1e-10
    )


def test_the_validation_loss_of_the_report() -> None:
    hyper = RIDGE.at_optimum(Implicit(Cholesky()))
    report = hyper.hyper_step(RIDGE.val)
    assert report.val_loss == pytest.approx(mse(hyper.model, RIDGE.val).item() / 2)
    assert report.hypergradient_norm == pytest.approx(float(RIDGE.hypergradient().norm()), rel=1e-8)
    assert report.num_matvecs == 6
    assert report.residual is not None
    assert report.residual < 1e-12
