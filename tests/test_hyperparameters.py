"""Names, shapes, starts, bounds and scales of hyperparameters, schedules and LR schedulers."""

import math
from functools import partial

import pytest
import torch
from hypothesis import settings
from torch import nn

from torch_hypergrad import ForwardMode, HyperOptimizer, Hyperparameter, Implicit, Neumann, Unrolled

DOUBLE = partial(torch.tensor, dtype=torch.float64)
FROZEN = partial(torch.optim.SGD, lr=0.0)
quickly = settings(max_examples=60, deadline=None)


def close(found, expected):
    expected = torch.as_tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def filled(shape, value):
    return torch.full(shape, value, dtype=torch.float64)


# ---- names, order, shapes and starts -----------------------------------------------------------------------


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
    """Two groups: the first layer with lr 0.1, the second with lr 0.2 and other decay;
    in this order or the other."""
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
    assert shapes(hyper.hypergradient(batch(9))) == {
        f"weight_decay/{part}": s for part, s in NAMES[per].items()
    }


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


def test_a_setting_is_tuned_in_the_chosen_groups_alone():
    """The other group keeps its own value, and the hypergradient of the chosen one
    is what it is with both tuned."""
    both, first = (
        grouped([Hyperparameter("weight_decay")]),
        grouped([Hyperparameter("weight_decay", groups=[0])]),
    )
    for hyper in (both, first):
        for seed in range(3):
            hyper.step(batch(seed))
    assert list(first.values()) == ["weight_decay/group0"]
    for ours, theirs in zip(first.model.parameters(), both.model.parameters()):
        close(ours.detach(), theirs.detach())
    name = "weight_decay/group0"
    close(first.hypergradient(batch(9))[name], both.hypergradient(batch(9))[name])


def test_a_setting_may_have_an_entry_for_each_group():
    tune = [
        Hyperparameter("lr", init=0.3, groups=[1]),
        Hyperparameter("lr", per="tensor", init=0.4, groups=[0]),
    ]
    values = grouped(tune).values()
    assert [float(value) for value in values.values()] == [0.3, 0.4, 0.4]
    assert next(iter(values)) == "lr/group1"


@pytest.mark.parametrize(
    ("groups", "kind"), [([2], ValueError), ([-1], ValueError), (0, TypeError), (["0"], TypeError)]
)
def test_groups_that_are_not_there_are_refused(groups, kind):
    with pytest.raises(kind, match="groups"):
        grouped([Hyperparameter("lr", groups=groups)])


# ---- one weight, with closed forms -------------------------------------------------------------------------

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
    return HyperOptimizer(
        model, optimizer, options.pop("train_loss", train_loss), tune, method, hyper_optimizer, **options
    )


@pytest.mark.parametrize("per", ["group", "tensor", "element"])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("method", [Unrolled(), ForwardMode()], ids=str)
def test_hypergradient_is_with_respect_to_the_values(per, log, method):
    """After one step w1 = w0 - lr (g0 + wd w0)."""
    lr, decay = 0.1, 0.05
    tune = [
        Hyperparameter("lr", per, init=lr, log=log),
        Hyperparameter("weight_decay", per, init=decay, log=log),
    ]
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


# ---- schedules ---------------------------------------------------------------------------------------------


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


# ---- settings, modules and tensors together ----------------------------------------------------------------


def test_settings_modules_and_tensors_in_one():
    torch.manual_seed(1)
    weighting, noise, temperature = nn.Linear(1, 2).double(), DOUBLE([0.1, 0.2]), DOUBLE(0.3)
    noise.requires_grad_()
    temperature.requires_grad_()
    rates = nn.ParameterDict(
        {"a": nn.Parameter(DOUBLE(1.5)), "frozen": nn.Parameter(DOUBLE(1.0), requires_grad=False)}
    )

    def loss(model, batch):
        weights = weighting(batch).sigmoid().sum()
        inner = (
            weights * (model.w - OPTIMUM).square()
            + noise.sum() * model.w
            + temperature.exp() * model.w * rates["a"]
        )
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


# ---- schedulers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["group", "tensor", "element"])
@pytest.mark.parametrize("method", [Unrolled(), Unrolled(max_snapshots=1), ForwardMode()], ids=str)
@pytest.mark.parametrize("wrap_first", [True, False])
def test_the_factor_of_a_scheduler_multiplies_the_tuned_value(per, method, wrap_first):
    """Rates v, v/2: w1 = w0 - v g(w0), w2 = w1 - v/2 g(w1). The value itself stays."""
    v = 0.2
    model = Weight()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    make = partial(
        HyperOptimizer, model, optimizer, train_loss, [Hyperparameter("lr", per, init=v)], method, FROZEN
    )
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
    by_rate1, by_rate2 = (
        -(w2 - TARGET) * (1 - v / 2 * CURVATURE) * gradient(START),
        -(w2 - TARGET) * gradient(w1),
    )
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


# ---- setting and keeping values ----------------------------------------------------------------------------


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
