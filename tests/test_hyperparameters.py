"""Names, shapes, starts, bounds and scales of hyperparameters; schedules; how values are laid out for the update rules,
and the transpose of that; and the plan by which a sweep goes back with few snapshots."""

import math
import weakref
from functools import cache, partial
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from torch_hypergrad import ForwardMode, HyperOptimizer, Hyperparameter, Implicit, Neumann, Unrolled
from torch_hypergrad.buckets import Bucket
from torch_hypergrad.granularity import PerElement, PerGroup, PerStep, PerTensor
from torch_hypergrad.trajectory import Trajectory, next_snapshot
from torch_hypergrad.vectors import Layout

DOUBLE = partial(torch.tensor, dtype=torch.float64)
FROZEN = partial(torch.optim.SGD, lr=0.0)
quickly = settings(max_examples=60, deadline=None)


def close(found, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def filled(shape, value):
    return torch.full(shape, value, dtype=torch.float64)


# ---- names, order, shapes and starts --------------------------------------------------------------------------------


def mse(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(6, 2, dtype=torch.float64, generator=generator)
    return x, torch.randn(6, 1, dtype=torch.float64, generator=generator)


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1, bias=False)).double()


def grouped(tune, method=None, *, second_first=False, hyper_optimizer=FROZEN, **options):
    """Two groups: the first layer with lr 0.1, the second with lr 0.2 and other decay; in this order or the other."""
    model = network()
    groups = [
        {"params": model[0].parameters(), "lr": 0.1, "weight_decay": 0.01},
        {"params": model[2].parameters(), "lr": 0.2, "weight_decay": 0.02, "betas": (0.8, 0.99)},
    ]
    optimizer = torch.optim.Adam(groups[::-1] if second_first else groups)
    method = Unrolled() if method is None else method
    return HyperOptimizer(model, optimizer, mse, tune, method, hyper_optimizer, **options)


NAMES = {
    "group": {"group0": (), "group1": ()},
    "tensor": {"0.weight": (), "0.bias": (), "2.weight": ()},
    "element": {"0.weight": (3, 2), "0.bias": (3,), "2.weight": (1, 3)},
    "step": {"group0": (4,), "group1": (4,)},
}
NUM_VALUES = {"group": 2, "tensor": 3, "element": 12, "step": 8}


def tuned(name, per, **options):
    return Hyperparameter(name, per=per, num_steps=4 if per == "step" else None, **options)


def shapes(named):
    return {name: tuple(value.shape) for name, value in named.items()}


@pytest.mark.parametrize("per", NAMES)
@pytest.mark.parametrize("name", ["weight_decay", "lr", "betas.0"])
@pytest.mark.parametrize("method", [Unrolled(), ForwardMode()], ids=str)
def test_names_order_and_shapes(name, per, method):
    hyper = grouped([tuned(name, per)], method)
    expected = {f"{name}/{part}": shape for part, shape in NAMES[per].items()}
    for seed in range(2):
        hyper.step(batch(seed))
    for named in (hyper.values(), hyper.hypergradient(batch(9))):
        assert list(named) == list(expected)
        assert shapes(named) == expected


@pytest.mark.parametrize("per", ["group", "tensor", "element"])
def test_names_of_implicit_are_the_same(per):
    hyper = grouped([tuned("weight_decay", per)], Implicit(Neumann(3, scale=0.01, damping=5.0)))
    hyper.step(batch())
    assert shapes(hyper.hypergradient(batch(9))) == {f"weight_decay/{part}": s for part, s in NAMES[per].items()}


def test_the_order_is_that_of_the_optimizer():
    hyper = grouped([tuned("lr", "tensor"), tuned("weight_decay", "group")], second_first=True)
    names = ["lr/2.weight", "lr/0.weight", "lr/0.bias", "weight_decay/group0", "weight_decay/group1"]
    assert list(hyper.values()) == names
    assert hyper.values()["lr/2.weight"] == 0.2
    assert hyper.values()["weight_decay/group0"] == 0.02


