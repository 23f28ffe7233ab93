"""The step size that follows the validation loss, on quadratics and on ridge regression."""

from __future__ import annotations

import copy
import io
import math
from functools import partial

import pytest
import scipy.optimize
import torch
from torch import Tensor, nn

from problems import Ridge, mse, random_batch
from torch_hypergrad import (
    CG,
    AdaptiveStep,
    Cholesky,
    HyperOptimizer,
    Hyperparameter,
    Implicit,
    NonFiniteError,
    Unrolled,
)
from torch_hypergrad.bilevel import exponential, fit
from torch_hypergrad.device import readings

CURVATURES, TARGET = torch.tensor([1.0, 3.0, 10.0]).double(), torch.tensor([2.0, -1.0, 0.5]).double()


def quadratic(x: Tensor) -> tuple[float, Tensor]:
    """Loss, at least 1, and gradient."""
    away = x.detach() - TARGET
    return 1 + float((CURVATURES * away.square()).sum()) / 2, CURVATURES * away


def take(rule: AdaptiveStep, noise: float = 0.0, tolerance: float = 0.0) -> float:
    """One step on the quadratic."""
    (x,) = rule.param_groups[0]["params"]
    loss, x.grad = quadratic(x)
    return rule.step(lambda: loss + noise, tolerance=tolerance)


def made(start: float = 0.0, **options) -> tuple[Tensor, AdaptiveStep]:
    x = torch.full((3,), start, dtype=torch.float64, requires_grad=True)
    return x, AdaptiveStep([x], **options)


def step_size(rule: AdaptiveStep) -> float:
    return rule.param_groups[0]["lr"]


# ---- the rule ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lr", [None, 1e-6, 0.07, 0.1, 0.1993, 1e6])
def test_reaches_the_optimum_from_any_first_step_size(lr):
    x, rule = made(lr=lr)
    for _ in range(200):
        take(rule)
    assert (x.detach() - TARGET).abs().max() < 1e-6
    assert 0.02 < step_size(rule) < 1.5  # about the inverse of a curvature


def test_the_first_step_is_of_length_one_or_less():
    x, rule = made(start=100.0)
    take(rule)
    assert (x.detach() - 100).norm() == pytest.approx(1, rel=1e-12)
    gradient = 0.01 * torch.ones(3).double()
    y = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    y.grad = gradient
    AdaptiveStep([y]).step(lambda: 1.0)
    torch.testing.assert_close(y.detach(), -gradient)


@pytest.mark.parametrize(
    ("lr", "factor"),
    [(0.9, 1.5), (1.1, 1.0), (1.4, 1.0), (1.6, 0.5), (1.9, 0.5), (2.1, 0.5)],
)
@pytest.mark.parametrize("tolerance", [0.0, 1.0], ids=["by losses", "by gradients"])
def test_on_a_parabola_the_cases_are_those_of_its_curvature(lr, factor, tolerance):
    """With curvature 1 the loss falls by eta (1 - eta / 2) g^2, of which eta g^2 / 2 is asked for; the mean
    of two gradients is exact."""
    x = torch.ones((), dtype=torch.float64, requires_grad=True)
    rule = AdaptiveStep([x], lr=lr)
    for _ in range(2):
        x.grad = x.detach().clone()
        loss = 1 + float(x.detach()) ** 2 / 2
        rule.step(lambda loss=loss: loss, tolerance=tolerance)
    assert step_size(rule) == lr * factor
    assert (rule.param_groups[0]["loss"] is None) == (lr > 2), "a step that lowers the loss is kept"


def test_back_off_returns_to_the_exact_earlier_values_and_measures_anew():
    x, rule = made(start=0.1, lr=0.1)
    take(rule)
    before = x.detach().clone()
    rule.param_groups[0]["lr"] = 50.0
    take(rule)
    assert not torch.equal(x.detach(), before)
    lr = step_size(rule)
    worse = take(rule)
    assert worse > quadratic(before)[0]
    assert torch.equal(x.detach(), before)
    assert step_size(rule) == lr / 2
    _, gradient = quadratic(x)
    take(rule, noise=1e3)  # whatever the loss there is now: it was not known
    torch.testing.assert_close(x.detach(), before - lr / 2 * gradient, rtol=1e-14, atol=0)


