"""Training to a tolerance, against closed forms and scipy's own answers on hand-written functions."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from problems import FROZEN, Ridge, logistic_regression, mse, random_batch, tanh_mlp, wrapped
from torch_hypergrad import (
    CG,
    Cholesky,
    HyperOptimizer,
    Hyperparameter,
    Implicit,
    SolverError,
    Unrolled,
)
from torch_hypergrad.bilevel import fit

METHODS = ["lbfgs", "newton", "cg-newton"]
DECAY = [Hyperparameter("weight_decay", init=0.1)]


def ridge(problem: Ridge, **options: Any) -> HyperOptimizer:
    """Weights at zero, one decay for each."""
    model = nn.Linear(len(problem.decay), 1, bias=False).double()
    nn.init.zeros_(model.weight)
    tune = [Hyperparameter("weight_decay", per="element", init=problem.decay)]
    return wrapped(
        model, tune, options.pop("method", Implicit(Cholesky())), train_loss=problem.loss, **options
    )


def logistic(model: nn.Module, batch: Any) -> Tensor:
    x, y = batch
    return F.binary_cross_entropy_with_logits(model(x), y)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop])
def test_it_finds_the_optimum_of_ridge_regression(method, optimizer):
    problem = Ridge.make()
    hyper = ridge(problem, optimizer=partial(optimizer, lr=0.1))
    found = fit(hyper, problem.train, tol=1e-10, method=method)
    assert found.grad_norm <= 1e-10
    torch.testing.assert_close(hyper.model.weight[0], problem.optimum(), rtol=1e-9, atol=1e-9)
    computed = hyper.hypergradient(problem.val)["weight_decay/weight"]
    torch.testing.assert_close(computed[0], problem.hypergradient(), rtol=1e-8, atol=1e-9)


def test_the_loss_and_its_norm_are_those_with_the_decay():
    problem = Ridge.make()
    hyper = ridge(problem)
    found = fit(hyper, problem.train, tol=1e-3)
    w = hyper.model.weight.detach()[0]
    x, y = problem.train
    loss = (x @ w - y[:, 0]).square().mean() / 2 + (problem.decay * w.square()).sum() / 2
    gradient = problem.matrix() @ w - (x.T @ y)[:, 0] / len(x)
    assert found.loss == pytest.approx(loss.item(), rel=1e-12)
    assert found.grad_norm == pytest.approx(gradient.norm().item(), rel=1e-9)
    assert found.num_products == 0


def test_gradients_and_products_are_counted():
    calls = []

    def counted(model: nn.Module, batch: Any) -> Tensor:
        calls.append(batch)
        return logistic(model, batch)

    train, _ = logistic_regression()
    for method, width in (("lbfgs", 0), ("newton", 6), ("cg-newton", 0)):
        hyper = wrapped(nn.Linear(5, 1).double(), DECAY, Implicit(CG()), train_loss=counted)
        calls.clear()
        found = fit(hyper, train, tol=1e-8, method=method)
        num_hessians = found.num_products // width if width else 0
        if method == "cg-newton":
            assert len(calls) >= found.num_gradients
        else:
            assert len(calls) == found.num_gradients + num_hessians
        assert (found.num_products > 0) == (method != "lbfgs")


def test_a_second_fit_begins_where_the_first_ended():
    problem = Ridge.make()
    hyper = ridge(problem)
    first = fit(hyper, problem.train, tol=1e-8)
    assert fit(hyper, problem.train, tol=1e-8).num_gradients == 1 < first.num_gradients


def test_several_batches_are_averaged():
    problem = Ridge.make()
    x, y = problem.train
    parts = [(x[:10], y[:10]), (x[10:], y[10:])]
    hyper = ridge(problem, method=Implicit(Cholesky(), num_batches=2))
    fit(hyper, batches=parts, tol=1e-10)
    torch.testing.assert_close(hyper.model.weight[0], problem.optimum(), rtol=1e-8, atol=1e-9)
    computed = hyper.hypergradient(problem.val)["weight_decay/weight"]
    torch.testing.assert_close(computed[0], problem.hypergradient(), rtol=1e-7, atol=1e-9)


def test_batches_of_before_are_no_part_of_the_problem():
    problem = Ridge.make()
    hyper = ridge(problem, method=Implicit(Cholesky(), num_batches=2))
    hyper.record(random_batch(20, 6, seed=9))
    fit(hyper, problem.train, tol=1e-10)
    computed = hyper.hypergradient(problem.val)["weight_decay/weight"]
    torch.testing.assert_close(computed[0], problem.hypergradient(), rtol=1e-7, atol=1e-9)


def test_a_smooth_network_comes_to_rest():
    batch = random_batch(20, 4, seed=3)
    hyper = wrapped(tanh_mlp(), DECAY, Implicit(CG()))
    fit(hyper, batch, tol=1e-7)
    loss = mse(hyper.model, batch) + 0.05 * sum(p.square().sum() for p in hyper.model.parameters())
    gradient = torch.autograd.grad(loss, list(hyper.model.parameters()))
    assert torch.cat([g.flatten() for g in gradient]).norm() <= 1.01e-7


def test_dropout_is_one_fixed_function_and_the_hypergradient_is_of_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    batch, val = random_batch(30, 5, seed=4), random_batch(30, 5, seed=5)
    hyper = wrapped(model, DECAY, Implicit(CG(max_steps=200, rtol=1e-10)))
    before = torch.get_rng_state()
    fit(hyper, batch, tol=1e-8)
    assert torch.equal(torch.get_rng_state(), before)

    def val_loss_at(decay: float) -> float:
        other = HyperOptimizer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            mse,
            [Hyperparameter("weight_decay", init=decay)],
            Implicit(CG()),
            FROZEN,
        )
        torch.set_rng_state(before)
        fit(other, batch, tol=1e-10, method="newton")
        torch.set_rng_state(before)
        return other.validation_loss(val).item()

    torch.set_rng_state(before)
    computed = hyper.hypergradient(val)["weight_decay/group0"].item()
    reference = (val_loss_at(0.1 + 1e-4) - val_loss_at(0.1 - 1e-4)) / 2e-4
    assert computed == pytest.approx(reference, rel=1e-4)


def test_frozen_parameters_stay():
    problem = Ridge.make()
    model = nn.Sequential(nn.Linear(6, 1, bias=False), nn.Linear(1, 1)).double()
    model[1].requires_grad_(False)
    hyper = wrapped(model, DECAY, Implicit(CG()), train_loss=problem.loss)
    before = model[1].weight.clone()
    fit(hyper, problem.train, tol=1e-8)
    assert torch.equal(model[1].weight, before)


def test_float32_reaches_what_it_can():
    problem = Ridge.make()
    batch = tuple(part.float() for part in problem.train)
    model = nn.Linear(6, 1, bias=False)
    hyper = wrapped(model, DECAY, Implicit(CG()), train_loss=problem.loss)
    assert fit(hyper, batch, tol=1e-5).grad_norm <= 1e-5
    with pytest.raises(SolverError, match=r"was to reach tol=1e-12 .*float64"):
        fit(hyper, batch, tol=1e-12)


def test_what_is_not_reached_is_said_and_the_best_weights_stay():
    train, _ = logistic_regression()
    hyper = wrapped(nn.Linear(5, 1).double(), DECAY, Implicit(CG()), train_loss=logistic)
    with pytest.raises(SolverError, match=r"came to a gradient of norm .* tol=1e-12 .*max_iter"):
        fit(hyper, train, tol=1e-12, max_iter=3)
    before = [p.clone() for p in hyper.model.parameters()]
    with pytest.raises(SolverError, match="came to"):
        fit(hyper, train, tol=1e-30, max_iter=1)
    assert any(not torch.equal(p, q) for p, q in zip(hyper.model.parameters(), before))
    assert fit(hyper, train, tol=1e-9).grad_norm <= 1e-9


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"tol": 0.0}, ValueError, "tol must be finite and above 0"),
        ({"tol": "1e-3"}, TypeError, "tol must be a number"),
        ({"method": "bfgs"}, ValueError, "method must be one of 'lbfgs', 'newton', 'cg-newton', got 'bfgs'"),
        ({"max_iter": 0}, ValueError, "max_iter must be at least 1"),
        ({"batch": None, "batches": []}, TypeError, "got both"),
    ],
)
def test_bad_options_are_refused(options, error, words):
    problem = Ridge.make()
    options = {"batch": problem.train, "tol": 1e-6} | options
    with pytest.raises(error, match=words):
        fit(ridge(problem), options.pop("batch"), **options)


def test_too_few_batches_in_the_method_are_refused():
    problem = Ridge.make()
    with pytest.raises(ValueError, match=r"fit trains on 2 batches, .*num_batches=1.*num_batches=2"):
        fit(ridge(problem), batches=[problem.train, problem.train], tol=1e-6)
    with pytest.raises(ValueError, match="nothing to train on"):
        fit(ridge(problem), batches=[], tol=1e-6)


def test_other_methods_are_refused():
    problem = Ridge.make()
    with pytest.raises(TypeError, match=r"HyperOptimizer has Unrolled.*method=Implicit"):
        fit(ridge(problem, method=Unrolled()), problem.train, tol=1e-6)


@pytest.mark.parametrize(
    "optimizer", [partial(torch.optim.AdamW, lr=0.1), partial(torch.optim.SGD, lr=0.1, maximize=True)]
)
def test_an_optimum_that_is_no_function_of_the_weights_is_refused(optimizer):
    problem = Ridge.make()
    hyper = ridge(problem, optimizer=optimizer)
    hyper.step(problem.train)
    with pytest.raises(ValueError, match=r"fit minimizes .* wrap SGD or Adam"):
        fit(hyper, problem.train, tol=1e-6)