@pytest.mark.parametrize("per", NAMES)
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(
    ("init", "expected"),
    [
        (None, {"0": 0.01, "2": 0.02}),
        (0.5, {"0": 0.5, "2": 0.5}),
        (3, {"0": 3.0, "2": 3.0}),
        (DOUBLE(0.25), {"0": 0.25, "2": 0.25}),
        (DOUBLE([0.25]), {"0": 0.25, "2": 0.25}),
        (torch.tensor(0.25, requires_grad=True), {"0": 0.25, "2": 0.25}),
    ],
    ids=str,
)
def test_one_start_for_all(per, log, init, expected):
    hyper = grouped([tuned("weight_decay", per, init=init, log=log)])
    for (name, value), part in zip(hyper.values().items(), NAMES[per]):
        layer = {"group0": "0", "group1": "2"}.get(part, part.partition(".")[0])
        assert name == f"weight_decay/{part}"
        close(value, filled(NAMES[per][part], expected[layer]))


@pytest.mark.parametrize("per", NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_start_for_each(per, dtype):
    """In the order of the groups and their parameters, whatever the shape of ``init``."""
    start = torch.arange(1, NUM_VALUES[per] + 1, dtype=dtype)
    for init in (start, start.reshape(1, -1)):
        hyper = grouped([tuned("weight_decay", per, init=init)])
        assert torch.cat([value.reshape(-1) for value in hyper.values().values()]).tolist() == start.tolist()


def test_the_start_is_not_the_users_tensor():
    init = DOUBLE([1.0, 2.0])
    hyper = grouped([tuned("weight_decay", "group", init=init)])
    init.zero_()
    assert [v.item() for v in hyper.values().values()] == [1.0, 2.0]


def test_the_start_is_the_initial_lr_below_a_scheduler():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.4)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.25)
    hyper = HyperOptimizer(model, optimizer, mse, [Hyperparameter("lr")], Unrolled(), FROZEN)
    assert hyper.values()["lr/group0"] == 0.4


@pytest.mark.parametrize("per", NAMES)
def test_values_are_copies(per):
    hyper = grouped([tuned("lr", per)])
    for value in hyper.values().values():
        assert not value.requires_grad
        value.zero_()
    assert all((value > 0).all() for value in hyper.values().values())


def test_a_group_without_parameters():
    """torch takes one, for instance where no parameter is exempt from decay."""
    model = network()
    optimizer = torch.optim.SGD([{"params": model.parameters()}, {"params": [], "lr": 0.3}], lr=0.1)
    hyper = HyperOptimizer(model, optimizer, mse, [Hyperparameter("lr")], Unrolled(), FROZEN)
    hyper.step(batch())
    assert hyper.hypergradient(batch(9))["lr/group0"] != 0


# ---- one weight, with closed forms ----------------------------------------------------------------------------------

CURVATURE, OPTIMUM, TARGET, START = 2.0, 1.0, 0.3, 0.9