def test_a_loss_that_was_too_good_to_be_true_stops_nothing_for_long():
    x, rule = made(lr=0.05)
    take(rule, noise=-5.0)  # below all that can be reached, and nobody says so
    for _ in range(150):
        take(rule)
    assert (x.detach() - TARGET).abs().max() < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_noise_within_the_slack_neither_stops_the_steps_nor_makes_them_too_large(seed):
    generator = torch.Generator().manual_seed(seed)
    x, rule = made(lr=1e-3)
    for _ in range(300):
        take(rule, noise=0.01 * (2 * torch.rand((), generator=generator).item() - 1), tolerance=1e-3)
    assert (x.detach() - TARGET).abs().max() < 1e-6
    assert 0.02 < step_size(rule) < 1.5


def test_noise_that_nobody_tells_of_is_what_the_slack_is_for():
    generator = torch.Generator().manual_seed(0)
    x, rule = made(lr=1e-3, slack=0.0)
    for _ in range(300):
        take(rule, noise=0.01 * (2 * torch.rand((), generator=generator).item() - 1), tolerance=1e-3)
    assert (x.detach() - TARGET).abs().max() > 1e-6


def test_a_rise_above_the_slack_is_one():
    _, rule = made(lr=0.05)
    take(rule)
    before = step_size(rule)
    take(rule, noise=1e3, tolerance=1e-3)
    assert step_size(rule) == before / 2


def test_weights_that_did_not_move_let_nothing_grow():
    x, rule = made(lr=1e-3)
    for _ in range(5):
        x.grad = torch.ones(3).double()
        rule.step(lambda: 2.0, tolerance=0.1)
    assert step_size(rule) == 1e-3


def test_a_loss_that_is_not_a_number_is_stepped_back_from():
    x, rule = made(lr=0.01)
    take(rule)
    take(rule, noise=math.nan)
    assert torch.equal(x.detach(), torch.zeros(3).double())
    assert step_size(rule) == 0.005


def test_without_a_gradient_a_leaf_stays():
    x, rule = made(lr=0.01)
    y = torch.ones(2, dtype=torch.float64, requires_grad=True)
    rule = AdaptiveStep([x, y], lr=0.01)
    for _ in range(3):
        loss, x.grad = quadratic(x)
        rule.step(lambda loss=loss: loss)
    assert torch.equal(y.detach(), torch.ones(2).double())
    assert step_size(rule) == pytest.approx(0.01 * 1.5**2)


@pytest.mark.parametrize("stop", range(1, 12, 2))
def test_a_run_goes_on_bitwise_from_its_state(stop):
    x, rule = made(lr=3.0)  # much too long: there is a back-off in the first steps
    for _ in range(stop):
        take(rule)
    file = io.BytesIO()
    torch.save((x.detach(), rule.state_dict()), file)
    file.seek(0)
    saved, state = torch.load(file, weights_only=True)
    y, other = made()
    with torch.no_grad():
        y.copy_(saved)
    other.load_state_dict(state)
    for _ in range(10):
        assert take(rule) == take(other)
        assert torch.equal(x, y)
    assert step_size(rule) == step_size(other)


# ---- what it refuses ---------------------------------------------------------------------------------------


def test_refuses_a_step_without_the_loss():
    _, rule = made()
    with pytest.raises(TypeError, match=r"follows the validation loss: call step\(lambda: loss\)"):
        rule.step()


