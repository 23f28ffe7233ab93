"""Bad training steps, and writes behind the wrapper's back, are refused at the earliest moment,
and nothing is lost: values, hyper optimizer, weights, buffers, optimizer state, modes and random numbers
are bitwise as before."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from problems import REPLAY
from refusals import (
    ADAM,
    DECAY,
    EVERY_METHOD,
    HYPER_SGD,
    LR,
    REPLAYING,
    batch,
    everything,
    frozen_bytes,
    make,
    mse,
    network,
    refused,
    short,
    unchanged,
)
from torch_hypergrad import (
    ForwardMode,
    HyperOptimizer,
    Hyperparameter,
    Identity,
    Implicit,
    NonFiniteError,
    TrajectoryError,
    Unrolled,
)

# ---- training steps ----------------------------------------------------------------------------------------


def returning(change):
    """A training loss that runs the model, random numbers and all, and then returns something else."""
    return lambda model, batch: change(mse(model, batch))


BAD_LOSSES = [
    (lambda loss: loss.item(), TypeError, ["train_loss", "float", "scalar tensor"]),
    (lambda loss: None, TypeError, ["train_loss", "NoneType", "scalar tensor"]),
    (lambda loss: (loss, loss), TypeError, ["train_loss", "tuple", "scalar tensor"]),
    (lambda loss: loss.expand(2, 3), ValueError, ["train_loss", "(2, 3)", ".mean()"]),
    (
        lambda loss: loss.detach(),
        ValueError,
        ["train_loss", "without a graph", ".detach()", "torch.no_grad()"],
    ),
]


@pytest.mark.parametrize(("change", "kind", "words"), BAD_LOSSES, ids=short)
@pytest.mark.parametrize("method", EVERY_METHOD, ids=str)
def test_a_training_loss_that_is_none(change, kind, words, method):
    hyper = make(train_loss=returning(change), tune=DECAY, method=method)
    with unchanged(hyper), refused(kind, *words):
        hyper.step(batch(0))


@pytest.mark.parametrize(("change", "kind", "words"), BAD_LOSSES, ids=short)
def test_a_validation_loss_that_is_none(change, kind, words):
    hyper = make(val_loss=returning(change))
    hyper.step(batch(0))
    words = [word.replace("train_loss", "val_loss") for word in words]
    for call in (hyper.hyper_step, hyper.hypergradient, hyper.validation_loss):
        with unchanged(hyper), refused(kind, *words):
            call(batch(9))


@pytest.mark.parametrize("method", REPLAYING, ids=str)
def test_a_failed_step_loses_nothing_of_the_window(method):
    def one_in_three_fails(model, batch):
        x, y = batch
        return mse(model, (x, y)) if len(x) != 5 else mse(model, (x, y)).item()

    runs = []
    for fails in (False, True):
        hyper = make(train_loss=one_in_three_fails, tune=DECAY, method=method)
        torch.manual_seed(1)
        for seed in range(3):
            hyper.step(batch(seed))
            if fails:
                with unchanged(hyper), refused(TypeError, "train_loss"):
                    hyper.step(batch(seed, num=5))
        runs.append(frozen_bytes([hyper.hypergradient(batch(9)), everything(hyper)]))
    assert runs[0] == runs[1]


def test_past_the_end_of_a_schedule():
    hyper = make(tune=[Hyperparameter("lr", per="step", num_steps=2)])
    hyper.step(batch(0))
    hyper.hyper_step(batch(9))  # a hyper step does not end the episode
    hyper.step(batch(1))
    with unchanged(hyper), refused(ValueError, "step 3", "lr/group0", "num_steps=2", "restart()"):
        hyper.step(batch(2))
    hyper.restart()
    hyper.step(batch(0))


@pytest.mark.parametrize(
    ("transform", "kind", "words"),
    [
        (
            lambda grads: grads[1:],
            ValueError,
            ["grad_transform", "(4, 3)", "returned", "one gradient for each"],
        ),
        (
            lambda grads: [g.flatten() for g in grads],
            ValueError,
            ["grad_transform", "(4, 3)", "(12,)", "same shapes"],
        ),
        (lambda grads: [], ValueError, ["grad_transform", "(4, 3)", "one gradient for each"]),
        (lambda grads: None, TypeError, ["grad_transform", "None", "list"]),
        (lambda grads: [None for _ in grads], TypeError, ["grad_transform", "None", "tensor"]),
    ],
    ids=short,
)
@pytest.mark.parametrize("method", [REPLAY, ForwardMode()], ids=str)
def test_a_grad_transform_that_returns_something_else(transform, kind, words, method):
    hyper = make(grad_transform=transform, method=method)
    with unchanged(hyper), refused(kind, *words):
        hyper.step(batch(0))


@pytest.mark.parametrize("method", [REPLAY, ForwardMode()], ids=str)
def test_a_grad_transform_that_loses_the_graph(method):
    hyper = make(grad_transform=lambda grads: [grads[0].detach(), *grads[1:]], method=method)
    call = hyper.step
    if isinstance(method, Unrolled):  # which asks for the graph when it replays
        hyper.step(batch(0))
        call = hyper.hypergradient
    with unchanged(hyper), refused(ValueError, "grad_transform", "without a graph", "detach"):
        call(batch(9))


def test_a_hyper_step_to_infinity():
    leap = partial(torch.optim.SGD, lr=1e6, momentum=0.5, maximize=True)
    hyper = make(tune=[Hyperparameter("lr", log=True)], hyper_optimizer=leap)
    while True:
        hyper.step(batch(0))
        if hyper.hypergradient(batch(9))["lr/group0"] > 0:
            break
    with unchanged(hyper), refused(NonFiniteError, "'lr/group0'", "inf", "hyper_optimizer", "high="):
        hyper.hyper_step(batch(9))


def test_a_sparse_gradient():
    model = nn.Sequential(nn.Embedding(5, 3, sparse=True), nn.Dropout(0.5), nn.Linear(3, 1)).double()
    hyper = make(model, optimizer=partial(torch.optim.SGD, lr=0.1))
    with unchanged(hyper), refused(ValueError, "'0.weight'", "sparse", "sparse=False"):
        hyper.step((torch.tensor([0, 3]), torch.zeros(2, 1, dtype=torch.float64)))


def test_a_param_group_that_came_later():
    model = network()
    optimizer = ADAM(model[0].parameters())
    hyper = HyperOptimizer(model, optimizer, mse, LR, REPLAY, HYPER_SGD)
    hyper.step(batch(0))
    optimizer.add_param_group({"params": model[4].parameters()})
    with unchanged(hyper), refused(ValueError, "group", "after", "new HyperOptimizer"):
        hyper.step(batch(1))


def test_a_scheduler_factor_on_a_start_of_zero():
    hyper = make(optimizer=partial(torch.optim.SGD, lr=0.0), tune=[Hyperparameter("lr", init=0.1)])
    hyper.optimizer.param_groups[0]["lr"] = 0.5
    with unchanged(hyper), refused(ValueError, "lr", "0.5", "scheduler", "above 0"):
        hyper.step(batch(0))


# ---- what changes behind the wrapper's back ----------------------------------------------------------------


def set_in_place(hyper, scale):
    with torch.no_grad():
        hyper.model[0].weight.add_(0.1)


def set_through_data(hyper, scale):
    hyper.model[0].weight.data.add_(0.1)


def set_data_anew(hyper, scale):
    hyper.model[0].weight.data = hyper.model[0].weight.data + 0.1


def load_model(hyper, scale):
    hyper.model.load_state_dict(network(5).state_dict())


def step_the_wrapped_optimizer(hyper, scale):
    mse(hyper.model, batch(7)).backward()
    hyper.optimizer.step()
    hyper.optimizer.zero_grad()


def load_optimizer(hyper, scale):
    model = network(5)
    optimizer = ADAM(model.parameters())
    mse(model, batch(7)).backward()
    optimizer.step()
    hyper.optimizer.load_state_dict(optimizer.state_dict())


def set_optimizer_state_in_place(hyper, scale):
    hyper.optimizer.state[hyper.model[0].weight]["exp_avg"].zero_()


def set_tuned_tensor(hyper, scale):
    with torch.no_grad():
        scale.add_(0.1)


def set_tuned_tensor_through_data(hyper, scale):
    scale.data.add_(0.1)


AT_ONCE = [
    (set_in_place, ["parameter '0.weight'"]),
    (set_through_data, ["parameter"]),
    (set_data_anew, ["parameter '0.weight'"]),
    (load_model, ["parameter '0.weight'"]),
    (step_the_wrapped_optimizer, ["parameter '0.weight'"]),
    (load_optimizer, ["optimizer's state"]),
    (set_optimizer_state_in_place, ["optimizer's state"]),
    (set_tuned_tensor, ["'scale'"]),
]
EVERY_CHANGE = [*AT_ONCE, (set_tuned_tensor_through_data, ["'scale'"])]
REMEDIES = ["hyper step", "restart()", "Implicit"]


def scaled(method, scale=None):
    """A HyperOptimizer with a tuned tensor that scales the training targets."""
    scale = torch.ones((), dtype=torch.float64, requires_grad=True) if scale is None else scale

    def train_loss(model, batch):
        x, y = batch
        return mse(model, (x, y * scale))

    return make(train_loss=train_loss, val_loss=mse, tune=[*DECAY, ("scale", scale)], method=method), scale


@pytest.mark.parametrize(("change", "words"), AT_ONCE, ids=short)
@pytest.mark.parametrize("method", REPLAYING, ids=str)
def test_a_change_in_the_middle_of_a_window_is_found_at_once(change, words, method):
    hyper, scale = scaled(method)
    for seed in range(2):
        hyper.step(batch(seed))
    change(hyper, scale)
    for call in (hyper.step, hyper.hypergradient, hyper.hyper_step):
        with unchanged(hyper), refused(TrajectoryError, "step 3", *words, *REMEDIES):
            call(batch(9))


@pytest.mark.parametrize("num_steps_after", [0, 2])
@pytest.mark.parametrize("method", REPLAYING, ids=str)
def test_a_change_of_a_tuned_tensor_without_a_trace_is_found_at_the_hyper_step(num_steps_after, method):
    hyper, scale = scaled(method)
    for seed in range(2):
        hyper.step(batch(seed))
    set_tuned_tensor_through_data(hyper, scale)
    for seed in range(num_steps_after):
        hyper.step(batch(2 + seed))
    for call in (hyper.hypergradient, hyper.hyper_step):
        with unchanged(hyper), refused(TrajectoryError, "'scale'", *REMEDIES):
            call(batch(9))


@pytest.mark.parametrize(("change", "words"), EVERY_CHANGE, ids=short)
def test_restart_recovers_from_a_change(change, words):
    """The run after it is what it would have been, with the tuned tensor as the change left it."""
    hyper, scale = scaled(REPLAY)
    for seed in range(2):
        hyper.step(batch(seed))
    change(hyper, scale)
    hyper.restart()
    untouched, _ = scaled(REPLAY, scale.detach().clone().requires_grad_())
    runs = []
    for h in (hyper, untouched):
        torch.manual_seed(3)
        losses = [h.step(batch(seed)) for seed in range(2)]
        runs.append(frozen_bytes([losses, h.hypergradient(batch(9))]))
    assert runs[0] == runs[1]


@pytest.mark.parametrize(("change", "words"), EVERY_CHANGE, ids=short)
@pytest.mark.parametrize("method", REPLAYING, ids=str)
def test_between_two_windows_everything_may_be_changed(change, words, method):
    hyper, scale = scaled(method)
    hyper.step(batch(0))
    hyper.hyper_step(batch(9))
    change(hyper, scale)
    torch.manual_seed(3)
    hyper.step(batch(1))
    hyper.step(batch(2))
    found = hyper.hypergradient(batch(9))
    assert all(h.isfinite().all() for h in found.values())


@pytest.mark.parametrize(("change", "words"), EVERY_CHANGE, ids=short)
def test_implicit_goes_on_from_changed_weights(change, words):
    """Its hypergradient is that at the weights as they are, bitwise as if they had never been others."""
    hyper, scale = scaled(Implicit(Identity(0.5), num_batches=2))
    for seed in range(2):
        hyper.step(batch(seed))
    change(hyper, scale)
    hyper.step(batch(3))
    change(hyper, scale)
    checkpoint = copy.deepcopy(hyper.state_dict())
    decay = -0.5 * sum((g * p).sum() for g, p in zip(validation_gradients(hyper), hyper.model.parameters()))
    found = hyper.hypergradient(batch(9))
    torch.testing.assert_close(found["weight_decay/group0"], decay, rtol=1e-10, atol=0.0)
    assert hyper.hyper_step(batch(9)).hypergradient_norm > 0

    fresh, _ = scaled(Implicit(Identity(0.5), num_batches=2))
    fresh.load_state_dict(checkpoint)
    assert frozen_bytes(fresh.hypergradient(batch(9))) == frozen_bytes(found)


def validation_gradients(hyper):
    """By plain autograd, on a copy of the model and with the same dropout masks."""
    model = copy.deepcopy(hyper.model)
    with torch.random.fork_rng():
        return torch.autograd.grad(mse(model, batch(9)), list(model.parameters()))


@pytest.mark.parametrize(
    "method", [REPLAY, Unrolled(max_snapshots=2), Implicit(Identity(0.1), num_batches=4)], ids=str
)
def test_a_batch_changed_in_place_before_its_replay(method):
    hyper = make(tune=DECAY, method=method)
    batches = [batch(seed) for seed in range(4)]
    for b in batches:
        hyper.step(b)
    batches[2][0].add_(1.0)
    for call in (hyper.hypergradient, hyper.hyper_step):
        with unchanged(hyper), refused(TrajectoryError, "step 3", "changed in place", "clone"):
            call(batch(9))


def test_forward_mode_needs_no_batch_again():
    hyper, other = (make(method=ForwardMode()) for _ in range(2))
    for h in (hyper, other):
        torch.manual_seed(1)
        b = batch(0)
        h.step(b)
        if h is hyper:
            b[0].zero_()
    assert frozen_bytes(hyper.hypergradient(batch(9))) == frozen_bytes(other.hypergradient(batch(9)))