class Weight(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(DOUBLE([START]))


def train_loss(model, batch):
    return CURVATURE * (model.w - OPTIMUM).square().sum() / 2


def val_loss(model, batch):
    return (model.w - TARGET).square().sum() / 2


def gradient(w):
    return CURVATURE * (w - OPTIMUM)


def one_weight(tune, hyper_lr=0.0, lr=0.1, method=None, make_optimizer=torch.optim.SGD, **options):
    model = Weight()
    optimizer = make_optimizer(model.parameters(), lr=lr)
    hyper_optimizer = partial(torch.optim.SGD, lr=hyper_lr)
    method = Unrolled() if method is None else method
    options.setdefault("val_loss", val_loss)
    return HyperOptimizer(model, optimizer, options.pop("train_loss", train_loss), tune, method, hyper_optimizer, **options)


@pytest.mark.parametrize("per", ["group", "tensor", "element"])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("method", [Unrolled(), ForwardMode()], ids=str)
def test_hypergradient_is_with_respect_to_the_values(per, log, method):
    """After one step w1 = w0 - lr (g0 + wd w0)."""
    lr, decay = 0.1, 0.05
    tune = [Hyperparameter("lr", per, init=lr, log=log), Hyperparameter("weight_decay", per, init=decay, log=log)]
    hyper = one_weight(tune, method=method)
    hyper.step(None)
    direction = gradient(START) + decay * START
    error = START - lr * direction - TARGET
    by_lr, by_decay = hyper.hypergradient(None).values()
    close(by_lr, filled(by_lr.shape, -error * direction))
    close(by_decay, filled(by_decay.shape, -error * lr * START))


@pytest.mark.parametrize("per", ["group", "tensor", "element"])
def test_a_hyper_step_on_a_linear_scale(per):
    hyper = one_weight([Hyperparameter("lr", per, init=0.1)], hyper_lr=0.5)
    hyper.step(None)
    (g,) = hyper.hypergradient(None).values()
    report = hyper.hyper_step(None)
    (value,) = hyper.values().values()
    close(value, 0.1 - 0.5 * g)
    assert report.hypergradient_norm == pytest.approx(abs(g.item()), rel=1e-12)


@pytest.mark.parametrize("per", ["group", "tensor", "element"])
def test_a_hyper_step_on_a_log_scale(per):
    """exp(log v - hyper_lr * v * g), since d/d(log v) = v d/dv."""
    v, hyper_lr = 0.1, 3.0
    hyper = one_weight([Hyperparameter("lr", per, init=v, log=True)], hyper_lr=hyper_lr)
    hyper.step(None)
    (g,) = hyper.hypergradient(None).values()
    report = hyper.hyper_step(None)
    (value,) = hyper.values().values()
    close(value, torch.exp(math.log(v) - hyper_lr * v * g))
    assert abs(value.item() - v) > 1e-3
    assert report.hypergradient_norm == pytest.approx(abs(g.item()), rel=1e-12)


def decay_pushed(direction, **options):
    """A decay that starts at 0, and a validation target on the side that pushes it so."""
    target = START - 0.5 if direction == "up" else START + 0.5

    def pushing(model, batch):
        return (model.w - target).square().sum() / 2

    return one_weight([Hyperparameter("weight_decay", **options)], hyper_lr=2.0, val_loss=pushing)


@pytest.mark.parametrize("per", ["group", "tensor", "element"])
def test_a_start_at_zero_that_is_pushed_below_stays(per):
    hyper = decay_pushed("down", per=per)
    hyper.step(None)
    (g,) = hyper.hypergradient(None).values()
    assert (g > 0).all()
    report = hyper.hyper_step(None)
    assert report.clipped == {"weight_decay/group0": 1}
    (value,) = hyper.values().values()
    assert (value == 0).all()


def test_a_start_at_zero_that_is_pushed_up_moves():
    hyper = decay_pushed("up")
    hyper.step(None)
    (g,) = hyper.hypergradient(None).values()
    report = hyper.hyper_step(None)
    assert report.clipped == {}
    close(hyper.values()["weight_decay/group0"], -2.0 * g)
    assert hyper.values()["weight_decay/group0"] > 0


@pytest.mark.parametrize("bounds", [{}, {"low": -1.0, "high": 0.0}])
def test_a_value_that_stays_on_its_bound_is_not_counted(bounds):
    hyper = one_weight([Hyperparameter("weight_decay", **bounds)], hyper_lr=0.0)
    hyper.step(None)
    assert hyper.hyper_step(None).clipped == {}


def test_a_lower_bound_of_minus_infinity_is_none():
    hyper = decay_pushed("down", low=-math.inf)
    hyper.step(None)
    report = hyper.hyper_step(None)
    assert report.clipped == {}
    assert hyper.values()["weight_decay/group0"] < 0


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize(("hyper_lr", "bound"), [(1e3, 0.2), (-1e3, 0.05)])
def test_values_stop_at_their_bounds(log, hyper_lr, bound):
    model = Weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    maximize = partial(torch.optim.SGD, lr=abs(hyper_lr), maximize=hyper_lr < 0)
    away = lambda model, batch: -val_loss(model, batch)  # noqa: E731  (so that a larger lr is better)
    tune = [Hyperparameter("lr", low=0.05, high=0.2, log=log)]
    hyper = HyperOptimizer(model, optimizer, train_loss, tune, Unrolled(), maximize, val_loss=away)
    for _ in range(2):
        hyper.step(None)
        assert hyper.hyper_step(None).clipped == {"lr/group0": 1}
        close(hyper.values()["lr/group0"], bound)


def test_the_clipped_values_are_counted():
    """Decays at 0 of three weights, of which two are pushed below."""

    class Weights(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(DOUBLE([1.0, -1.0, 1.0]))

    model = Weights()
    hyper = HyperOptimizer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, batch: model.w.sum() * 0.0,
        [Hyperparameter("weight_decay", "element")],
        Unrolled(),
        partial(torch.optim.SGD, lr=1.0),
        val_loss=lambda model, batch: -model.w @ DOUBLE([1.0, 1.0, 1.0]),
    )
    hyper.step(None)
    # w1 = w0 (1 - lr wd), so d(-sum w1)/d(wd) = lr w0: positive for the first and the third.
    report = hyper.hyper_step(None)
    assert report.clipped == {"weight_decay/group0": 2}
    close(hyper.values()["weight_decay/w"], [0.0, 0.1, 0.0])


# ---- schedules ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [Unrolled(), Unrolled(max_snapshots=1), ForwardMode()], ids=str)
def test_a_schedule_by_hand(method):
    """w1 = w0 - l0 g(w0), w2 = w1 - l1 g(w1); the third rate is not used yet."""
    rates = DOUBLE([0.1, 0.2, 0.4])
    hyper = one_weight([Hyperparameter("lr", per="step", num_steps=3, init=rates)], method=method)
    losses = [hyper.step(None) for _ in range(2)]
    w1 = START - 0.1 * gradient(START)
    w2 = w1 - 0.2 * gradient(w1)
    close(losses[1], CURVATURE * (w1 - OPTIMUM) ** 2 / 2)
    close(hyper.model.w.detach(), [w2])
    by_last = -(w2 - TARGET) * gradient(w1)
    by_first = -(w2 - TARGET) * (1 - 0.2 * CURVATURE) * gradient(START)
    close(hyper.hypergradient(None)["lr/group0"], [by_first, by_last, 0.0])


def test_a_schedule_runs_on_over_hyper_steps_until_restart():
    rates = DOUBLE([0.1, 0.2, 0.4])
    hyper = one_weight([Hyperparameter("lr", per="step", num_steps=3, init=rates)])
    w = START
    for rate in rates.tolist():
        hyper.step(None)
        hypergradient = hyper.hypergradient(None)["lr/group0"]
        assert (hypergradient != 0).tolist() == (rates == rate).tolist()
        hyper.hyper_step(None)
        w = w - rate * gradient(w)
        close(hyper.model.w.detach(), [w])
    hyper.restart()
    hyper.step(None)
    close(hyper.model.w.detach(), [START - 0.1 * gradient(START)])


# ---- settings, modules and tensors together -------------------------------------------------------------------------


def test_settings_modules_and_tensors_in_one():
    torch.manual_seed(1)
    weighting, noise, temperature = nn.Linear(1, 2).double(), DOUBLE([0.1, 0.2]), DOUBLE(0.3)
    noise.requires_grad_()
    temperature.requires_grad_()
    rates = nn.ParameterDict({"a": nn.Parameter(DOUBLE(1.5)), "frozen": nn.Parameter(DOUBLE(1.0), requires_grad=False)})

    def loss(model, batch):
        weights = weighting(batch).sigmoid().sum()
        inner = weights * (model.w - OPTIMUM).square() + noise.sum() * model.w + temperature.exp() * model.w * rates["a"]
        return inner.sum()

    tune = [noise, weighting, Hyperparameter("lr"), ("temperature", temperature), ("rates", rates)]
    hyper = one_weight(tune, hyper_lr=0.5, train_loss=loss)
    names = ["lr/group0", "tensor0", "Linear.weight", "Linear.bias", "temperature", "rates.a"]
    assert list(hyper.values()) == names
    before = hyper.values()
    x = DOUBLE([0.7])
    hyper.step(x)
    found = hyper.hypergradient(x)
    assert list(found) == names
    assert shapes(found) == shapes(before)

    # One step by plain autograd.
    w = DOUBLE([START], requires_grad=True)
    lr = DOUBLE(0.1, requires_grad=True)
    point = Weight()
    del point.w
    point.w = w
    (g,) = torch.autograd.grad(loss(point, x), w, create_graph=True)
    point.w = w - lr * g
    leaves = [lr, noise, *weighting.parameters(), temperature, rates["a"]]
    for name, expected in zip(names, torch.autograd.grad(val_loss(point, x), leaves)):
        close(found[name], expected)

    hyper.hyper_step(x)
    for name, value in hyper.values().items():
        close(value, before[name] - 0.5 * found[name])
    close(noise.detach(), hyper.values()["tensor0"])  # the user's own tensors are moved
    close(rates["a"].detach(), hyper.values()["rates.a"])
    assert rates["frozen"] == 1.0


def test_a_single_entry_needs_no_list():
    assert list(one_weight(Hyperparameter("lr")).values()) == ["lr/group0"]


# ---- schedulers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["group", "tensor", "element"])
@pytest.mark.parametrize("method", [Unrolled(), Unrolled(max_snapshots=1), ForwardMode()], ids=str)
@pytest.mark.parametrize("wrap_first", [True, False])
def test_the_factor_of_a_scheduler_multiplies_the_tuned_value(per, method, wrap_first):
    """Rates v, v/2: w1 = w0 - v g(w0), w2 = w1 - v/2 g(w1). The value itself stays."""
    v = 0.2
    model = Weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    make = partial(HyperOptimizer, model, optimizer, train_loss, [Hyperparameter("lr", per, init=v)], method, FROZEN)
    if wrap_first:
        hyper = make(val_loss=val_loss)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 0.5**t)
    if not wrap_first:
        hyper = make(val_loss=val_loss)
    for _ in range(2):
        hyper.step(None)
        scheduler.step()
    w1 = START - v * gradient(START)
    w2 = w1 - v / 2 * gradient(w1)
    close(model.w.detach(), [w2])
    (value,) = hyper.values().values()
    close(value, filled(value.shape, v))
    by_rate1, by_rate2 = -(w2 - TARGET) * (1 - v / 2 * CURVATURE) * gradient(START), -(w2 - TARGET) * gradient(w1)
    (found,) = hyper.hypergradient(None).values()
    close(found, filled(found.shape, by_rate1 + by_rate2 / 2))


