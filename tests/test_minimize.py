"""Tuning by scipy, against scipy on hand-written functions."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import scipy.optimize
import torch
from torch import nn

from problems import FROZEN, Ridge, mse, random_batch, wrapped
from torch_hypergrad import (
    Cholesky,
    HyperOptimizer,
    Hyperparameter,
    Implicit,
    NonFiniteError,
    Unrolled,
)
from torch_hypergrad.bilevel import fit, minimize

PROBLEM = Ridge.make()
quietly = partial(minimize, progress=False)


def val_loss_at(decays) -> float:
    """After training, by dense linear algebra."""
    w = Ridge(PROBLEM.train, PROBLEM.val, torch.as_tensor(decays).double().expand(6)).optimum()
    x, y = PROBLEM.val
    return ((x @ w - y[:, 0]).square().mean() / 2).item()


def ridge(tune) -> HyperOptimizer:
    model = nn.Linear(6, 1, bias=False).double()
    return wrapped(model, tune, Implicit(Cholesky()), train_loss=Ridge.loss)


def trained(hyper: HyperOptimizer):
    return lambda: fit(hyper, PROBLEM.train, tol=1e-10, method="newton")


@pytest.mark.parametrize("method", ["L-BFGS-B", "trust-constr", "TNC", "SLSQP"])
def test_one_decay_is_that_of_a_bounded_search_on_the_closed_form(method):
    reference = scipy.optimize.minimize_scalar(
        lambda x: val_loss_at(np.exp(x)), bounds=(np.log(1e-3), np.log(1e3)), options={"xatol": 1e-8}
    )
    hyper = ridge([Hyperparameter("weight_decay", init=1.0, low=1e-3, high=1e3, log=True)])
    found = quietly(hyper, PROBLEM.val, trained(hyper), method=method)
    assert found.fun == pytest.approx(reference.fun, rel=1e-7)
    assert found.x[0] == pytest.approx(reference.x, abs=5e-3)
    assert found.hyperparameters["weight_decay/group0"].item() == pytest.approx(np.exp(found.x[0]), rel=1e-12)


def test_decays_for_each_weight_end_on_their_bounds_or_where_the_derivative_is_zero():
    hyper = ridge([Hyperparameter("weight_decay", per="element", init=0.3, low=0.0, high=2.0)])
    found = quietly(hyper, PROBLEM.val, trained(hyper))
    assert found.success
    reference = scipy.optimize.minimize(
        val_loss_at, np.full(6, 0.3), method="L-BFGS-B", bounds=[(0.0, 2.0)] * 6, tol=1e-12
    )
    assert found.fun == pytest.approx(reference.fun, rel=1e-6)
    inside = (found.x > 1e-9) & (found.x < 2 - 1e-9)
    assert np.abs(found.jac[inside]).max(initial=0) < 1e-4
    assert ((found.x == 0) | (found.x == 2)).any(), "the case is one where bounds matter"


def test_at_the_end_the_best_values_are_there_and_trained():
    hyper = ridge([Hyperparameter("weight_decay", init=1.0, log=True)])
    seen = []
    found = quietly(
        hyper, PROBLEM.val, trained(hyper), max_evals=4, callback=lambda e, v: seen.append((e.val_loss, v))
    )
    assert found.nfev == len(seen) == 4
    assert not found.success
    assert found.message == "max_evals=4 was reached."
    best = min(range(4), key=lambda i: seen[i][0])
    assert found.fun == seen[best][0] == found.evaluation.val_loss
    assert torch.equal(hyper.values()["weight_decay/group0"], seen[best][1]["weight_decay/group0"])
    assert hyper.validation_loss(PROBLEM.val).item() == pytest.approx(found.fun, rel=1e-12)


def test_unrolled_training_is_minimized_too():
    batch, val = random_batch(20, 3, seed=1), random_batch(20, 3, seed=2)

    def losses_of(lr: float) -> float:
        model = start()
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        for _ in range(5):
            optimizer.zero_grad()
            mse(model, batch).backward()
            optimizer.step()
        return mse(model, val).item()

    def start() -> nn.Module:
        torch.manual_seed(0)
        return nn.Linear(3, 1).double()

    hyper = wrapped(start(), [Hyperparameter("lr", init=0.01, high=0.5)], Unrolled())

    def train() -> None:
        hyper.restart()
        for _ in range(5):
            hyper.step(batch)

    found = quietly(hyper, val, train)
    reference = scipy.optimize.minimize_scalar(losses_of, bounds=(0.0, 0.5), options={"xatol": 1e-9})
    assert found.fun == pytest.approx(reference.fun, rel=1e-6)
    assert found.x[0] == pytest.approx(reference.x, abs=1e-3)


def test_methods_without_bounds():
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    model = nn.Linear(6, 1, bias=False).double()
    hyper = wrapped(
        model,
        [Hyperparameter.of(scale, "scale")],
        Implicit(Cholesky()),
        train_loss=lambda m, b: Ridge.loss(m, (b[0], scale * b[1])) + 0.1 * m.weight.square().sum(),
        val_loss=Ridge.loss,
    )
    found = quietly(hyper, PROBLEM.val, trained(hyper), method="BFGS")
    # The weights are linear in the scale, so the validation loss is a parabola.
    a, b, _ = np.linalg.solve(
        [[s * s, s, 1] for s in (0.0, 1.0, 2.0)], [at_scale(hyper, scale, s) for s in (0.0, 1.0, 2.0)]
    )
    assert found.x[0] == pytest.approx(-b / (2 * a), rel=1e-5)
    with pytest.raises(ValueError, match=r"BFGS keeps to no bounds.*L-BFGS-B"):
        quietly(ridge([Hyperparameter("weight_decay", init=1.0)]), PROBLEM.val, lambda: None, method="BFGS")


def at_scale(hyper: HyperOptimizer, scale: torch.Tensor, value: float) -> float:
    with torch.no_grad():
        scale.fill_(value)
    fit(hyper, PROBLEM.train, tol=1e-11, method="newton")
    return hyper.validation_loss(PROBLEM.val).item()


def test_an_error_leaves_the_best_values_behind():
    hyper = ridge([Hyperparameter("weight_decay", init=1.0, log=True)])
    tried = []

    def train() -> None:
        fit(hyper, PROBLEM.train, tol=1e-10, method="newton")
        tried.append((hyper.validation_loss(PROBLEM.val).item(), hyper.values()["weight_decay/group0"]))
        if len(tried) == 3:
            with torch.no_grad():
                hyper.model.weight.fill_(torch.nan)

    with pytest.raises(NonFiniteError, match="validation loss is nan"):
        quietly(hyper, PROBLEM.val, train)
    assert torch.equal(hyper.values()["weight_decay/group0"], min(tried[:2])[1])
    with pytest.raises(NonFiniteError, match="training loss is nan at the weights that fit begins at"):
        fit(hyper, PROBLEM.train, tol=1e-6)


def test_a_start_where_the_scale_flattens_the_derivative_is_warned_of():
    hyper = ridge([Hyperparameter("weight_decay", init=1e-9, log=True)])
    with pytest.warns(RuntimeWarning, match=r"weight_decay/group0' = 1e-09 .*begin at a larger value"):
        found = quietly(hyper, PROBLEM.val, trained(hyper))
    assert found.nfev <= 2
    better = ridge([Hyperparameter("weight_decay", init=0.1, log=True)])
    assert quietly(better, PROBLEM.val, trained(better)).fun < found.fun - 1e-3


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"method": "L-BFGS"}, ValueError, "Did you mean 'L-BFGS-B'"),
        ({"method": "Nelder-Mead"}, ValueError, "must be one of 'L-BFGS-B'"),
        ({"max_evals": 0}, ValueError, "max_evals must be at least 1"),
        ({"max_evals": 1.5}, TypeError, "max_evals must be an int"),
    ],
)
def test_bad_options_are_refused(options, error, words):
    hyper = ridge([Hyperparameter("weight_decay", init=1.0)])
    with pytest.raises(error, match=words):
        quietly(hyper, PROBLEM.val, lambda: None, **options)


def test_a_start_out_of_bounds_is_refused_where_it_is_given():
    with pytest.raises(ValueError, match=r"value 3 is out of the bounds \[0.0, 2.0\]"):
        ridge([Hyperparameter("weight_decay", init=3.0, low=0.0, high=2.0)])
    scale = torch.tensor(3.0, requires_grad=True)
    with pytest.raises(ValueError, match=r"'scale': the value 3 is out of the bounds"):
        Hyperparameter.of(scale, "scale", high=2.0)


def test_the_hyper_optimizer_is_left_alone():
    hyper = ridge([Hyperparameter("weight_decay", init=1.0, log=True)])
    quietly(hyper, PROBLEM.val, trained(hyper), max_evals=2)
    assert hyper.hyper_optimizer.state_dict() == FROZEN([torch.zeros(())]).state_dict()
