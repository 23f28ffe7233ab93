"""The same on a GPU: plain torch's trajectory, the CPU's hypergradient,
replays of device random numbers, offload."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from problems import FROZEN, Ridge, mse, random_batch
from torch_hypergrad import (
    CG,
    Cholesky,
    ForwardMode,
    HyperOptimizer,
    Hyperparameter,
    Identity,
    Implicit,
    Neumann,
    NonFiniteError,
    Unrolled,
)
from torch_hypergrad.methods import Method
from torch_hypergrad.testing import check_hypergradient

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

BATCHES = [random_batch(8, 4, seed) for seed in range(6)]
VAL = random_batch(8, 4, seed=100)
OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.01),
    "adamw": partial(torch.optim.AdamW, lr=0.02, eps=1e-3),
    "nadam": partial(torch.optim.NAdam, lr=0.02, eps=1e-3),
    "asgd": partial(torch.optim.ASGD, lr=0.1),
    "rprop": partial(torch.optim.Rprop, lr=0.01),
}


def to(device: str, batch: Any) -> Any:
    return tuple(part.to(device) for part in batch)


def network(device: str, dropout: float = 0.0) -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(dropout), nn.Linear(6, 1)
    return nn.Sequential(*layers).double().to(device)


def trained(
    device: str, optimizer: str, method: Method, dropout: float = 0.0, name: str = "weight_decay"
) -> HyperOptimizer:
    model = network(device, dropout)
    made = OPTIMIZERS[optimizer](model.parameters())
    hyper = HyperOptimizer(model, made, mse, [Hyperparameter(name, per="tensor")], method, FROZEN)  # type: ignore[arg-type]
    torch.manual_seed(1)
    for batch in BATCHES:
        hyper.step(to(device, batch))
    return hyper


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_is_that_of_plain_torch(optimizer: str) -> None:
    hyper = trained("cuda", optimizer, Unrolled(), name="lr")
    plain = network("cuda")
    made = OPTIMIZERS[optimizer](plain.parameters())
    for batch in BATCHES:
        made.zero_grad()
        mse(plain, to("cuda", batch)).backward()
        made.step()
    for ours, theirs in zip(hyper.model.parameters(), plain.parameters()):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("method", [Unrolled(), ForwardMode()], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_hypergradient_is_that_of_the_cpu(optimizer: str, method: Method) -> None:
    found = trained("cuda", optimizer, method, name="lr").hypergradient(to("cuda", VAL))
    expected = trained("cpu", optimizer, method, name="lr").hypergradient(VAL)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-7, atol=1e-10)


@pytest.mark.parametrize(
    "solver", [Neumann(20, scale=0.2, damping=1.0), CG(damping=5.0), Cholesky(damping=5.0)], ids=str
)
def test_implicit_hypergradient_is_that_of_the_cpu(solver: Any) -> None:
    found = trained("cuda", "sgd", Implicit(solver)).hypergradient(to("cuda", VAL))
    expected = trained("cpu", "sgd", Implicit(solver)).hypergradient(VAL)
    for name, value in expected.items():
        torch.testing.assert_close(found[name].cpu(), value, rtol=1e-5, atol=1e-9)


def test_dropout_is_replayed() -> None:
    def make() -> HyperOptimizer:
        model = network("cuda", dropout=0.5)
        made = OPTIMIZERS["sgd"](model.parameters())
        return HyperOptimizer(model, made, mse, [Hyperparameter("lr")], Unrolled(), FROZEN)

    check_hypergradient(make, [to("cuda", batch) for batch in BATCHES], to("cuda", VAL))


@pytest.mark.parametrize(
    "method", [Unrolled(max_snapshots=2), Unrolled(offload="cpu"), Unrolled(max_snapshots=3, offload="cpu")]
)
def test_snapshots_and_offload_give_the_same_bits(method: Unrolled) -> None:
    found = trained("cuda", "adamw", method, dropout=0.5).hypergradient(to("cuda", VAL))
    expected = trained("cuda", "adamw", Unrolled(), dropout=0.5).hypergradient(to("cuda", VAL))
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_a_lstm_and_attention_can_be_differentiated_twice() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lstm = nn.LSTM(1, 8, batch_first=True)
            self.layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
            self.head = nn.Linear(8, 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.layer(self.lstm(x[..., None])[0]).mean(1))

    torch.manual_seed(0)
    model = Both().cuda()
    made = torch.optim.SGD(model.parameters(), lr=0.1)
    hyper = HyperOptimizer(model, made, mse, [Hyperparameter("lr")], Unrolled(), FROZEN)
    for x, y in BATCHES:
        hyper.step((x.float().cuda(), y.float().cuda()))
    x, y = VAL
    assert hyper.hypergradient((x.float().cuda(), y.float().cuda()))["lr/group0"].isfinite()


def test_writes_through_data_are_found_at_the_hyper_step() -> None:
    from torch_hypergrad import TrajectoryError

    hyper = trained("cuda", "sgd", Unrolled())
    hyper.model[0].weight.data.add_(0.1)
    hyper.step(to("cuda", BATCHES[0]))
    with pytest.raises(TrajectoryError, match="wrote to a parameter before training step 7"):
        hyper.hyper_step(to("cuda", VAL))


def test_a_run_is_resumed_on_the_device() -> None:
    hyper = trained("cuda", "adamw", Unrolled(), dropout=0.5)
    saved = copy.deepcopy(hyper.state_dict())
    other = trained("cuda", "adamw", Unrolled(), dropout=0.5)
    other.load_state_dict(saved)
    for run in (hyper, other):
        torch.cuda.manual_seed(5)
        run.step(to("cuda", BATCHES[0]))
    expected = hyper.hypergradient(to("cuda", VAL))
    for name, value in other.hypergradient(to("cuda", VAL)).items():
        assert torch.equal(value, expected[name])


# ---- waiting for the device --------------------------------------------------------------------------------


def waits_of(call: Callable[[], Any]) -> list[str]:
    """The synchronizations that torch knows of."""
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            call()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return [str(warning.message) for warning in caught if "synchronizing CUDA" in str(warning.message)]


WAITING_ONCE = [
    Unrolled(),
    Unrolled(max_snapshots=2),
    Unrolled(offload="cpu"),
    Unrolled(max_graphs=2),
    Unrolled(second_order="finite_difference"),
    Implicit(Neumann(5, scale=0.1, damping=5.0)),
    Implicit(Neumann(20, damping=5.0)),
]


@pytest.mark.parametrize("method", WAITING_ONCE, ids=str)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "nadam"])
def test_a_step_never_waits_and_a_hyper_step_waits_once(optimizer: str, method: Method) -> None:
    hyper = trained("cuda", optimizer, method, dropout=0.5)
    hyper.hyper_step(to("cuda", VAL))
    batches, val = [to("cuda", batch) for batch in BATCHES], to("cuda", VAL)
    for batch in batches:
        assert waits_of(partial(hyper.step, batch)) == []
    assert len(waits_of(partial(hyper.hyper_step, val))) <= 1


def test_what_is_found_at_the_end_of_a_hyper_step_undoes_it() -> None:
    hyper = trained("cuda", "adamw", Unrolled())
    before = {name: value.clone() for name, value in hyper.values().items()}
    x, y = to("cuda", VAL)
    with pytest.raises(NonFiniteError, match="validation loss is inf"):
        hyper.hyper_step((x, y + float("inf")))
    for name, value in hyper.values().items():
        assert torch.equal(value, before[name])
    hyper.step(to("cuda", BATCHES[0]))
    assert hyper.hyper_step((x, y)).hypergradient_norm > 0


# ---- snapshots that leave ----------------------------------------------------------------------------------


def wide(method: Method, num_steps: int, width: int = 1024) -> tuple[HyperOptimizer, int]:
    """Trained, and the peak of memory in training and sweep, over what was there before."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 1)).cuda()
    made = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    hyper = HyperOptimizer(model, made, mse, [Hyperparameter("lr")], method, FROZEN)
    batch = torch.randn(64, width, device="cuda"), torch.randn(64, 1, device="cuda")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for _ in range(num_steps):
        hyper.step(batch)
    hyper.hypergradient(batch)
    torch.cuda.synchronize()
    return hyper, torch.cuda.max_memory_allocated() - before


