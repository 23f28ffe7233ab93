"""Values per label of the weights, and tuned tensors with bounds and a scale."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from problems import FROZEN, Ridge, mse, random_batch, tanh_mlp, wrapped
from torch_hypergrad import (
    CG,
    Cholesky,
    ForwardMode,
    HyperOptimizer,
    Hyperparameter,
    Implicit,
    TrajectoryError,
    Unrolled,
)
from torch_hypergrad.testing import check_hypergradient

LABELS = torch.tensor([0, 0, 1, 2, 1, 0])


def labelled(init, labels=LABELS, **options) -> Hyperparameter:
    return Hyperparameter("weight_decay", per="label", init=init, labels={"weight": labels}, **options)


def test_the_hypergradient_of_a_label_is_the_sum_over_its_weights():
    values = torch.tensor([0.3, 0.7, 0.5], dtype=torch.float64)
    problem = Ridge.make()
    problem = Ridge(problem.train, problem.val, values[LABELS])
    model = nn.Linear(6, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(problem.optimum())
    hyper = wrapped(model, [labelled(values)], Implicit(Cholesky()), train_loss=Ridge.loss)
    hyper.record(problem.train)
    (computed,) = hyper.hypergradient(problem.val).values()
    expected = torch.stack([problem.hypergradient()[label == LABELS].sum() for label in range(3)])
    torch.testing.assert_close(computed, expected, rtol=1e-10, atol=1e-12)


MOMENTUM = partial(torch.optim.SGD, momentum=0.9)
METHODS = [Unrolled(), ForwardMode(), Unrolled(memory=0)]
EACH_PAIR = [
    (method, optimizer, (i + j) % 2 == 1)
    for i, method in enumerate(METHODS)
    for j, optimizer in enumerate([MOMENTUM, torch.optim.Adam])
]
"""Each method with each optimizer, and each of both on either scale."""


@pytest.mark.parametrize(("method", "optimizer", "log"), EACH_PAIR, ids=repr)
def test_several_parameters_and_groups_against_finite_differences(method, optimizer, log):
    def make() -> HyperOptimizer:
        model = tanh_mlp()
        groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "lr": 0.05}]
        labels = {
            "0.weight": torch.arange(4) % 2,  # by input, for all units
            "0.bias": torch.tensor(2),
            "2.weight": torch.tensor([[0, 1, 1, 0, 2]]),
            "2.bias": torch.tensor([1]),
        }
        tune = [Hyperparameter("weight_decay", per="label", init=0.1, labels=labels, log=log)]
        return HyperOptimizer(model, optimizer(groups, lr=0.03), mse, tune, method, FROZEN)

    batches = [random_batch(8, 4, seed) for seed in range(4)]
    assert [v.shape for v in make().values().values()] == [(3,), (3,)]
    entries = check_hypergradient(make, batches[:3], batches[3], num_entries=3)
    assert len(entries) == 6


def test_labels_follow_the_parameters_through_a_hyper_step_and_a_checkpoint():
    def make() -> HyperOptimizer:
        model = nn.Linear(6, 1, bias=False).double()
        nn.init.ones_(model.weight)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        adam = partial(torch.optim.Adam, lr=0.1)
        return HyperOptimizer(model, optimizer, mse, [labelled(0.1)], Unrolled(), adam)

    problem, hyper, other = Ridge.make(), make(), make()
    hyper.step(problem.train)
    hyper.hyper_step(problem.val)
    other.load_state_dict(hyper.state_dict())
    for run in (hyper, other):
        run.step(problem.train)
        run.hyper_step(problem.val)
    assert torch.equal(hyper.values()["weight_decay/group0"], other.values()["weight_decay/group0"])
    assert hyper.values()["weight_decay/group0"].unique().numel() == 3


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ({"bias": LABELS}, r"labels has no entry for 'weight', .* but for bias"),
        ({"weight": LABELS[:4]}, r"labels\['weight'\] has shape \(4,\), which does not broadcast .*\(1, 6\)"),
        ({"weight": LABELS + LABELS}, "no weight of the group has the label 1"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, words):
    tune = [Hyperparameter("weight_decay", per="label", init=0.1, labels=labels)]
    with pytest.raises(ValueError, match=words):
        wrapped(nn.Linear(6, 1, bias=False), tune, Unrolled())


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"per": "label"}, ValueError, "need the labels of each parameter's weights"),
        ({"labels": {"weight": LABELS}}, ValueError, "nothing else takes them"),
        ({"per": "label", "labels": LABELS}, TypeError, "labels must be a dict from names of parameters"),
        ({"per": "label", "labels": {"weight": LABELS - 1}}, TypeError, "ints from 0 on"),
        ({"per": "label", "labels": {"weight": LABELS * 1.0}}, TypeError, "ints from 0 on"),
        ({"per": "labels"}, ValueError, "per must be one of group, tensor, element, step, label"),
    ],
)
def test_bad_labels_are_refused_when_they_are_written_down(options, error, words):
    with pytest.raises(error, match=words):
        Hyperparameter("weight_decay", **options)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no rule for whole parameters")
def test_a_setting_that_acts_on_a_parameter_as_a_whole_has_no_labels():
    layer, labels = nn.Linear(6, 6, bias=False), {"weight": torch.zeros(6, dtype=torch.int64)}
    tune = [Hyperparameter("eps", per="label", init=0.1, labels=labels)]
    with pytest.raises(ValueError, match="acts on a parameter as a whole"):
        HyperOptimizer(layer, torch.optim.Muon(layer.parameters()), mse, tune, Unrolled(), FROZEN)


# ---- tuned tensors with bounds and a scale ----------------------------------------------------------------


def scaled_loss(scale: torch.Tensor):
    return lambda model, batch: mse(model, batch) + scale.square() * model.weight.square().sum()


def with_scale(method, *, log: bool, value: float = 0.5, hyper_optimizer=FROZEN, **bounds):
    scale = torch.tensor(value, dtype=torch.float64, requires_grad=True)
    torch.manual_seed(0)
    model = nn.Linear(4, 1).double()
    hyper = HyperOptimizer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        scaled_loss(scale),
        [Hyperparameter.of(scale, "scale", log=log, **bounds)],
        method,
        hyper_optimizer,
        val_loss=mse,
    )
    return hyper, scale


BATCHES = [random_batch(8, 4, seed) for seed in range(4)]


@pytest.mark.parametrize("method", [Unrolled(), ForwardMode()], ids=repr)
def test_the_hypergradient_is_with_respect_to_the_value_on_a_log_scale_too(method):
    found = []
    for log in (False, True):
        hyper, _ = with_scale(method, log=log)
        for batch in BATCHES[:3]:
            hyper.step(batch)
        found.append(hyper.hypergradient(BATCHES[3])["scale"].item())

    def val_loss_at(value: float) -> float:
        hyper, _ = with_scale(method, log=False, value=value)
        for batch in BATCHES[:3]:
            hyper.step(batch)
        return mse(hyper.model, BATCHES[3]).item()

    reference = (val_loss_at(0.5 + 1e-5) - val_loss_at(0.5 - 1e-5)) / 2e-5
    assert found == pytest.approx([reference, reference], rel=1e-8)


def test_a_step_on_a_log_scale_multiplies():
    hyper, scale = with_scale(Unrolled(), log=True, hyper_optimizer=partial(torch.optim.SGD, lr=0.3))
    hyper.step(BATCHES[0])
    gradient = hyper.hypergradient(BATCHES[3])["scale"]
    hyper.hyper_step(BATCHES[3])
    expected = 0.5 * torch.exp(-0.3 * gradient * 0.5)
    torch.testing.assert_close(scale.detach(), expected, rtol=1e-12, atol=0)
    assert torch.equal(hyper.values()["scale"], scale.detach())


@pytest.mark.parametrize("log", [False, True])
def test_bounds_are_kept_to_and_reported(log):
    up = partial(torch.optim.SGD, lr=1e6, maximize=True)
    for optimizer, bound in ((up, 0.6), (partial(torch.optim.SGD, lr=1e6), 0.4)):
        hyper, scale = with_scale(Unrolled(), log=log, low=0.4, high=0.6, hyper_optimizer=optimizer)
        hyper.step(BATCHES[0])
        sign = hyper.hypergradient(BATCHES[3])["scale"].sign().item()
        report = hyper.hyper_step(BATCHES[3])
        assert report.clipped == {"scale": 1}
        assert scale.item() == pytest.approx(bound if sign > 0 else 1.0 - bound, rel=1e-12)


def test_what_is_written_between_windows_is_taken_over_and_within_one_refused():
    hyper, scale = with_scale(Unrolled(), log=True, hyper_optimizer=partial(torch.optim.SGD, lr=0.0))
    hyper.step(BATCHES[0])
    hyper.hyper_step(BATCHES[3])
    with torch.no_grad():
        scale.fill_(0.25)
    hyper.step(BATCHES[0])
    hyper.hyper_step(BATCHES[3])
    assert scale.item() == pytest.approx(0.25, rel=1e-15)
    hyper.step(BATCHES[0])
    with torch.no_grad():
        scale.fill_(0.5)
    with pytest.raises(TrajectoryError, match=r"wrote to the hyperparameter 'scale'"):
        hyper.step(BATCHES[0])


def test_a_checkpoint_with_a_log_scale_goes_on_bit_by_bit():
    runs = [with_scale(Unrolled(), log=True, hyper_optimizer=torch.optim.Adam) for _ in range(2)]
    (hyper, scale), (other, other_scale) = runs
    hyper.step(BATCHES[0])
    hyper.hyper_step(BATCHES[3])
    other.load_state_dict(hyper.state_dict())
    assert torch.equal(scale, other_scale)
    for run in (hyper, other):
        run.step(BATCHES[1])
        run.hyper_step(BATCHES[3])
    assert torch.equal(scale, other_scale)
    plain, _ = with_scale(Unrolled(), log=False, hyper_optimizer=torch.optim.Adam)
    with pytest.raises(ValueError, match="another hyperparameter scale"):
        plain.load_state_dict(hyper.state_dict())


def test_implicit_takes_them_too():
    hyper, scale = with_scale(Implicit(CG(rtol=1e-12)), log=True)
    x, y = BATCHES[0]
    x = torch.cat([x, torch.ones(len(x), 1, dtype=x.dtype)], 1)

    def optimum(value: torch.Tensor) -> torch.Tensor:
        decay = torch.diag(torch.tensor([1.0, 1, 1, 1, 0], dtype=x.dtype))
        return torch.linalg.solve(x.T @ x / len(x) + value.square() * decay, x.T @ y[:, 0] / len(x))

    w = optimum(scale.detach())
    with torch.no_grad():
        hyper.model.weight.copy_(w[:4])
        hyper.model.bias.copy_(w[4:])
    hyper.record(BATCHES[0])
    value = scale.detach().clone().requires_grad_()
    w, (x_val, y_val) = optimum(value), BATCHES[3]
    (expected,) = torch.autograd.grad((x_val @ w[:4] + w[4] - y_val[:, 0]).square().mean(), value)
    torch.testing.assert_close(hyper.hypergradient(BATCHES[3])["scale"], expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "words"),
    [
        ((0.5,), {}, TypeError, r"Hyperparameter.of takes a tensor .* got 0.5"),
        ((torch.ones(()), 3), {}, TypeError, "name must be a string or None"),
        ((torch.ones(()), "s"), {"low": "0"}, TypeError, r"Hyperparameter.of\('s'\): low must be a number"),
        ((torch.ones(()), "s"), {"low": 2.0, "high": 1.0}, ValueError, "low=2.0 must be below high=1.0"),
        ((torch.zeros(()), "s"), {"log": True}, ValueError, "log=True with a value of 0"),
        ((torch.ones(()), "s"), {"log": 1}, TypeError, "log must be True or False"),
        ((torch.full((2,), torch.nan), "s"), {}, ValueError, "values must be finite"),
    ],
)
def test_bad_tensors_are_refused_when_they_are_written_down(arguments, options, error, words):
    with pytest.raises(error, match=words):
        Hyperparameter.of(*arguments, **options)


def test_a_tensor_that_is_no_leaf_is_refused_and_left_as_it_was():
    scale = torch.tensor(0.3)
    with pytest.raises(ValueError, match="'scale' must be a floating-point leaf with requires_grad=True"):
        wrapped(nn.Linear(4, 1), [Hyperparameter.of(scale, "scale", log=True)], Unrolled(), val_loss=mse)
    assert torch.equal(scale, torch.tensor(0.3))
