"""DrMAD: exact where training goes along a straight line, a direction elsewhere, and three states at most."""

from __future__ import annotations

import gc
import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from problems import FROZEN, mse, random_batch, tanh_mlp, wrapped
from torch_hypergrad import DrMAD, HyperOptimizer, Hyperparameter, TrajectoryError, Unrolled
from torch_hypergrad.errors import HypergradientError
from torch_hypergrad.step.state import State

DECAY = [Hyperparameter("weight_decay", per="element", init=0.01)]


def exact(model: nn.Module, decays: list[Tensor], batches, val, lr: float) -> list[Tensor]:
    """The hypergradient of plain gradient descent with a decay for each weight, by autograd."""
    names = [name for name, _ in model.named_parameters()]
    weights = [p.detach().clone().requires_grad_() for p in model.parameters()]
    for batch in batches:
        loss = mse_at(model, dict(zip(names, weights)), batch)
        grads = torch.autograd.grad(loss, weights, create_graph=True)
        weights = [w - lr * (g + d * w) for w, g, d in zip(weights, grads, decays)]
    return list(torch.autograd.grad(mse_at(model, dict(zip(names, weights)), val), decays))


def mse_at(model: nn.Module, weights: dict[str, Tensor], batch) -> Tensor:
    x, y = batch
    return (torch.func.functional_call(model, weights, (x,)) - y).square().mean()


def test_with_all_points_it_is_nearly_the_derivative_over_a_short_window():
    batches, val = [random_batch(16, 4, seed) for seed in range(20)], random_batch(16, 4, 99)
    model = tanh_mlp()
    decays = [torch.full_like(p, 0.01).requires_grad_() for p in model.parameters()]
    expected = torch.cat([g.flatten() for g in exact(model, decays, batches, val, 0.02)])
    hyper = wrapped(model, DECAY, DrMAD(num_points=20), partial(torch.optim.SGD, lr=0.02))
    for batch in batches:
        hyper.step(batch)
    computed = torch.cat([g.flatten() for g in hyper.hypergradient(val).values()])
    assert F.cosine_similarity(computed, expected, dim=0) > 0.99
    assert not torch.allclose(computed, expected, rtol=1e-6), "the path was not straight"


LINES = {
    "SGD": torch.optim.SGD,
    "a buffer that is the gradient from the first step on": partial(
        torch.optim.SGD, momentum=0.9, dampening=0.9
    ),
    "ASGD, whose rate is a number in its state": partial(torch.optim.ASGD, lambd=0.0),
}


@pytest.mark.parametrize("name", LINES)
def test_on_a_straight_line_it_is_the_derivative(name):
    """The loss is linear in the weights, so that each step is the same: by autograd through these."""

    def linear(model: nn.Module, batch: Tensor) -> Tensor:
        return (model.weight * batch).sum()

    slope, lr, num_steps = torch.tensor([[1.0, -2.0]], dtype=torch.float64), 0.125, 7
    torch.manual_seed(0)
    model = nn.Linear(2, 1, bias=False).double()
    rate = torch.tensor(lr, dtype=torch.float64, requires_grad=True)
    weight = model.weight.detach().clone()
    for _ in range(num_steps):
        weight = weight - rate * slope
    (expected,) = torch.autograd.grad(weight.square().sum(), rate)
    hyper = HyperOptimizer(
        model,
        LINES[name](model.parameters(), lr=lr),
        linear,
        [Hyperparameter("lr")],
        DrMAD(num_points=num_steps),
        FROZEN,
        val_loss=lambda model, batch: model.weight.square().sum(),
    )
    for _ in range(num_steps):
        hyper.step(slope)
    computed = hyper.hypergradient(slope)["lr/group0"]
    rtol = 1e-6 if name.startswith("ASGD") else 1e-12  # torch keeps that rate in float32
    torch.testing.assert_close(computed, expected, rtol=rtol, atol=0)


