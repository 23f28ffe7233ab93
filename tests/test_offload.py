"""Snapshots that leave for host memory beside the computation: what is read before it is there,
or given back before it is copied, shows on a CPU too, with copies that are made as late as they may be."""

from __future__ import annotations

import gc
import weakref
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import torch_hypergrad.history.snapshots
from problems import FROZEN, mse
from test_snapshots import ADAM, BATCHES, VAL, with_state_everywhere
from torch_hypergrad import HyperOptimizer, Hyperparameter, TrajectoryError, Unrolled
from torch_hypergrad.device.offload import Offload

NAN = float("nan")


class LateCopies:
    """A side stream that falls behind: nothing is copied before somebody waits, and then in order.
    It holds sources by weak references alone, as a device holds memory."""

    def __init__(self) -> None:
        self.queue: list[tuple[Tensor, weakref.ref[Tensor], int]] = []
        self.done = 0
        self.most_waiting = 0

    def to_host(self, like: Tensor) -> Tensor:
        return torch.full_like(like, NAN) if like.is_floating_point() else torch.full_like(like, 99)

    def beside(self, pairs: Any) -> int:
        for target, source in pairs:
            target.data.fill_(NAN if target.is_floating_point() else 99)
            self.queue.append((target, weakref.ref(source), source._version))
        self.most_waiting = max(self.most_waiting, len(self.queue) - self.done)
        return len(self.queue)

    def between(self, pairs: Any) -> int:
        for target, source in pairs:
            target.data.copy_(source)
        return self.done

    def wait(self, event: int) -> None:
        for target, held, version in self.queue[self.done : event]:
            source = held()
            assert source is not None, "memory was given back before it was copied"
            assert source._version == version, "memory was written to before it was copied"
            target.data.copy_(source)  # as .data, so that version counters show what others write
        self.queue[self.done : event] = [None] * max(event - self.done, 0)  # type: ignore[list-item]
        self.done = max(self.done, event)


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> LateCopies:
    copies = LateCopies()
    monkeypatch.setattr(torch_hypergrad.history.snapshots, "Offload", partial(Offload, lambda device: copies))
    return copies


def trained(method: Unrolled, num_steps: int = 13) -> HyperOptimizer:
    model = with_state_everywhere()
    tune = [Hyperparameter("lr"), Hyperparameter("weight_decay", per="element", init=0.01)]
    hyper = HyperOptimizer(model, ADAM(model.parameters()), mse, tune, method, FROZEN)
    torch.manual_seed(1)
    for x, y in BATCHES[:num_steps]:
        hyper.step((x.clone(), y.clone()))
    return hyper


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


METHODS = [
    {},
    {"max_snapshots": 1},
    {"max_snapshots": 3},
    {"truncation": 6},
    {"truncation": 6, "max_snapshots": 3},
    {"second_order": "finite_difference"},
]


@pytest.mark.parametrize("options", METHODS, ids=str)
def test_late_copies_give_the_same_bits(options: Any, late: LateCopies) -> None:
    expected = trained(Unrolled(**options)).hypergradient(VAL)
    hyper = trained(Unrolled(**options, offload="cpu"))
    assert late.most_waiting > 0
    for _ in range(2):
        check_equal(hyper.hypergradient(VAL), expected)
    hyper.hyper_step(VAL)
    assert late.done == len(late.queue), "something that was fetched is still on its way"


def test_the_next_snapshot_is_on_its_way_while_one_is_in_use(late: LateCopies) -> None:
    trajectory = trained(Unrolled(offload="cpu"))._window._history  # type: ignore[attr-defined]
    sweep = trajectory.visits()
    for _ in range(3):
        next(sweep)
        assert late.done < len(late.queue)
    sweep.close()
    assert late.done == len(late.queue)


def test_snapshots_leave_while_training_goes_on_and_one_at_a_time(late: LateCopies) -> None:
    trajectory = trained(Unrolled(offload="cpu"), 6)._window._history  # type: ignore[attr-defined]
    in_snapshot = sum(isinstance(leaf, Tensor) for leaf in trajectory._snapshots[5].leaves)
    assert late.done < len(late.queue)  # the last has not been waited for
    assert late.most_waiting <= in_snapshot + len(BATCHES[0])


def test_device_memory_of_snapshots_is_given_back(late: LateCopies) -> None:
    hyper = trained(Unrolled(offload="cpu"), 6)
    trajectory = hyper._window._history  # type: ignore[attr-defined]
    hyper.step(BATCHES[6])
    gc.collect()
    held = {id(t) for _, _, pairs in trajectory._offload._leaving for _, t in pairs}
    in_snapshot = sum(isinstance(leaf, Tensor) for leaf in trajectory._snapshots[6].leaves)
    assert len(held) <= in_snapshot


def test_a_batch_may_be_filled_anew_after_the_step(late: LateCopies) -> None:
    """It was copied as a part of the computation."""
    expected = trained(Unrolled(), 5).hypergradient(VAL)
    model = with_state_everywhere()
    tune = [Hyperparameter("lr"), Hyperparameter("weight_decay", per="element", init=0.01)]
    hyper = HyperOptimizer(model, ADAM(model.parameters()), mse, tune, Unrolled(offload="cpu"), FROZEN)
    torch.manual_seed(1)
    x, y = torch.empty_like(BATCHES[0][0]), torch.empty_like(BATCHES[0][1])
    for t in range(5):
        x.copy_(BATCHES[t][0])
        y.copy_(BATCHES[t][1])
        hyper.step((x, y))
    check_equal(hyper.hypergradient(VAL), expected)


def test_a_sweep_that_fails_leaves_nothing_on_its_way(late: LateCopies) -> None:
    calls = 0

    def train_loss(model: Any, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 9:
            raise TrajectoryError("stop")
        return mse(model, batch)

    model = with_state_everywhere()
    hyper = HyperOptimizer(
        model, ADAM(model.parameters()), train_loss, [Hyperparameter("lr")], Unrolled(offload="cpu"), FROZEN
    )
    for batch in BATCHES[:6]:
        hyper.step(batch)
    with pytest.raises(TrajectoryError, match="stop"):
        hyper.hypergradient(VAL)
    gc.collect()
    assert late.done == len(late.queue)
    assert hyper.hypergradient(VAL)["lr/group0"].isfinite()


def test_a_checkpoint_of_a_trajectory_that_was_moved_away(late: LateCopies) -> None:
    hyper = trained(Unrolled(offload="cpu", max_snapshots=3))
    other = trained(Unrolled(offload="cpu", max_snapshots=3), 1)
    other.load_state_dict(hyper.state_dict())
    check_equal(other.hypergradient(VAL), hyper.hypergradient(VAL))


def test_strides_survive(late: LateCopies) -> None:
    offload = Offload(lambda device: late)
    images = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    parked = offload.park({"x": images, "n": 3})
    restored = offload.restored(parked)
    assert restored["n"] == 3
    assert torch.equal(restored["x"], images)
    assert restored["x"].stride() == images.stride()


def test_what_is_in_host_memory_stays_there() -> None:
    offload, x = Offload(), torch.randn(3)
    assert not offload.moves([x])
    assert offload.restored(offload.park([x]))[0] is x
