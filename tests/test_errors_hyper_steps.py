"""Hyper steps that cannot be, values that no hyperparameter may have, and checkpoints of other runs:
refused, and nothing is lost by it."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.autograd.function import once_differentiable

from problems import REPLAY
from refusals import (
    ADAM,
    DECAY,
    EVERY_METHOD,
    INFINITY,
    LR,
    NAN,
    REPLAYING,
    Point,
    batch,
    make,
    network,
    refused,
    short,
    trained,
    unchanged,
)
from torch_hypergrad import (
    CG,
    Cholesky,
    ForwardMode,
    Hyperparameter,
    Identity,
    Implicit,
    Neumann,
    NonFiniteError,
    NotTwiceDifferentiableError,
    SolverError,
    TrajectoryError,
    Unrolled,
)

# ---- hyper steps -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", EVERY_METHOD, ids=str)
@pytest.mark.parametrize("begin", ["new", "after a hyper step", "after restart"])
def test_nothing_recorded(method, begin):
    hyper = make(tune=DECAY, method=method)
    if begin != "new":
        hyper.step(batch(0))
        hyper.hyper_step(batch(9)) if begin == "after a hyper step" else hyper.restart()
    for call in (hyper.hypergradient, hyper.hyper_step):
        with unchanged(hyper), refused(TrajectoryError, "no training steps", "step(batch) first"):
            call(batch(9))


@pytest.mark.parametrize("method", [*REPLAYING, Implicit(Identity(0.1), num_batches=4)], ids=str)
@pytest.mark.parametrize("bad", [INFINITY, NAN])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_training_loss_that_is_not_finite(method, bad, when):
    hyper = trained(num_steps=0, method=method)
    for t in range(3):
        x, y = batch(t)
        hyper.step((x, y + bad) if t == when else (x, y))
    for call in (hyper.hypergradient, hyper.hyper_step):
        # The first of the three is step 2: one was taken before.
        with (
            unchanged(hyper),
            refused(NonFiniteError, f"training step {when + 2}", str(bad), "learning rate", "restart()"),
        ):
            call(batch(9))


@pytest.mark.parametrize("method", EVERY_METHOD, ids=str)
@pytest.mark.parametrize("bad", [INFINITY, NAN])
def test_a_validation_loss_that_is_not_finite(method, bad):
    hyper = trained(method=method)
    x, y = batch(9)
    for call in (hyper.hypergradient, hyper.hyper_step):
        with (
            unchanged(hyper),
            refused(NonFiniteError, "validation loss", str(bad), "learning rate", "validation batch"),
        ):
            call((x, y + bad))


@pytest.mark.parametrize("method", REPLAYING, ids=str)
def test_a_hypergradient_that_is_not_finite(method):
    """|w|^1.5 has the derivative 0 and an infinite second derivative at 0: every loss is finite."""

    def train_loss(model, batch):
        return model.w.abs().pow(1.5).sum()

    hyper = make(
        Point(0.0, 1.0),
        partial(torch.optim.SGD, lr=0.1),
        train_loss,
        method=method,
        val_loss=lambda model, batch: model.w.sum(),
    )
    for _ in range(3):
        hyper.step(None)
    for call in (hyper.hypergradient, hyper.hyper_step):
        with unchanged(hyper), refused(NonFiniteError, "lr/group0", "not finite", "truncation"):
            call(None)


class OnlyOnce(torch.autograd.Function):
    """The square, whose backward pass autograd takes for a constant: silently, where it starts from one."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return 2 * x * grad


def once_at_the_end(model, batch):
    x, y = batch
    return OnlyOnce.apply(model(x) - y).mean()


def once_in_the_middle(model, batch):
    x, y = batch
    return (OnlyOnce.apply(model(x)) - y).square().mean()


@pytest.mark.parametrize("train_loss", [once_at_the_end, once_in_the_middle])
@pytest.mark.parametrize("method", [REPLAY, Unrolled(max_snapshots=2), Implicit(CG())], ids=str)
def test_a_function_that_cannot_be_differentiated_twice(method, train_loss):
    hyper = make(train_loss=train_loss, tune=DECAY, method=method)
    for seed in range(2):
        hyper.step(batch(seed))
    for call in (hyper.hypergradient, hyper.hyper_step):
        with (
            unchanged(hyper),
            refused(NotTwiceDifferentiableError, "once_differentiable", "differentiable operations"),
        ):
            call(batch(9))


@pytest.mark.parametrize("train_loss", [once_at_the_end, once_in_the_middle])
def test_forward_mode_finds_at_the_first_step_what_cannot_be_differentiated_twice(train_loss):
    hyper = make(train_loss=train_loss, method=ForwardMode())
    with (
        unchanged(hyper),
        refused(NotTwiceDifferentiableError, "once_differentiable", "differentiable operations"),
    ):
        hyper.step(batch(0))