@pytest.mark.parametrize(
    ("optimizer", "setting", "least"),
    [
        (partial(torch.optim.SGD, lr=0.002, momentum=0.9), "lr", 0.95),
        (partial(torch.optim.Adam, lr=0.003), "lr", 0.95),
        (partial(torch.optim.NAdam, lr=0.003), "weight_decay", 0.99),
        (partial(torch.optim.RAdam, lr=0.003), "weight_decay", 0.99),
        (partial(torch.optim.Rprop, lr=0.001), "lr", 0.95),
        (partial(torch.optim.ASGD, lr=0.01), "weight_decay", 0.999),
    ],
)
def test_the_optimizers_state_has_a_usable_start(optimizer, setting, least):
    """Lines of momenta, squares and step sizes begin at the state after the first step, not at 0, and counts
    and products of momenta are those of the step: beside the sweep over all states, itself checked
    elsewhere."""
    vectors = []
    for method in (Unrolled(), DrMAD(20)):
        tune = [Hyperparameter(setting, per="element", init={"weight_decay": 0.01}.get(setting))]
        hyper = wrapped(tanh_mlp(), tune, method, optimizer)
        for seed in range(20):
            hyper.step(random_batch(16, 4, seed))
        vectors.append(flat(hyper.hypergradient(random_batch(16, 4, 99))))
    assert F.cosine_similarity(*vectors, dim=0) > least


def flat(hypergradient: dict[str, Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in hypergradient.values()])


def quadratic(num_points: int | None, num_steps: int) -> tuple[float, list[float]]:
    """Gradient descent on w^2 / 2 with lr 0.5 from 1, validation w: what DrMAD gives, and the states."""
    model = nn.Linear(1, 1, bias=False).double()
    nn.init.ones_(model.weight)
    hyper = HyperOptimizer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.5, weight_decay=0.0),
        lambda model, batch: model.weight.square().sum() / 2,
        [Hyperparameter("weight_decay")],
        DrMAD(num_points),
        FROZEN,
        val_loss=lambda model, batch: model.weight.sum(),
    )
    states = [1.0]
    for _ in range(num_steps):
        hyper.step(None)
        states.append(model.weight.item())
    return hyper.hypergradient(None)["weight_decay/group0"].item(), states


@pytest.mark.parametrize(
    ("num_points", "visited"), [(4, [3, 2, 1, 0]), (2, [3, 1]), (1, [3]), (9, [3, 2, 1, 0])]
)
def test_it_is_its_formula(num_points, visited):
    computed, states = quadratic(num_points, 4)
    adjoint, expected = 1.0, 0.0
    for t in visited:  # each stands for 4 / len(visited) steps
        on_line = states[0] + (states[4] - states[0]) * t / 4
        expected += 4 / len(visited) * adjoint * -0.5 * on_line  # d(w - lr (w + wd w)) / d(wd)
        adjoint *= 1 - 0.5
    assert computed == pytest.approx(expected, rel=1e-12)


def test_the_sweep_takes_at_most_an_eighth_of_the_losses():
    counts = []
    for method in (DrMAD(), Unrolled(memory=0)):
        losses: list[object] = []

        def counted(model: nn.Module, batch, losses=losses) -> Tensor:
            losses.append(batch)
            return mse(model, batch)

        hyper = wrapped(tanh_mlp(), DECAY, method, train_loss=counted, val_loss=mse)
        for seed in range(80):
            hyper.step(random_batch(8, 4, seed))
        losses.clear()
        hyper.hypergradient(random_batch(8, 4, 99))
        counts.append(len(losses))
    assert counts[0] == 8, "eight points, the first of them not differentiated twice, and one to compare"
    assert counts[0] <= counts[1] / 8


def test_at_most_three_states_are_held():
    def num_states() -> int:
        gc.collect()
        vectors = {
            part.param.data_ptr(): part
            for found in gc.get_objects()
            if type(found) is State
            for part in found.parts
        }
        return sum(part.param.numel() == numel for part in vectors.values())

    model = nn.Linear(31, 37).double()
    numel = sum(p.numel() for p in model.parameters())
    tune = [Hyperparameter("weight_decay", init=0.1)]
    hyper = wrapped(model, tune, DrMAD(), partial(torch.optim.SGD, lr=0.01), train_loss=seen(mse, num_states))
    for seed in range(30):
        hyper.step(random_batch(8, 31, seed, outputs=37))
    hyper._origin = hyper._problem.live.state()  # where restart goes back to: not the method's
    held = [num_states()]
    hyper.model.on_loss = lambda: held.append(num_states())
    hyper.hypergradient(random_batch(8, 31, 99, outputs=37))
    assert max(held) <= 3 + 1, "and the adjoint"
    assert len(held) >= 3