def set_lr(optimizer, lr):
    optimizer.param_groups[0]["lr"] = lr


def load_lr(optimizer, lr):
    """torch puts new groups in the place of the old ones."""
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = lr
    optimizer.load_state_dict(saved)


@pytest.mark.parametrize("change", [set_lr, load_lr])
def test_an_untuned_setting_is_read_at_each_step(change):
    hyper = one_weight([Hyperparameter("weight_decay")])
    hyper.step(None)
    change(hyper.optimizer, 0.3)
    hyper.step(None)
    w1 = START - 0.1 * gradient(START)
    w2 = w1 - 0.3 * gradient(w1)
    close(hyper.model.w.detach(), [w2])
    by_decay = (w2 - TARGET) * (-0.3 * w1 - (1 - 0.3 * CURVATURE) * 0.1 * START)
    close(hyper.hypergradient(None)["weight_decay/group0"], by_decay)


# ---- setting and keeping values -------------------------------------------------------------------------------------


@pytest.mark.parametrize("log", [False, True])
def test_set_values(log):
    hyper = grouped([tuned("lr", "group", log=log), tuned("weight_decay", "element", log=log)])
    before = hyper.values()
    hyper.set_values({"lr/group1": DOUBLE(0.7), "weight_decay/0.bias": torch.tensor([1.0, 2.0, 3.0])})
    expected = {**before, "lr/group1": DOUBLE(0.7), "weight_decay/0.bias": DOUBLE([1.0, 2.0, 3.0])}
    for name, value in hyper.values().items():
        close(value, expected[name])