def test_a_compiled_loss_is_found_at_the_hyper_step():
    torch.compiler.reset()
    squares = torch.compile(lambda w: w.square().sum(), backend="aot_eager")
    hyper = make(Point(1.0, 2.0), partial(torch.optim.SGD, lr=0.1), lambda model, batch: squares(model.w))
    hyper.step(None)
    hyper.step(None)
    with unchanged(hyper), refused(NotTwiceDifferentiableError, "double backward", "before torch.compile"):
        hyper.hyper_step(None)


# Training losses whose Hessian is diag(1, -1), diag(3, 1) and 0.
INDEFINITE = torch.tensor([1.0, -1.0], dtype=torch.float64)
STEEP = torch.tensor([3.0, 1.0], dtype=torch.float64)
FLAT = torch.zeros(2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("solver", "curvature", "words"),
    [
        (
            Neumann(12, scale=0.5),
            INDEFINITE,
            ["Neumann diverged", "12 terms", "scale 0.5", "(0, 4)", "damping"],
        ),
        (Neumann(12), INDEFINITE, ["Neumann diverged", "12 terms", "damping"]),
        (
            Neumann(12, scale=1.0),
            STEEP,
            ["Neumann diverged", "12 terms", "scale 1", "(0, 2)", "lower", "scale=None"],
        ),
        (Neumann(1100, scale=1.0), STEEP, ["Neumann diverged", "1100 terms", "scale=None"]),
        (Neumann(12), FLAT, ["Neumann", "damping"]),
        (CG(), INDEFINITE, ["CG", "curvature -0.6", "iteration 1", "damping", "above 0.6"]),
        (CG(damping=0.1), INDEFINITE, ["CG", "curvature -0.5", "damping", "above 0.6"]),
        (CG(), FLAT, ["CG", "curvature 0", "damping"]),
        (Cholesky(), INDEFINITE, ["Cholesky", "2 x 2", "eigenvalue is -1", "damping", "above 1"]),
        (Cholesky(damping=0.5), INDEFINITE, ["Cholesky", "eigenvalue is -0.5", "damping", "above 1"]),
        (Cholesky(), FLAT, ["Cholesky", "eigenvalue is 0", "damping"]),
    ],
    ids=short,
)
def test_a_linear_system_that_cannot_be_solved(solver, curvature, words):
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    hyper = make(
        Point(0.5, 0.5),
        partial(torch.optim.SGD, lr=0.1),
        lambda model, batch: (curvature * model.w.square()).sum() / 2 - shift @ model.w,
        tune=[("shift", shift)],
        method=Implicit(solver),
        val_loss=lambda model, batch: model.w @ torch.tensor([1.0, 2.0], dtype=torch.float64),
    )
    hyper.step(None)
    for call in (hyper.hypergradient, hyper.hyper_step):
        with unchanged(hyper), refused(SolverError, *words):
            call(None)


def test_a_training_loss_without_an_optimum():
    shift = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    hyper = make(
        Point(0.5, 0.5),
        partial(torch.optim.SGD, lr=0.1),
        lambda model, batch: model.w.sum(),
        tune=[("shift", shift)],
        method=Implicit(CG()),
        val_loss=lambda model, batch: model.w.square().sum(),
    )
    hyper.step(None)
    with unchanged(hyper), refused(SolverError, "linear", "no optimum", "weight decay", "Unrolled()"):
        hyper.hyper_step(None)


# ---- values ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"lr/group1": torch.tensor(0.1)}, ["'lr/group1'", "lr/group0"]),
        ({"lr": torch.tensor(0.1)}, ["'lr'", "lr/group0"]),
        (
            {"lr/group0": torch.tensor(0.1), "weight_decay/0.bias": torch.ones(3)},
            ["'weight_decay/0.bias'", "(4,)", "(3,)"],
        ),
        (
            {"weight_decay/0.bias": torch.ones(4), "lr/group0": torch.tensor(-0.1)},
            ["lr/group0", "-0.1", "log"],
        ),
        ({"lr/group0": torch.tensor(0.0)}, ["lr/group0", "0", "log"]),
        ({"lr/group0": torch.tensor(NAN)}, ["lr/group0", "finite", "nan"]),
        ({"weight_decay/0.bias": torch.full((4,), INFINITY)}, ["weight_decay/0.bias", "finite", "inf"]),
        ({"weight_decay/0.bias": torch.tensor([0.1, 0.1, 0.1, 7.0])}, ["weight_decay/0.bias", "7", "5"]),
        ({"weight_decay/0.bias": torch.tensor([0.1, 0.1, 0.1, -1.0])}, ["weight_decay/0.bias", "-1", "0"]),
    ],
    ids=short,
)
def test_set_values_refuses(values, words):
    hyper = make(
        tune=[Hyperparameter("lr", log=True), Hyperparameter("weight_decay", per="element", high=5.0)]
    )
    with unchanged(hyper), refused(ValueError, *words):
        hyper.set_values(values)