def seen(loss, count):
    def called(model: nn.Module, batch) -> Tensor:
        getattr(model, "on_loss", int)()
        return loss(model, batch)

    return called


def test_it_is_a_direction_on_digits_and_says_so():
    x, y = (torch.as_tensor(part) for part in load_digits(return_X_y=True))
    x = x.double() / 16
    vectors, report = [], None
    for method in (Unrolled(), DrMAD()):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
        hyper = HyperOptimizer(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            lambda model, rows: F.cross_entropy(model(x[rows]), y[rows]),
            DECAY,
            method,
            partial(torch.optim.SGD, lr=0.0),
        )
        for _ in range(300):
            hyper.step(torch.randint(200, (50,)))
        vectors.append(flat(hyper.hypergradient(torch.arange(200, 700))))
        report = hyper.hyper_step(torch.arange(200, 700))
    assert F.cosine_similarity(*vectors, dim=0) > 0.8
    assert (vectors[0].sign() == vectors[1].sign()).double().mean() > 0.7
    assert "direction" in report.warnings[0]
    assert report.adjoint_growth is not None


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batches_seen_are_counted_as_they_were(momentum):
    """With steps so small that the line is where training was, BatchNorm's statistics have the derivative
    that the sweep over all states gives them, also as means over all batches so far."""
    vectors = []
    for method in (Unrolled(), DrMAD(20)):
        torch.manual_seed(0)
        layers = nn.Linear(4, 5), nn.BatchNorm1d(5, momentum=momentum), nn.Tanh(), nn.Linear(5, 1)
        model = nn.Sequential(*layers).double()
        hyper = wrapped(model, DECAY, method, partial(torch.optim.SGD, lr=1e-4))
        for seed in range(20):
            hyper.step(random_batch(16, 4, seed))
        model.eval()
        vectors.append(flat(hyper.hypergradient(random_batch(16, 4, 99))))
    torch.testing.assert_close(vectors[1], vectors[0], rtol=1e-3, atol=1e-3 * vectors[0].abs().max().item())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_frozen_parameters_and_those_that_some_steps_leave_out(momentum):
    def loss(model: nn.Module, batch) -> Tensor:
        uses_all, (x, y) = batch
        hidden = model[1](model[0](x))
        return ((model[2](hidden) if uses_all else hidden.mean(1, keepdim=True)) - y).square().mean()

    vectors = []
    for method in (Unrolled(), DrMAD(8)):
        model = tanh_mlp()
        model[0].bias.requires_grad_(False)
        optimizer = partial(torch.optim.SGD, lr=1e-4, momentum=momentum)
        hyper = wrapped(model, DECAY, method, optimizer, train_loss=loss, val_loss=mse)
        for seed, uses_all in enumerate([True, True, False, True, True, True, False, True]):
            hyper.step((uses_all, random_batch(16, 4, seed)))
        vectors.append(flat(hyper.hypergradient(random_batch(16, 4, 99))))
    assert F.cosine_similarity(*vectors, dim=0) > 1 - 1e-6
    assert vectors[1].norm().item() == pytest.approx(vectors[0].norm().item(), rel=1e-3)


@pytest.mark.parametrize(
    "optimizer", [torch.optim.Adam, torch.optim.NAdam, partial(torch.optim.SGD, momentum=0.9)]
)
def test_a_window_in_the_middle_goes_on_from_a_checkpoint(optimizer):
    def make() -> HyperOptimizer:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, momentum=None), nn.Linear(5, 1)).double()
        model[0].bias.requires_grad_(False)
        decay = [Hyperparameter("weight_decay", init=0.1)]
        return wrapped(model, decay, DrMAD(3), partial(optimizer, lr=0.01))

    batches, val = [random_batch(8, 4, seed) for seed in range(6)], random_batch(8, 4, 99)
    hyper, other = make(), make()
    for batch in batches[:3]:
        hyper.step(batch)
    saved = io.BytesIO()
    torch.save(hyper.state_dict(), saved)
    saved.seek(0)
    other.load_state_dict(torch.load(saved, weights_only=True))
    for batch in batches[3:]:
        hyper.step(batch)
        other.step(batch)
    found = [run.hypergradient(val)["weight_decay/group0"] for run in (hyper, other)]
    assert torch.equal(*found)
    assert found[0].isfinite()
    assert found[0] != 0


