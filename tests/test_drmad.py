"""DrMAD: exact where training goes along a straight line, a direction elsewhere, and three states at most."""

from __future__ import annotations

import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from problems import FROZEN, mse, random_batch, tanh_mlp, wrapped
from torch_hypergrad import DrMAD, HyperOptimizer, Hyperparameter, TrajectoryError
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


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_on_a_straight_line_it_is_the_derivative(momentum):
    """The loss is linear in the weights, so that each step is the same without momentum; with it the state
    before a step is on no line, but the derivatives of the loss are the same everywhere."""

    def linear(model: nn.Module, batch: Tensor) -> Tensor:
        return (model.weight * batch).sum()

    slope, lr, num_steps = torch.tensor([[1.0, -2.0]], dtype=torch.float64), 0.1, 7
    model = nn.Linear(2, 1, bias=False).double()
    start = model.weight.detach().clone()
    rate = torch.tensor(lr, dtype=torch.float64, requires_grad=True)
    weight, buffer = start, torch.zeros_like(start)
    for _ in range(num_steps):
        buffer = momentum * buffer + slope
        weight = weight - rate * buffer
    (expected,) = torch.autograd.grad(weight.square().sum(), rate)
    hyper = HyperOptimizer(
        model,
        torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum),
        linear,
        [Hyperparameter("lr")],
        DrMAD(num_points=num_steps),
        FROZEN,
        val_loss=lambda model, batch: model.weight.square().sum(),
    )
    for _ in range(num_steps):
        hyper.step(slope)
    computed = hyper.hypergradient(slope)["lr/group0"]
    if momentum == 0:
        torch.testing.assert_close(computed, expected, rtol=1e-12, atol=0)
    else:  # the momentum is taken from the line, 0 before the first step
        assert torch.sign(computed) == torch.sign(expected)


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


def test_a_tenth_of_the_steps_is_gone_back_over():
    gradients = []

    def counted(model: nn.Module, batch) -> Tensor:
        gradients.append(batch)
        return mse(model, batch)

    hyper = wrapped(tanh_mlp(), DECAY, DrMAD(), train_loss=counted, val_loss=mse)
    for seed in range(80):
        hyper.step(random_batch(8, 4, seed))
    gradients.clear()
    hyper.hypergradient(random_batch(8, 4, 99))
    assert len(gradients) == 7, "eight points, of which the first is not differentiated twice"


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
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 10)).double()
    hyper = HyperOptimizer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        lambda model, rows: F.cross_entropy(model(x[rows]), y[rows]),
        DECAY,
        DrMAD(),
        partial(torch.optim.SGD, lr=0.0),
    )
    for step in range(50):
        hyper.step(torch.arange(20) + 20 * step % 200)
    report = hyper.hyper_step(torch.arange(200, 700))
    assert "direction" in report.warnings[0]
    assert report.adjoint_growth is not None


@pytest.mark.parametrize(
    "optimizer", [torch.optim.Adam, torch.optim.RMSprop, partial(torch.optim.SGD, momentum=0.9)]
)
def test_a_window_in_the_middle_goes_on_from_a_checkpoint(optimizer):
    def make() -> HyperOptimizer:
        return wrapped(
            tanh_mlp(), [Hyperparameter("weight_decay", init=0.1)], DrMAD(3), partial(optimizer, lr=0.01)
        )

    batches, val = [random_batch(8, 4, seed) for seed in range(6)], random_batch(8, 4, 99)
    hyper, other = make(), make()
    for batch in batches[:3]:
        hyper.step(batch)
    other.load_state_dict(hyper.state_dict())
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


def test_parameters_that_were_no_longer_updated_together_are_refused():
    def loss(model: nn.Module, batch) -> Tensor:
        used, x = batch
        return model[2](model[1](model[0](x))).square().mean() if used else model[0](x).square().mean()

    hyper = wrapped(tanh_mlp(), DECAY, DrMAD(2), train_loss=loss, val_loss=lambda m, b: m(b).square().mean())
    x, _ = random_batch(8, 4, 0)
    hyper.step((True, x))
    hyper.step((False, x))
    with pytest.raises(HypergradientError, match=r"DrMAD: parameters that were updated together .*Unrolled"):
        hyper.hypergradient(x)
