"""Snapshots never change the answer, stay within their budget,
and are all that grows with the number of steps."""

from __future__ import annotations

import gc
import math
import weakref
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from problems import FROZEN, REPLAY, mse, random_batch, tanh_mlp
from torch_hypergrad import HyperOptimizer, Hyperparameter, Unrolled
from torch_hypergrad.step.state import State

NUM_STEPS = 23
BATCHES = [random_batch(8, 4, seed) for seed in range(NUM_STEPS)]
VAL = random_batch(8, 4, seed=100)
ADAM = partial(torch.optim.Adam, lr=0.01, eps=1e-3)
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)
BUDGETS = [1, 2, 3, 7, math.isqrt(NUM_STEPS)]


def with_state_everywhere() -> nn.Module:
    """Buffers, dropout and parameters in one small model."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 6), nn.BatchNorm1d(6, momentum=0.3), nn.Tanh(), nn.Dropout(0.4), nn.Linear(6, 1)
    ).double()


def trained(method: Unrolled, num_steps: int = NUM_STEPS, model: nn.Module | None = None) -> HyperOptimizer:
    model = with_state_everywhere() if model is None else model
    tune = [Hyperparameter("lr"), Hyperparameter("weight_decay", per="element", init=0.01)]
    hyper = HyperOptimizer(model, ADAM(model.parameters()), mse, tune, method, FROZEN)
    torch.manual_seed(1)
    for batch in BATCHES[:num_steps]:
        hyper.step(batch)
    return hyper


def assert_bitwise_equal(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        assert torch.equal(ours[name], theirs[name]), name


@pytest.mark.parametrize("offload", [None, "cpu"])
@pytest.mark.parametrize("budget", BUDGETS)
def test_every_budget_gives_the_same_bits(budget: int, offload: Any) -> None:
    expected = trained(REPLAY).hypergradient(VAL)
    hyper = trained(Unrolled(max_snapshots=budget, offload=offload))
    assert_bitwise_equal(hyper.hypergradient(VAL), expected)
    assert_bitwise_equal(hyper.hypergradient(VAL), expected)  # and the sweep leaves the trajectory as it was


def test_offload_alone_gives_the_same_bits() -> None:
    assert_bitwise_equal(
        trained(Unrolled(offload="cpu")).hypergradient(VAL), trained(REPLAY).hypergradient(VAL)
    )


@pytest.mark.parametrize("budget", [2, 3, 7])
@pytest.mark.parametrize("truncation", [1, 5, 10, NUM_STEPS, 50])
def test_truncation_with_a_budget_gives_the_same_bits(truncation: int, budget: int) -> None:
    for num_steps in (3, 11, NUM_STEPS):
        expected = trained(Unrolled(truncation=truncation), num_steps).hypergradient(VAL)
        found = trained(Unrolled(truncation=truncation, max_snapshots=budget), num_steps).hypergradient(VAL)
        assert_bitwise_equal(found, expected)


def test_training_goes_on_after_a_hypergradient() -> None:
    once, twice = (trained(Unrolled(max_snapshots=3), 12) for _ in range(2))
    twice.hypergradient(VAL)
    for hyper in (once, twice):
        torch.manual_seed(2)
        for batch in BATCHES[12:]:
            hyper.step(batch)
    assert_bitwise_equal(twice.hypergradient(VAL), once.hypergradient(VAL))


class LiveStates:
    """Counts the State objects that are alive, and their greatest number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.alive, self.peak = 0, 0
        original = State.__init__

        def counted(state: State, *args: Any, **kwargs: Any) -> None:
            original(state, *args, **kwargs)
            self.alive += 1
            self.peak = max(self.peak, self.alive)
            weakref.finalize(state, self._died)

        monkeypatch.setattr(State, "__init__", counted)

    def _died(self) -> None:
        self.alive -= 1