def test_steps_are_forgotten_with_their_window():
    hyper = wrapped(tanh_mlp(), DECAY, DrMAD())
    batch = random_batch(8, 4, 0)
    hyper.step(batch)
    hyper.hyper_step(batch)
    with pytest.raises(TrajectoryError, match="no training steps to differentiate"):
        hyper.hyper_step(batch)


def test_what_it_cannot_do_is_refused():
    with pytest.raises(TypeError, match=r"num_points must be an int or None, got 0\.1"):
        DrMAD(0.1)
    with pytest.raises(ValueError, match="num_points must be at least 1, got 0"):
        DrMAD(0)
    schedule = [Hyperparameter("lr", per="step", num_steps=3, init=0.1)]
    with pytest.raises(ValueError, match=r"per='step'\) cannot be tuned with DrMAD.*Unrolled"):
        wrapped(tanh_mlp(), schedule, DrMAD())
    with pytest.raises(TypeError, match="DrMAD differentiates the training steps themselves"):
        wrapped(tanh_mlp(), DECAY, DrMAD()).record(random_batch(8, 4, 0))


def test_state_that_began_later_is_refused():
    def loss(model: nn.Module, batch) -> Tensor:
        uses_all, x = batch
        return (model(x) if uses_all else model[0](x)).square().mean()

    hyper = wrapped(
        tanh_mlp(), DECAY, DrMAD(2), torch.optim.Adam, train_loss=loss, val_loss=lambda m, b: m(b).sum()
    )
    x, _ = random_batch(8, 4, 0)
    for uses_all in (False, True, True):
        hyper.step((uses_all, x))
    with pytest.raises(HypergradientError, match=r"'exp_avg' of the .* began after the first step.*Unrolled"):
        hyper.hypergradient(x)


def test_a_number_that_has_a_value_for_each_weight_is_refused_at_the_first_step():
    hyper = wrapped(
        tanh_mlp(),
        [Hyperparameter("momentum_decay", per="element")],
        DrMAD(),
        partial(torch.optim.NAdam, lr=0.01),
    )
    before = hyper.state_dict()["model"]["0.weight"].clone()
    with pytest.raises(HypergradientError, match=r"DrMAD.*'mu_product'.* for each weight.*Unrolled"):
        hyper.step(random_batch(8, 4, 0))
    assert torch.equal(hyper.model[0].weight, before), "nothing has changed"


def test_a_loss_that_takes_another_branch_on_the_line_is_refused():
    known = []

    def loss(model: nn.Module, batch) -> Tensor:
        x, y = batch
        norm = model[0].weight.norm().item()
        if len(known) < 6:
            known.append(norm)
        hidden = model[1](model[0](x))
        return ((model[2](hidden) if norm in known else hidden.mean(1, keepdim=True)) - y).square().mean()

    for setting in ("weight_decay", "lr"):
        known.clear()
        hyper = wrapped(tanh_mlp(), [Hyperparameter(setting)], DrMAD(3), train_loss=loss, val_loss=mse)
        for seed in range(6):
            hyper.step(random_batch(8, 4, seed))
        with pytest.raises(HypergradientError, match=r"step 6 depended on '2.weight'.*branch.*Unrolled"):
            hyper.hypergradient(random_batch(8, 4, 99))


def test_what_changes_behind_its_back_is_refused():
    """Losses on the line are others than in training; the first one is not."""
    numbers = iter(range(1, 100))
    hyper = wrapped(
        tanh_mlp(), DECAY, DrMAD(), train_loss=lambda m, b: mse(m, b) * next(numbers), val_loss=mse
    )
    batches = [random_batch(8, 4, seed) for seed in range(20)]
    for batch in batches:
        hyper.step(batch)
    with pytest.raises(TrajectoryError, match="training loss of training step 1 was"):
        hyper.hypergradient(batches[0])
    hyper = wrapped(tanh_mlp(), DECAY, DrMAD())
    for batch in batches:
        hyper.step(batch)
    batches[-1][0].zero_()
    with pytest.raises(TrajectoryError, match="batch of training step 20 was changed"):
        hyper.hypergradient(batches[0])