def test_training_uses_the_values_that_were_set():
    hyper = one_weight([Hyperparameter("lr")])
    hyper.set_values({"lr/group0": 0.25})
    hyper.step(None)
    close(hyper.model.w.detach(), [START - 0.25 * gradient(START)])


def test_set_values_of_a_tensor_moves_the_users_tensor():
    shift = DOUBLE([0.0], requires_grad=True)
    hyper = one_weight([("shift", shift)], train_loss=lambda model, batch: (model.w - shift).square().sum())
    hyper.set_values({"shift": DOUBLE([2.0])})
    assert shift.item() == 2.0
    hyper.step(None)
    close(hyper.model.w.detach(), [START - 0.1 * 2 * (START - 2.0)])


@pytest.mark.parametrize("per", NAMES)
@pytest.mark.parametrize("log", [False, True])
def test_values_change_in_hyper_steps_alone(per, log):
    hyper = grouped([tuned("lr", per, log=log)], hyper_optimizer=partial(torch.optim.Adam, lr=1e-3))

    def now():
        return [value.tolist() for value in hyper.values().values()]

    for _ in range(2):
        start = now()
        hyper.step(batch(0))
        assert now() == start
        hyper.hypergradient(batch(9))
        assert now() == start
        hyper.validation_loss(batch(9))
        hyper.step(batch(1))
        assert now() == start
        hyper.hyper_step(batch(9))
        assert now() != start
        start = now()
        hyper.restart()
        assert now() == start


