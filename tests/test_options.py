"""Options of a configuration against the signatures of torch.optim's classes and of one's own."""

import warnings

import pytest
import torch
from torch.optim import lr_scheduler

from torch_hypergrad.experiment.config import ConfigError
from torch_hypergrad.experiment.options import call_with_options, check_options

DENSE = [
    kind
    for kind in vars(torch.optim).values()
    if isinstance(kind, type)
    and issubclass(kind, torch.optim.Optimizer)
    and kind is not torch.optim.Optimizer
]


def weights(*shape):
    return [torch.zeros(*shape or (3,), requires_grad=True)]


def optimizer(kind, options):
    return call_with_options(kind, options, "optimizer.options", weights(), skip={"params"})


def scheduler(kind, options):
    sgd = torch.optim.SGD(weights(), lr=0.1)
    return call_with_options(kind, options, "scheduler.options", sgd, skip={"optimizer"})


def refused(call, *args):
    with pytest.raises(ConfigError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", DENSE, ids=lambda kind: kind.__name__)
def test_every_optimizer_takes_its_defaults_and_a_learning_rate(kind):
    made = call_with_options(kind, {"lr": 0.01}, "optimizer.options", weights(3, 3), skip={"params"})
    assert made.param_groups[0]["lr"] == 0.01
    assert made.defaults == {**kind(weights(3, 3)).defaults, "lr": 0.01}


def test_a_list_becomes_the_tuple_that_betas_are():
    assert optimizer(torch.optim.Adam, {"lr": 0.1, "betas": [0.5, 0.9]}).defaults["betas"] == (0.5, 0.9)
    assert (
        optimizer(torch.optim.SGD, {"lr": 1, "momentum": 0.9, "nesterov": True}).defaults["nesterov"] is True
    )


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (lr_scheduler.CosineAnnealingLR, {"T_max": 10, "eta_min": 0.01}),
        (lr_scheduler.StepLR, {"step_size": 3}),
        (lr_scheduler.MultiStepLR, {"milestones": [2, 4], "gamma": 0.5}),
        (lr_scheduler.ExponentialLR, {"gamma": 0.9}),
        (lr_scheduler.LinearLR, {"total_iters": 4}),
        (lr_scheduler.PolynomialLR, {}),
        (lr_scheduler.CosineAnnealingWarmRestarts, {"T_0": 3}),
        (lr_scheduler.OneCycleLR, {"max_lr": 0.2, "total_steps": 20, "cycle_momentum": False}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_schedulers_do_what_they_do_when_called_directly(kind, options):
    def rates(made):
        found = []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the optimizer has not stepped
            for _ in range(6):
                made.step()
                found.append(made.get_last_lr()[0])
        return found

    assert rates(scheduler(kind, options)) == rates(kind(torch.optim.SGD(weights(), lr=0.1), **options))


@pytest.mark.parametrize(
    ("kind", "options", "parts"),
    [
        (
            torch.optim.SGD,
            {"momentun": 0.9},
            ["optimizer.options: SGD has no momentun", "Did you mean momentum?"],
        ),
        (torch.optim.SGD, {"zzz": 0.9}, ["SGD has no zzz", "It has lr, momentum"]),
        (torch.optim.SGD, {"params": []}, ["SGD has no params"]),
        (torch.optim.SGD, {"lr.x": 0.1}, ["SGD has no lr.x", "lr"]),
        (torch.optim.SGD, {3: 0.1}, ["SGD has no 3"]),
        (torch.optim.SGD, {"lr": "fast"}, ["optimizer.options.lr: got 'fast', expected ", "float"]),
        (torch.optim.SGD, {"lr": None}, ["optimizer.options.lr: got null, expected float or torch.Tensor."]),
        (torch.optim.SGD, {"lr": 0.1, "nesterov": 3}, ["optimizer.options.nesterov: got 3, expected bool"]),
        (torch.optim.Adam, {"betas": 0.9}, ["optimizer.options.betas: got 0.9, expected ", "uple["]),
        (torch.optim.Adam, {"betas": [0.9]}, ["optimizer.options.betas: got [0.9], expected ", "uple["]),
        (
            torch.optim.SGD,
            {"lr": -1.0},
            ["optimizer.options: SGD refused {'lr': -1.0}", "Invalid learning rate"],
        ),
        (torch.optim.AdamW, {"betas": [0.9, 1.5]}, ["optimizer.options: AdamW refused", "Invalid beta"]),
        (torch.optim.SGD, {"lr": 0.1, "nesterov": True}, ["SGD refused", "Nesterov"]),
    ],
)
def test_what_an_optimizer_does_not_take_is_refused_in_one_line(kind, options, parts):
    message = refused(optimizer, kind, options)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize(
    ("kind", "options", "parts"),
    [
        (lr_scheduler.CosineAnnealingLR, {}, ["scheduler.options: CosineAnnealingLR", "T_max"]),
        (lr_scheduler.StepLR, {"step": 3}, ["StepLR has no step", "Did you mean step_size?"]),
        (lr_scheduler.StepLR, {"step_size": 3, "optimizer": 1}, ["StepLR has no optimizer"]),
        (lr_scheduler.StepLR, {"step_size": 2.5}, ["scheduler.options.step_size: got 2.5, expected int"]),
        (lr_scheduler.MultiStepLR, {"milestones": 3}, ["scheduler.options.milestones: got 3"]),
        (lr_scheduler.OneCycleLR, {"max_lr": 0.1}, ["scheduler.options: OneCycleLR refused", "total_steps"]),
        (lr_scheduler.LinearLR, {"start_factor": 2.0}, ["LinearLR refused", "factor"]),
    ],
)
def test_what_a_scheduler_does_not_take_is_refused_in_one_line(kind, options, parts):
    message = refused(scheduler, kind, options)
    assert all(part in message for part in parts), message


class Untyped:
    """One's own class, without annotations, that takes anything."""

    def __init__(self, first, second=2, **others):
        if "broken" in others:
            raise RuntimeError("two\nlines")
        self.all = {"first": first, "second": second, **others}


class Derived(Untyped):
    def __init__(self, width: int = 3, **others):
        super().__init__(**others)
        self.all["width"] = width


def test_classes_without_annotations_take_anything():
    made = call_with_options(Untyped, {"first": [1, "a"], "third": {"x": 1}}, "model.options")
    assert made.all == {"first": [1, "a"], "second": 2, "third": {"x": 1}}
    assert call_with_options(Derived, {"first": 1, "width": 4}, "k").all == {
        "first": 1,
        "second": 2,
        "width": 4,
    }
    assert "required positional argument: 'first'" in refused(call_with_options, Untyped, {}, "k")
    assert refused(call_with_options, Untyped, {"first": 1, "broken": 1}, "k").endswith(": two lines")
    assert "k.width: got 'x', expected int" in refused(
        call_with_options, Derived, {"first": 1, "width": "x"}, "k"
    )


def annotated(sizes: "list[int]", rate: float = 0.5, activation: str = "relu"):
    return sizes, rate, activation


def test_functions():
    assert call_with_options(annotated, {"sizes": [1, 2]}, "k") == ([1, 2], 0.5, "relu")
    assert check_options(annotated, {"sizes": [3], "rate": 1}, "k") == {"sizes": [3], "rate": 1.0}
    assert (
        refused(check_options, annotated, {"sizes": [1, "a"]}, "k")
        == "k.sizes: got [1, 'a'], expected list[int]."
    )
    assert refused(call_with_options, lambda: None, {"x": 1}, "k").endswith("It takes no options.")


def test_errors_of_the_configuration_pass_through():
    def raises():
        raise ConfigError("as it is")

    assert refused(call_with_options, raises, {}, "k") == "as it is"
