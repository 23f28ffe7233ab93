"""Bengio 2000: hypergradients against autograd through a Cholesky factor and finite differences, on his
problems: one decay for each feature, and the weights of past months."""

from __future__ import annotations

import importlib
import re
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit
from sklearn.linear_model import Ridge
from torch import Tensor

from test_examples import EXAMPLES, rows_of, run_example
from torch_hypergrad import Cholesky, HyperOptimizer, Hyperparameter, Implicit
from torch_hypergrad.bilevel import fit


@pytest.fixture
def ridge(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("bengio_ridge")


@pytest.fixture
def time_weights(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("time_weights")


# ---- one decay for each feature ---------------------------------------------------------------------------


def through_the_factor(decays: Tensor, train: Any, val: Any) -> Tensor:
    """The validation loss by plain torch, with a graph."""
    (x, y), (x_val, y_val) = train, val
    factor = torch.linalg.cholesky(x.T @ x / len(y) + decays.diag())
    w = torch.cholesky_solve((x.T @ y / len(y))[:, None], factor)
    return ((x_val @ w)[:, 0] - y_val).square().mean() / 2


@pytest.mark.parametrize("seed", range(2))
def test_ridge_hypergradients_are_those_of_autograd_through_cholesky(ridge, seed):
    train, val, _ = ridge.read(seed)
    generator = torch.Generator().manual_seed(seed)
    decays = (2 * torch.randn(65, generator=generator, dtype=torch.float64)).exp().requires_grad_()
    reference = through_the_factor(decays, train, val)
    (expected,) = torch.autograd.grad(reference, decays)
    model = ridge.ridge(1.0, train)
    tune = Hyperparameter("weight_decay", per="element", init=decays.detach(), log=True)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    hyper = HyperOptimizer(model, sgd, ridge.half_mse, [tune], Implicit(Cholesky()), torch.optim.SGD)
    fit(hyper, train, tol=1e-11, method="newton")
    found = hyper.evaluate(val)
    assert found.val_loss == pytest.approx(reference.item(), rel=1e-9)
    computed = found.hypergradient["weight_decay/weight"][0]
    assert (computed - expected).abs().max() < 1e-9 * expected.abs().max()


def test_the_rows_are_split_and_scaled_as_the_example_says(ridge):
    parts = ridge.read(4)
    assert [tuple(x.shape) for x, _ in parts] == [(150, 65), (150, 65), (142, 65)]
    (x, y), targets = parts[0], torch.cat([y for _, y in parts])
    torch.testing.assert_close(x.mean(0), torch.zeros(65, dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(x.std(0, correction=0), torch.ones(65, dtype=torch.float64))
    assert y.mean().item() == pytest.approx(0, abs=1e-12)
    assert targets.std(correction=0).item() == pytest.approx(1)
    assert len(torch.cat([x for x, _ in parts]).unique(dim=0)) == 442, "no row twice"


def test_the_ridge_example(ridge):
    rows = rows_of(run_example("bengio_ridge.py", "--seeds", 1, "--evals", 6))
    (x, y), val, test = ([part.numpy() for part in pair] for pair in ridge.read(0))
    errors = []
    for decay in np.logspace(-4, 2, 61):
        model = Ridge(alpha=decay * len(y), fit_intercept=False).fit(x, y)
        errors.append([np.square(model.predict(of[0]) - of[1]).mean() for of in (val, test)])
    assert rows["one, best of a grid"] == ["1", "61", *(f"{error:.3f}" for error in min(errors))]
    values, trainings, val_error, test_error = map(float, rows["one for each feature"])
    assert (values, trainings) == (65, 6)
    assert val_error < 0.46 < 0.55 < min(errors)[0]
    assert test_error < 0.62
    assert float(rows["none"][2]) > 1


# ---- weights of past months -------------------------------------------------------------------------------


def by_least_squares(y: np.ndarray, refits: Tensor, c: float, s: float) -> float:
    """The mean square of all forecasts with one last value, refit by refit."""
    squares, months = [], np.arange(1, len(y))
    x = np.stack([np.ones(len(months)), y[:-1]], 1)  # of month 1 and on
    for first in refits.tolist():
        past = months < first
        roots = np.sqrt(expit((c - (first - months[past]) / 12) / s))
        w, *_ = np.linalg.lstsq(roots[:, None] * x[past], roots * y[1:][past], rcond=None)
        ahead = (months >= first) & (months < first + 6)
        squares.append((x[ahead] @ w - y[1:][ahead]) ** 2)
    return float(np.concatenate(squares).mean())


@pytest.fixture(scope="module")
def market() -> np.ndarray:
    frenchdata = pytest.importorskip("arch.data.frenchdata")
    return np.log(frenchdata.load()["Mkt-RF"].to_numpy() ** 2 + 1)


@pytest.mark.parametrize("at", [(13.0, 1.0), (20.0, 5.0), (-5.0, 8.0)])
@pytest.mark.parametrize("part", ["VAL", "TEST"])
def test_hypergradients_of_time_weights_are_finite_differences_of_least_squares(
    time_weights, market, part, at
):
    refits = getattr(time_weights, part)
    hyper, train = time_weights.Series(torch.tensor(market), 1).problem(refits, at)
    train()
    found = hyper.evaluate(refits)
    assert found.val_loss == pytest.approx(by_least_squares(market, refits, *at), rel=1e-9)
    assert found.num_matvecs == 3, "two features and the check that refits are apart"
    step = 1e-4  # of years: truncation and rounding are both far below 1e-5 of the derivative
    for name, (dc, ds) in {"c": (step, 0), "s": (0, step)}.items():
        ends = [by_least_squares(market, refits, at[0] + k * dc, at[1] + k * ds) for k in (-1, 1)]
        expected = (ends[1] - ends[0]) / (2 * step)
        assert found.hypergradient[name].item() == pytest.approx(expected, rel=1e-5, abs=1e-9)


def test_weights_that_are_all_small_are_still_a_mean(time_weights, market):
    """sigmoid((c - age) / s) of c = -50 and s = 1 / 12 is 0 in double precision, and its logarithm is not."""
    hyper, train = time_weights.Series(torch.tensor(market), 0).problem(time_weights.VAL, (-50.0, 1 / 12))
    train()
    shares = np.exp(-np.arange(720.0))  # by age: one month later weighs 1 / e
    errors = []
    for first in time_weights.VAL.tolist():
        past = market[:first][::-1]
        forecast = (past * shares[:first]).sum() / shares[:first].sum()
        errors.extend((market[first : first + 6] - forecast) ** 2)
    assert hyper.validation_loss(time_weights.VAL).item() == pytest.approx(np.mean(errors), rel=1e-9)


def test_the_example_of_time_weights(market):
    row = rows_of(run_example("time_weights.py", "--lags", "[1]", "--evals", 3))["1"]
    val, weighted, test, test_weighted, c, s = map(float, row)
    assert val - weighted > 0.03
    assert min(test, test_weighted) > 1.5
    assert -50 <= c <= 100
    assert 1 / 12 - 0.01 <= s <= 100
    unweighted = by_least_squares(market, torch.arange(360, 720, 6), 100.0, 0.1)
    assert row[0] == f"{unweighted:.3f}"


def test_with_twelve_last_values_nothing_is_won(time_weights, market):
    series = time_weights.Series(torch.tensor(market), 12)
    unweighted = series.error(time_weights.VAL, time_weights.UNWEIGHTED)
    assert all(
        series.error(time_weights.VAL, at) > unweighted for at in [(13.2, 1.0), (10.0, 2.0), (0.0, 8.0)]
    )


@pytest.mark.parametrize("name", ["bengio_ridge", "time_weights"])
@pytest.mark.parametrize(("option", "value"), [("--evals", "0"), ("--evals", "many")])
def test_bad_options_are_refused(name, option, value, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    with pytest.raises(SystemExit):
        importlib.import_module(name).main([option, value])
    assert re.search(r"evals", capsys.readouterr().err)