# ---- vectors --------------------------------------------------------------------------------------------------------

SHAPES = st.lists(st.lists(st.integers(0, 3), max_size=3).map(torch.Size), min_size=1, max_size=5)


def normal(generator, *shape):
    return torch.randn(shape, dtype=torch.float64, generator=generator)


@st.composite
def layouts(draw):
    """A layout, some of its positions in order, and a source of numbers."""
    layout = Layout(draw(SHAPES))
    some = draw(st.lists(st.integers(0, len(layout.sizes) - 1), min_size=1, unique=True).map(sorted))
    return layout, tuple(some), torch.Generator().manual_seed(draw(st.integers(0, 2**32)))


@quickly
@given(layouts())
def test_split_is_the_inverse_of_flatten(drawn):
    layout, _, generator = drawn
    tensors = [normal(generator, *shape) for shape in layout.shapes]
    vector = layout.flatten(tensors)
    assert vector.shape == (layout.numel,) == (sum(t.numel() for t in tensors),)
    split = layout.split(vector)
    assert [piece.shape for piece in split] == list(layout.shapes)
    assert all(torch.equal(piece, tensor) for piece, tensor in zip(split, tensors))
    assert torch.equal(layout.flatten(split), vector)


@quickly
@given(layouts())
def test_split_gives_views(drawn):
    layout, _, generator = drawn
    vector = normal(generator, layout.numel)
    for piece in layout.split(vector):
        piece.zero_()
    assert not vector.any()