def test_memory_of_a_long_window_with_offload_is_that_of_a_short_one() -> None:
    """Python runs ahead of the device: what left must not pile up, nor what is fetched."""
    short, long = (wide(Unrolled(offload="cpu"), num_steps)[1] for num_steps in (10, 100))
    kept = wide(Unrolled(), 100)[1]
    assert long <= 1.1 * short
    assert long <= kept / 4


def test_snapshots_leave_on_a_stream_of_their_own() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        wide(Unrolled(offload="cpu"), 5)
    copies = [event for event in profile.events() if "Memcpy DtoH (Device -> Pinned)" in event.name]
    assert copies


# ---- recorded steps ----------------------------------------------------------------------------------------


class Counted:
    """A training loss that counts how often Python runs it."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        return mse(model, batch)


@pytest.mark.parametrize("method", [Unrolled(), Implicit(Neumann(5, scale=0.1, damping=5.0))], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_captured_training_is_eager_training(dropout: float, method: Method) -> None:
    """The last batch is smaller, hyper steps move the values between the windows,
    and dropout is that of eager steps."""
    hypers, losses = [], []
    for capture in (False, True):
        model, loss = network("cuda", dropout), Counted()
        made = OPTIMIZERS["adamw"](model.parameters())
        tune = [Hyperparameter("weight_decay", per="element", init=0.1)]
        moving = partial(torch.optim.SGD, lr=0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hyper = HyperOptimizer(model, made, loss, tune, method, moving, val_loss=mse, capture=capture)  # type: ignore[arg-type]
            torch.manual_seed(1)
            for _ in range(2):
                for batch in [*BATCHES, *BATCHES, tuple(part[:3] for part in BATCHES[0])]:
                    hyper.step(to("cuda", batch))
                hyper.hyper_step(to("cuda", VAL))
        hypers.append(hyper)
        losses.append(loss.calls)
    eager, captured = hypers
    for ours, theirs in zip(captured.model.state_dict().values(), eager.model.state_dict().values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
    for name, value in eager.values().items():
        torch.testing.assert_close(captured.values()[name], value, rtol=1e-8, atol=1e-12)
    assert losses[1] < losses[0]


REPLAYED = {
    "a whole solve": Implicit(Neumann(5, scale=0.01, damping=50.0)),
    "estimated scale": Implicit(Neumann(20, damping=50.0)),
    "no product": Implicit(Identity(0.1)),
    "second moments": Implicit(Neumann(5, damping=500.0), preconditioner="second_moments"),
    "Gauss-Newton": Implicit(Neumann(5, scale=0.01, damping=50.0), curvature="gauss_newton"),
    "products": Implicit(CG(3, damping=50.0)),
    "products of two batches": Implicit(Neumann(5, scale=0.01, damping=50.0), num_batches=2),
}


@pytest.mark.parametrize("case", REPLAYED)
def test_captured_hyper_steps_are_eager_hyper_steps(case: str) -> None:
    """Values, learning rates, step counts and dropout masks are new at each;
    Python has no product to compute any more."""
    method, ended, calls, residuals = REPLAYED[case], [], [], []
    for capture in (False, True):
        model, loss = network("cuda", 0.5), Counted()
        made = OPTIMIZERS["adamw"](model.parameters())
        tune = [Hyperparameter("weight_decay", per="element", init=0.1)]
        moving = partial(torch.optim.SGD, lr=0.1)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(made, 0.97)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            hyper = HyperOptimizer(model, made, loss, tune, method, moving, val_loss=mse, capture=capture)  # type: ignore[arg-type]
            torch.manual_seed(1)
            for batch in [*BATCHES, *BATCHES]:
                for part in (batch, BATCHES[0]):
                    hyper.step(to("cuda", part))
                    scheduler.step()
                loss.calls = 0
                report = hyper.hyper_step(to("cuda", VAL))
        ended.append(hyper)
        calls.append(loss.calls)
        residuals.append(report.residual)
    eager, captured = ended
    for name, value in eager.values().items():
        torch.testing.assert_close(captured.values()[name], value, rtol=1e-8, atol=1e-12)
    assert residuals[1] == pytest.approx(residuals[0], rel=1e-6)
    # For the gradient's value.
    assert calls == ([1, 0] if not case.startswith("products") else [method.num_batches] * 2)


def test_a_captured_solve_waits_once() -> None:
    model = network("cuda", 0.5)
    made = OPTIMIZERS["adamw"](model.parameters())
    tune = [Hyperparameter("weight_decay", per="element", init=0.1)]
    hyper = HyperOptimizer(model, made, mse, tune, REPLAYED["a whole solve"], FROZEN, capture=True)  # type: ignore[arg-type]
    batches, val = [to("cuda", batch) for batch in BATCHES], to("cuda", VAL)
    for batch in batches:
        hyper.step(batch)
        hyper.hyper_step(val)
    hyper.step(batches[0])
    assert len(waits_of(partial(hyper.hyper_step, val))) <= 1


def test_captured_ridge_regressions_have_their_closed_forms() -> None:
    """Other data and decays each time, in the same shapes."""
    model = nn.Linear(6, 1, bias=False).double().cuda()
    tune = [Hyperparameter("weight_decay", per="element", init=1.0)]
    made = torch.optim.SGD(model.parameters(), lr=0.0)
    hyper = HyperOptimizer(model, made, Ridge.loss, tune, Implicit(Neumann(300)), FROZEN, capture=True)  # type: ignore[arg-type]
    for seed in range(0, 80, 10):
        ridge = Ridge.make(seed=seed)
        ridge = Ridge(ridge.train, ridge.val, ridge.decay + 1 + seed / 10)
        hyper.set_values({"weight_decay/weight": ridge.decay[None].cuda()})
        with torch.no_grad():
            model.weight.copy_(ridge.optimum())
        hyper.step(to("cuda", ridge.train))
        found = hyper.hypergradient(to("cuda", ridge.val))["weight_decay/weight"][0].cpu()
        torch.testing.assert_close(found, ridge.hypergradient(), rtol=1e-7, atol=1e-11)


def test_a_captured_step_never_waits() -> None:
    model = network("cuda", 0.5)
    made = OPTIMIZERS["sgd"](model.parameters())
    hyper = HyperOptimizer(model, made, mse, [Hyperparameter("lr")], Unrolled(), FROZEN, capture=True)  # type: ignore[arg-type]
    batches = [to("cuda", batch) for batch in BATCHES]
    for batch in batches:
        hyper.step(batch)
    assert waits_of(partial(hyper.step, batches[0])) == []


def test_a_loss_that_waits_is_not_captured() -> None:
    def loss(model: nn.Module, batch: Any) -> Tensor:
        found = mse(model, batch)
        assert found.item() == found.item()
        return found

    model = network("cuda")
    made = OPTIMIZERS["sgd"](model.parameters())
    hyper = HyperOptimizer(model, made, loss, [Hyperparameter("lr")], Unrolled(), FROZEN, capture=True)  # type: ignore[arg-type]

    def train() -> None:
        for batch in BATCHES:
            hyper.step(to("cuda", batch))

    with pytest.warns(UserWarning, match="cannot be recorded") as caught:
        train()
    assert len(caught) == 1
    expected = trained("cuda", "sgd", Unrolled(), name="lr").hypergradient(to("cuda", VAL))
    with pytest.warns(UserWarning, match="the product with the training gradient's derivative"):
        found = hyper.hypergradient(to("cuda", VAL))["lr/group0"]
    torch.testing.assert_close(found, torch.stack(list(expected.values())).sum(), rtol=1e-8, atol=1e-12)