@pytest.mark.parametrize(
    ("tolerance", "error"), [(-1.0, ValueError), (None, TypeError), (math.inf, ValueError)]
)
def test_refuses_other_tolerances_and_changes_nothing(tolerance, error):
    x, rule = made()
    x.grad = torch.ones(3).double()
    with pytest.raises(error, match="AdaptiveStep: tolerance must be"):
        rule.step(lambda: 1.0, tolerance=tolerance)
    assert torch.equal(x.detach(), torch.zeros(3).double())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"lr": 0.0}, ValueError, "lr must be finite and above 0, got 0.0"),
        ({"lr": "1"}, TypeError, "lr must be a number, got '1'"),
        ({"growth": 1.0}, ValueError, "growth must be above 1 and shrink below 1, got 1.0 and 0.5"),
        ({"shrink": 1.0}, ValueError, "growth must be above 1 and shrink below 1, got 1.5 and 1.0"),
        ({"shrink": 0.0}, ValueError, "shrink must be finite and above 0, got 0.0"),
        ({"slack": -1.0}, ValueError, "slack must be finite and at least 0, got -1.0"),
        ({"slack": None}, TypeError, "slack must be a number, got None"),
    ],
)
def test_refuses_numbers_out_of_range(options, error, message):
    with pytest.raises(error, match=f"AdaptiveStep: {message}"):
        made(**options)


def test_refuses_several_param_groups():
    x, y = (torch.zeros(1, requires_grad=True) for _ in range(2))
    with pytest.raises(
        ValueError, match=r"one step size for all, got 2 param groups\. Pass the tensors as one"
    ):
        AdaptiveStep([{"params": [x]}, {"params": [y]}])


# ---- as a hyper optimizer ----------------------------------------------------------------------------------

PROBLEM = Ridge.make()


def ridge(hyper_optimizer=AdaptiveStep, solver=None, **options) -> HyperOptimizer:
    model = nn.Linear(6, 1, bias=False).double()
    nn.init.zeros_(model.weight)
    tune = [Hyperparameter("weight_decay", **{"init": 5.0, "log": True} | options)]
    sgd, method = torch.optim.SGD(model.parameters(), lr=0.1), Implicit(solver or Cholesky())
    return HyperOptimizer(model, sgd, Ridge.loss, tune, method, hyper_optimizer)


def closed_form(decay: float) -> float:
    w = Ridge(PROBLEM.train, PROBLEM.val, torch.full((6,), decay, dtype=torch.float64)).optimum()
    x, y = PROBLEM.val
    return ((x @ w - y[:, 0]).square().mean() / 2).item()


def decay_of(hyper: HyperOptimizer) -> float:
    return hyper.values()["weight_decay/group0"].item()


def best_decay() -> tuple[float, float]:
    """And the loss there."""
    found = scipy.optimize.minimize_scalar(
        lambda x: closed_form(math.exp(x)), bounds=(-7, 7), options={"xatol": 1e-9}
    )
    return math.exp(found.x), found.fun


@pytest.mark.parametrize("lr", [None, 1e-4, 1e4])
def test_rough_solves_that_get_finer_come_to_the_optimum_of_the_closed_form(lr):
    hyper = ridge(partial(AdaptiveStep, lr=lr), CG(warm_start=True), low=1e-3, high=1e3)
    for tolerance, _ in zip(exponential(0.1, 0.8, 1e-9), range(90)):
        fit(hyper, PROBLEM.train, tol=tolerance)
        report = hyper.hyper_step(PROBLEM.val, rtol=tolerance)
    decay, loss = best_decay()
    assert decay_of(hyper) == pytest.approx(decay, rel=1e-3)
    assert report.val_loss == pytest.approx(loss, rel=1e-8)


def test_a_hyper_step_hands_its_tolerance_on():
    seen = []

    class Spy(AdaptiveStep):
        def step(self, closure=None, tolerance=0.0):
            seen.append((closure(), tolerance))
            return super().step(closure, tolerance)

    hyper = ridge(Spy, CG())
    for options in ({"rtol": 0.25}, {}):
        fit(hyper, PROBLEM.train, tol=1e-6)
        report = hyper.hyper_step(PROBLEM.val, **options)
        assert seen[-1] == (report.val_loss, options.get("rtol", 0.0))