@quickly
@given(layouts())
def test_take_gives_the_parts(drawn):
    layout, some, generator = drawn
    tensors = [normal(generator, *shape) for shape in layout.shapes]
    expected = torch.cat([tensors[i].reshape(-1) for i in some])
    assert torch.equal(layout.take(layout.flatten(tensors), some), expected)


@quickly
@given(layouts())
def test_add_at_is_the_transpose_of_take(drawn):
    layout, some, generator = drawn
    vector, total = normal(generator, layout.numel), normal(generator, layout.numel)
    part = normal(generator, layout.take(vector, some).numel())
    after = total.clone()
    layout.add_at(after, some, part)
    close(vector @ (after - total), layout.take(vector, some) @ part)


# ---- values laid out for the rules ----------------------------------------------------------------------------------

GRANULARITIES = {"group": PerGroup(), "tensor": PerTensor(), "element": PerElement(), "step": PerStep()}
NUM_STEPS = 4


@st.composite
def buckets_of_a_group(draw):
    """A group's layout and buckets, each some of its parameters (flat) or one of them in its own shape."""
    layout, some, generator = draw(layouts())
    flat = draw(st.booleans())
    chosen = [some] if flat else [(i,) for i in some]
    double, cpu = torch.float64, torch.device("cpu")
    buckets = [Bucket(0, part, part, Layout([layout.shapes[i] for i in part]), flat, double, cpu) for part in chosen]
    return layout, buckets, generator


@pytest.mark.parametrize("per", GRANULARITIES)
@quickly
@given(drawn=buckets_of_a_group(), step=st.integers(0, NUM_STEPS - 1), scale=st.floats(-3, 3))
def test_laying_out_is_linear(per, drawn, step, scale):
    layout, buckets, generator = drawn
    granularity = GRANULARITIES[per]
    u, v = (normal(generator, *granularity.count(layout, NUM_STEPS)) for _ in range(2))
    for bucket in buckets:

        def lay_out(values, bucket=bucket):
            return granularity.lay_out(values, layout, bucket, step)

        assert lay_out(u).shape in ((), bucket.shape)
        close(lay_out(u + scale * v), lay_out(u) + scale * lay_out(v))
        assert not lay_out(torch.zeros_like(u)).any()


@pytest.mark.parametrize("per", GRANULARITIES)
@quickly
@given(drawn=buckets_of_a_group(), step=st.integers(0, NUM_STEPS - 1))
def test_adding_adjoints_is_the_transpose_of_laying_out(per, drawn, step):
    """<lay_out(v), w> = <v, reduce(add_adjoint(w))>, summed over the buckets of a step."""
    layout, buckets, generator = drawn
    granularity = GRANULARITIES[per]
    v = normal(generator, *granularity.count(layout, NUM_STEPS))
    total = granularity.zero_adjoint(v, layout)
    expected = DOUBLE(0.0)
    for bucket in buckets:
        laid_out = granularity.lay_out(v, layout, bucket, step)
        w = normal(generator, *laid_out.shape)
        granularity.add_adjoint(total, w, layout, bucket, step)
        expected = expected + (laid_out * w).sum()
    reduced = granularity.reduce(total, layout)
    assert reduced.shape == v.shape
    close((v * reduced).sum(), expected)


@pytest.mark.parametrize("per", GRANULARITIES)
def test_a_bucket_gets_the_values_of_its_own_parameters(per):
    """Parameters 0 and 2 of a group of three, of 2, 3 and 1 entries, at step 1."""
    layout = Layout([torch.Size([2]), torch.Size([3]), torch.Size([1])])
    own = Layout([torch.Size([2]), torch.Size([1])])
    bucket = Bucket(0, (4, 6), (0, 2), own, True, torch.float64, torch.device("cpu"))
    expected = {"group": 7.0, "tensor": [1.0, 1.0, 3.0], "element": [1.0, 2.0, 6.0], "step": 2.0}
    values = {"group": DOUBLE(7.0), "tensor": DOUBLE([1, 2, 3]), "element": DOUBLE(range(1, 7)), "step": DOUBLE([1, 2])}
    assert GRANULARITIES[per].lay_out(values[per], layout, bucket, 1).tolist() == expected[per]