@pytest.mark.parametrize("budget", [1, 2, 3, 7])
def test_live_states_stay_within_the_documented_bound(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """``max_snapshots`` while training, ``2 * max_snapshots + 3`` while going back; besides these,
    four states belong to the HyperOptimizer: where it began, what it wrote last, and what it restores
    after a replay, while it is compared."""
    gc.collect()
    live = LiveStates(monkeypatch)
    hyper = trained(Unrolled(max_snapshots=budget))
    gc.collect()
    assert live.alive <= budget + 2
    live.peak = live.alive
    hyper.hypergradient(VAL)
    # Adjoints are states too: that after a step, and that before it with and without what goes through the
    # gradient.
    adjoints = 3
    assert live.peak <= 2 * budget + 3 + 4 + adjoints


def test_without_a_budget_every_state_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The counter above can see: all states are alive."""
    live = LiveStates(monkeypatch)
    hyper = trained(REPLAY)
    assert live.alive >= NUM_STEPS
    hyper.hyper_step(VAL)
    gc.collect()
    assert live.alive <= 2


def live_bytes() -> int:
    """Bytes of all tensors that Python can reach."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        with suppress(RuntimeError):  # torch.func leaves tensors about that have no device
            if (
                type(thing) in (torch.Tensor, nn.Parameter)
                and thing.layout is torch.strided
                and thing.device.type == "cpu"
            ):
                storage = thing.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.fixture
def _others_frozen() -> None:
    """What was there before is out of the collector's sight, and stays so, as in conftest.py."""
    gc.collect()
    gc.freeze()


@pytest.mark.usefixtures("_others_frozen")
@pytest.mark.filterwarnings("ignore")  # gc finds objects whose mere inspection warns
def test_memory_grows_by_snapshots_alone() -> None:
    """With all states kept: the parameters at each step, what the derivative of the rule reads, and little
    else. With a budget: nothing."""
    vectors_of = {
        (ADAM, "lr"): 3,  # both moments besides
        (ADAM, "betas.0"): 3,
        (SGD, "weight_decay"): 1,
        (SGD, "momentum"): 2,
        (SGD, "lr"): 2,
        (partial(SGD, nesterov=True), "weight_decay"): 2,  # by autograd, which reads everything
    }
    for (optimizer, setting), num_vectors in vectors_of.items():
        for budget in (None, 5):
            model = tanh_mlp()
            hyper = HyperOptimizer(
                model, optimizer(model.parameters()), mse, [Hyperparameter(setting)],
                Unrolled(memory=0, max_snapshots=budget), FROZEN,
            )  # fmt: skip
            grown = []
            for num_steps in (50, 150):
                for _ in range(num_steps):
                    hyper.step(BATCHES[0])
                grown.append(live_bytes())
            per_step = (grown[1] - grown[0]) / 150
            vectors = 0 if budget else num_vectors * sum(p.numel() for p in tanh_mlp().parameters()) * 8
            assert vectors <= per_step <= vectors + 64, (setting, budget)  # a loss and a flag besides


def test_peak_memory_of_a_sweep_does_not_grow_with_steps() -> None:
    """Bytes that autograd saves for backward at any one time, over windows of 10 and of 100 steps."""
    peaks = []
    for num_steps in (10, 100):
        model = tanh_mlp()
        hyper = HyperOptimizer(model, ADAM(model.parameters()), mse, [Hyperparameter("lr")], REPLAY, FROZEN)
        for _ in range(num_steps):
            hyper.step(BATCHES[0])
        saved = SavedBytes()
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            hyper.hypergradient(VAL)
        peaks.append(saved.peak)
    assert 0 < peaks[1] <= peaks[0]


class Held:
    """One saved tensor."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


class SavedBytes:
    """Counts what autograd holds."""

    def __init__(self) -> None:
        self.now, self.peak = 0, 0

    def pack(self, tensor: torch.Tensor) -> Held:
        held, size = Held(tensor), tensor.nbytes
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(held, self._freed, size)
        return held

    def unpack(self, held: Held) -> torch.Tensor:
        return held.tensor

    def _freed(self, size: int) -> None:
        self.now -= size


def test_many_steps_with_few_snapshots() -> None:
    """Fewer than the root of the number of steps, so that snapshots are made again from snapshots."""
    found = []
    for method in (Unrolled(max_snapshots=10), REPLAY):
        model = tanh_mlp()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.5)
        hyper = HyperOptimizer(model, optimizer, mse, [Hyperparameter("lr")], method, FROZEN)
        for t in range(400):
            hyper.step(BATCHES[t % NUM_STEPS])
        found.append(hyper.hypergradient(VAL))
    assert_bitwise_equal(*found)
    assert found[0]["lr/group0"].abs() > 1e-3