@pytest.mark.parametrize("method", REPLAYING, ids=str)
def test_set_values_in_the_middle_of_a_window(method):
    hyper = make(method=method)
    hyper.step(batch(0))
    with unchanged(hyper), refused(TrajectoryError, "hyperparameter", "window", "hyper step", "restart()"):
        hyper.set_values({"lr/group0": torch.tensor(0.1)})


# ---- checkpoints -------------------------------------------------------------------------------------------


def two_groups(model, *, sizes):
    """An optimizer whose groups hold the parameters in order, so many each."""
    parameters = iter(list(model.parameters()))
    return ADAM([{"params": [next(parameters) for _ in range(size)]} for size in sizes])


ELEMENT = (Hyperparameter("weight_decay", per="element"),)
TWO = (Hyperparameter("lr"), Hyperparameter("weight_decay"))


@pytest.mark.parametrize(
    ("saved", "loaded", "words"),
    [
        ({"model": partial(network, width=5)}, {}, ["another model", "'0.weight'", "[5, 3]", "[4, 3]"]),
        (
            {"model": lambda: nn.Sequential(network()), "tune": LR},
            {"tune": LR},
            ["another model", "'0.0.weight'", "none"],
        ),
        ({"tune": DECAY}, {"tune": LR}, ["another hyperparameter", "'weight_decay/group0'", "none"]),
        ({"tune": ELEMENT}, {"tune": DECAY}, ["another hyperparameter", "'weight_decay/0.weight'"]),
        ({"tune": TWO}, {"tune": TWO[::-1]}, ["another hyperparameter", "order"]),
        ({"tune": [Hyperparameter("lr", log=True)]}, {"tune": LR}, ["another hyperparameter", "lr", "log"]),
        (
            {"tune": [Hyperparameter("lr", init=0.5)]},
            {"tune": [Hyperparameter("lr", high=0.1)]},
            ["lr", "0.1"],
        ),
        ({"optimizer": partial(torch.optim.AdamW, lr=0.1)}, {}, ["another optimizer", "AdamW", "Adam"]),
        ({"method": ForwardMode()}, {}, ["another method", "ForwardMode()", "Unrolled("]),
        ({"method": Unrolled(truncation=2)}, {}, ["another method", "truncation=2", "truncation=None"]),
        ({"hyper_optimizer": partial(torch.optim.Adam, lr=0.1)}, {}, ["another", "hyper", "Adam", "SGD"]),
        (
            {"optimizer": lambda p, model: two_groups(model, sizes=[6]), "tune": ELEMENT},
            {"optimizer": lambda p, model: two_groups(model, sizes=[2, 4]), "tune": ELEMENT},
            ["another", "group"],
        ),
        (
            {
                "model": lambda: nn.Sequential(
                    nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=False)
                ).double()
            },
            {"model": lambda: nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()},
            ["another model", "running_mean"],
        ),
    ],
    ids=short,
)
def test_a_checkpoint_of_another_run(saved, loaded, words):
    def made(model=network, optimizer=None, **options):
        model = model()
        chosen = ADAM if optimizer is None else optimizer
        if optimizer is not None and not isinstance(optimizer, partial):
            chosen = lambda p: optimizer(p, model)  # noqa: E731
        return make(model, chosen, **options)

    checkpoint = made(**saved)
    checkpoint.step(batch(0))
    hyper = made(**loaded)
    hyper.step(batch(1))
    with unchanged(hyper), refused(ValueError, *words):
        hyper.load_state_dict(checkpoint.state_dict())
    hyper.step(batch(2))
    assert hyper.hyper_step(batch(9)).hypergradient_norm > 0


@pytest.mark.parametrize(
    "checkpoint",
    [
        {},
        {"epoch": 3, 0: "mixed keys"},
        network().state_dict(),
        ADAM(network().parameters()).state_dict(),
        None,
        [1, 2],
        "run.pt",
    ],
    ids=["empty", "other", "model", "optimizer", "None", "list", "path"],
)
def test_what_is_no_checkpoint(checkpoint):
    hyper = trained()
    kind = ValueError if isinstance(checkpoint, dict) else TypeError
    with unchanged(hyper), refused(kind, "no checkpoint of a HyperOptimizer", "hyper.state_dict()"):
        hyper.load_state_dict(checkpoint)
    assert hyper.hyper_step(batch(9)).hypergradient_norm > 0


def test_a_checkpoint_that_lost_a_part():
    hyper = trained()
    for key in hyper.state_dict():
        part = {k: v for k, v in copy.deepcopy(hyper.state_dict()).items() if k != key}
        with unchanged(hyper), refused(ValueError, "checkpoint"):
            hyper.load_state_dict(part)