# ---- going back with few snapshots ----------------------------------------------------------------------------------


@cache
def fewest_replays(num_states, num_free):
    """By dynamic programming: the fewest steps taken again to visit ``num_states`` states, last first, from the first
    one and with room for ``num_free`` more. The next one to set aside is tried at every distance."""
    if num_states == 1:
        return 0
    if num_free == 0:
        return num_states * (num_states - 1) // 2
    return min(
        ahead + fewest_replays(num_states - ahead, num_free - 1) + fewest_replays(ahead, num_free)
        for ahead in range(1, num_states)
    )


def go_back(num_states, num_free):
    """The replays and the most places used on the way back through ``num_states`` states by ``next_snapshot``."""
    replays, most = 0, 0
    aside = [0]  # the known state takes no place
    for t in reversed(range(num_states)):
        aside = [at for at in aside if at <= t]
        at = aside[-1]
        while at < t:
            ahead = next_snapshot(t - at + 1, num_free - (len(aside) - 1))
            assert 1 <= ahead <= t - at
            replays += ahead
            at += ahead
            if at < t:
                aside.append(at)
            most = max(most, len(aside) - 1)
    return replays, most


@quickly
@given(st.integers(1, 40), st.integers(0, 7))
def test_no_plan_needs_fewer_replays(num_states, num_free):
    replays, most = go_back(num_states, num_free)
    assert replays == fewest_replays(num_states, num_free)
    assert most <= num_free


@quickly
@given(st.integers(2, 3000), st.integers(1, 30))
def test_replays_are_binomial(num_states, num_free):
    """Griewank and Walther 2000: with s = c + 1 snapshots, and r so that C(s + r - 1, r - 1) < n <= C(s + r, r), it
    takes r n - C(s + r, r - 1) steps."""
    s = num_free + 1
    r = next(r for r in range(num_states) if math.comb(s + r, r) >= num_states)
    replays, most = go_back(num_states, num_free)
    assert replays == r * num_states - math.comb(s + r, r - 1)
    assert most <= num_free


class Counted:
    """A state that knows how many of its kind are alive."""

    alive: ClassVar = weakref.WeakSet()

    def __init__(self, t):
        self.t = t
        Counted.alive.add(self)


class FakeTraining:
    """Takes steps on counted states, and counts them."""

    num_replays = 0

    def replay(self, step, state):
        assert step == state.t, "a step is taken again from the state before it"
        self.num_replays += 1
        return Counted(state.t + 1)


@quickly
@given(
    num_steps=st.integers(1, 120),
    max_snapshots=st.one_of(st.none(), st.integers(1, 9)),
    truncation=st.one_of(st.none(), st.integers(1, 40)),
)
def test_a_trajectory_goes_back_within_its_budget(num_steps, max_snapshots, truncation):
    if truncation is not None and max_snapshots == 1:
        max_snapshots = 2
    training = FakeTraining()
    trajectory = Trajectory(training, truncation, max_snapshots, None)
    budget = num_steps if max_snapshots is None else max_snapshots
    for t in range(num_steps):
        trajectory.record(t, Counted(t))
        assert len(Counted.alive) <= budget
    first = 0 if truncation is None else max(0, num_steps - truncation)
    assert list(trajectory.steps()) == list(range(first, num_steps))
    visited = []
    for step, state in trajectory.backward():
        assert step == state.t
        visited.append(step)
        assert len(Counted.alive) <= (budget if max_snapshots is None else 2 * max_snapshots + 3)
    assert visited == list(reversed(range(first, num_steps)))
    if max_snapshots is None:
        assert training.num_replays == 0
    trajectory.clear()
    del state
    assert not Counted.alive