@pytest.mark.parametrize("log", [False, True])
def test_bounds_hold_and_a_step_that_they_cut_short_does_not_count_in_full(log):
    decay, _ = best_decay()
    hyper = ridge(partial(AdaptiveStep, lr=1.0), log=log, init=2 * decay, low=1.5 * decay, high=3 * decay)
    sizes = []
    for _ in range(60):
        fit(hyper, PROBLEM.train, tol=1e-9, method="newton")
        hyper.hyper_step(PROBLEM.val)
        assert 1.5 * decay * (1 - 1e-12) <= decay_of(hyper) <= 3 * decay
        sizes.append(step_size(hyper.hyper_optimizer))
    assert decay_of(hyper) == pytest.approx(1.5 * decay, rel=1e-9)
    assert sizes[-1] == sizes[-20] < 1e12, "steps of length 0 let nothing grow"


def test_works_where_numbers_are_read_later(monkeypatch):
    """As on a device: the loss is read before the step that follows it."""

    def run() -> list[float]:
        hyper = ridge(partial(AdaptiveStep, lr=100.0))  # with a back-off
        losses = []
        for _ in range(5):
            fit(hyper, PROBLEM.train, tol=1e-9, method="newton")
            losses.append(hyper.hyper_step(PROBLEM.val).val_loss)
        return [*losses, decay_of(hyper)]

    at_once = run()
    monkeypatch.setattr(readings, "at_once", lambda tensor: False)
    assert run() == at_once


@pytest.mark.parametrize("stop", [1, 2, 3, 4])
def test_a_run_of_hyper_steps_goes_on_bitwise_from_its_checkpoint(stop):
    def go_on(hyper: HyperOptimizer, num: int) -> list[float]:
        losses = []
        for _ in range(num):
            fit(hyper, PROBLEM.train, tol=1e-3)
            losses.append(hyper.hyper_step(PROBLEM.val, rtol=1e-3).val_loss)
        return losses

    rule, solver = partial(AdaptiveStep, lr=100.0), CG(warm_start=True)
    hyper, other = ridge(rule, solver), ridge(rule, solver)
    go_on(hyper, stop)
    file = io.BytesIO()
    torch.save(hyper.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert go_on(hyper, 4) == go_on(other, 4)
    assert decay_of(hyper) == decay_of(other)


def test_a_hyper_step_that_fails_leaves_it_as_it_was():
    hyper = ridge(partial(AdaptiveStep, lr=1.0), init=1.0)
    fit(hyper, PROBLEM.train, tol=1e-9)
    hyper.hyper_step(PROBLEM.val)
    before, decay = copy.deepcopy(hyper.hyper_optimizer.state_dict()), decay_of(hyper)
    fit(hyper, PROBLEM.train, tol=1e-9)
    x, y = PROBLEM.val
    with pytest.raises(NonFiniteError, match="The validation loss is nan"):
        hyper.hyper_step((x, y * math.nan))
    assert decay_of(hyper) == decay
    assert hyper.hyper_optimizer.state_dict()["param_groups"] == before["param_groups"]


def test_unrolled_episodes_from_the_same_start_are_tuned_too():
    batch, val = random_batch(20, 3, seed=1), random_batch(20, 3, seed=2)
    torch.manual_seed(0)
    model = nn.Linear(3, 1).double()
    start = copy.deepcopy(model.state_dict())

    def loss_at(lr: float) -> float:
        """By plain torch."""
        plain = nn.Linear(3, 1).double()
        plain.load_state_dict(start)
        optimizer = torch.optim.SGD(plain.parameters(), lr=lr)
        for _ in range(5):
            optimizer.zero_grad()
            mse(plain, batch).backward()
            optimizer.step()
        return mse(plain, val).item()

    sgd = torch.optim.SGD(model.parameters(), lr=0.01)
    hyper = HyperOptimizer(model, sgd, mse, [Hyperparameter("lr", log=True)], Unrolled(), AdaptiveStep)
    for _ in range(60):
        hyper.restart()
        for _ in range(5):
            hyper.step(batch)
        hyper.hyper_step(val)
    lr = hyper.values()["lr/group0"].item()
    neighbours = [loss_at(lr * factor) for factor in (0.99, 1.0, 1.01)]
    assert neighbours[1] == min(neighbours) < loss_at(0.01)
