"""The recorded training steps: snapshots within a budget, and states recomputed from them, last step first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from .records import State, Step, Surroundings, versions_of
from .training import Training


class Trajectory:
    """The training steps since the last hyper step, and the states before some of them.

    Args:
        training: what takes the steps, and takes them again.
        truncation: only the last so many steps are kept. None keeps all.
        max_snapshots: at most so many states are kept while training; the others are recomputed, for which the backward
            iteration keeps at most as many again, and three to work on. None keeps every state.
        offload: ``"cpu"`` keeps snapshots and batches in CPU memory.
    """

    def __init__(self, training: Training, truncation: int | None, max_snapshots: int | None, offload: str | None) -> None:
        self._training, self._truncation, self._max_snapshots = training, truncation, max_snapshots
        self._offload = offload is not None
        self._steps: dict[int, Step | Offloaded] = {}
        self._snapshots: dict[int, State | Offloaded] = {}
        self.clear()

    def clear(self) -> None:
        """Forgets every step."""
        self._steps.clear()
        self._snapshots.clear()
        self._end = 0
        self._stride = 1
        if self._truncation is not None and self._max_snapshots is not None:
            self._stride = math.ceil(self._truncation / (self._max_snapshots - 1))

    def __len__(self) -> int:
        """How many steps count."""
        return self._end if self._truncation is None else min(self._end, self._truncation)

    def wants_state(self) -> bool:
        """Whether the state before the next step is to be kept. Makes room for it."""
        if self._truncation is None and self._max_snapshots is not None:
            while self._end % self._stride == 0 and len(self._snapshots) >= self._max_snapshots:
                self._stride *= 2
                self._snapshots = {t: state for t, state in self._snapshots.items() if t % self._stride == 0}
        return self._end % self._stride == 0

    def record(self, step: Step, state: State) -> None:
        """Appends a step and, if it was wanted, the state before it."""
        if self.wants_state():
            self._snapshots[self._end] = _offloaded_state(state) if self._offload else state
        self._steps[self._end] = _offloaded_step(step) if self._offload else step
        self._end += 1
        self._forget_truncated()

    def steps(self) -> Iterator[Step]:
        """The steps that count, first step first."""
        return (_step(self._steps[t]) for t in range(self._end - len(self), self._end))

    def backward(self) -> Iterator[tuple[Step, State]]:
        """Each step that counts and the state before it, last step first.

        States that were not kept are recomputed from the snapshot before them. On the way, up to ``max_snapshots``
        states are set aside so that as few steps as possible are taken again: binomial checkpointing (Griewank and
        Walther 2000, "Revolve").
        """
        budget = self._max_snapshots or 0
        aside: list[tuple[int, State]] = []
        kept = list(self._snapshots)
        for t in reversed(range(self._end - len(self), self._end)):
            while kept[-1] > t:
                kept.pop()
            while aside and aside[-1][0] > t:
                aside.pop()
            at, state = aside[-1] if aside else (kept[-1], self._snapshot(kept[-1]))
            while at < t:
                for _ in range(next_snapshot(t - at + 1, budget - len(aside))):
                    state = self._training.replay(_step(self._steps[at]), state)
                    at += 1
                if at < t:
                    aside.append((at, state))
            yield _step(self._steps[t]), state

    def _snapshot(self, t: int) -> State:
        kept = self._snapshots[t]
        return kept.restored() if isinstance(kept, Offloaded) else kept

    def _forget_truncated(self) -> None:
        if self._truncation is None:
            return
        first = max((t for t in self._snapshots if t <= self._end - self._truncation), default=0)
        for kept in (self._snapshots, self._steps):
            for t in [t for t in kept if t < first]:
                del kept[t]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain containers of tensors."""
        return {
            "end": self._end,
            "stride": self._stride,
            "steps": {t: pack_step(_step(step)) for t, step in self._steps.items()},
            "snapshots": {t: pack_state(self._snapshot(t)) for t in self._snapshots},
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self.clear()
        for t, packed in saved["steps"].items():
            step = unpack_step(packed)
            self._steps[t] = _offloaded_step(step) if self._offload else step
        for t, packed in saved["snapshots"].items():
            state = unpack_state(packed, self._training)
            self._snapshots[t] = _offloaded_state(state) if self._offload else state
        self._end, self._stride = saved["end"], saved["stride"]


def next_snapshot(num_states: int, num_free: int) -> int:
    """How far from a known state the next one is to be set aside, to go back through ``num_states`` states, the known
    one included, with ``num_free`` places.

    With c places and each step taken again at most r times, ``C(c + 1 + r, r)`` states can be gone back through.
    """
    if num_free <= 0:
        return num_states - 1
    repeats = 0
    while math.comb(num_free + 1 + repeats, repeats) < num_states:
        repeats += 1
    return min(math.comb(num_free + repeats, repeats - 1), num_states - math.comb(num_free + repeats - 1, repeats - 1))


class Offloaded:
    """Something whose tensors have been moved to CPU memory, and how to bring it back."""

    def __init__(self, rest: Any, tree: Any) -> None:
        self._rest = rest
        leaves, self._spec = tree_flatten(tree)
        self._devices = [leaf.device if isinstance(leaf, Tensor) else None for leaf in leaves]
        self._leaves = [_to_cpu(leaf) for leaf in leaves]

    def restored(self) -> Any:
        """The thing itself, on the devices it came from."""
        leaves = [
            leaf if device is None else leaf.to(device, non_blocking=True) for leaf, device in zip(self._leaves, self._devices)
        ]
        return self._rest(tree_unflatten(leaves, self._spec))


def _to_cpu(leaf: Any) -> Any:
    if not isinstance(leaf, Tensor) or leaf.device.type == "cpu":
        return leaf
    pinned = torch.empty(leaf.shape, dtype=leaf.dtype, pin_memory=leaf.device.type == "cuda")
    return pinned.copy_(leaf, non_blocking=leaf.device.type == "cuda")


def _offloaded_state(state: State) -> Offloaded:
    buckets = state.buckets
    tree = (state.params, state.rule_states, state.buffers, state.grads)
    return Offloaded(lambda moved: State(buckets, *moved), tree)


def _offloaded_step(step: Step) -> Offloaded | Step:
    if all(not isinstance(leaf, Tensor) or leaf.device.type == "cpu" for leaf in tree_flatten(step.batch)[0]):
        return step
    bare = replace(step, batch=None)

    def restore(batch: Any) -> Step:
        return replace(bare, batch=batch, versions=versions_of(batch))

    return Offloaded(restore, step.batch)


def _step(kept: Step | Offloaded) -> Step:
    return kept.restored() if isinstance(kept, Offloaded) else kept


def pack_state(state: State) -> dict[str, Any]:
    """``state`` as plain containers of tensors."""
    return {
        "buckets": [list(bucket.indices) for bucket in state.buckets],
        "params": list(state.params),
        "rule_states": [dict(rule_state) for rule_state in state.rule_states],
        "buffers": None if state.buffers is None else list(state.buffers),
        "grads": None if state.grads is None else list(state.grads),
    }


def unpack_state(packed: dict[str, Any], training: Training) -> State:
    """The transpose of :func:`pack_state`, on the devices of the parameters."""
    buckets = tuple(training.optimizer_state.bucket(indices) for indices in packed["buckets"])
    buffers, grads = packed["buffers"], packed.get("grads")
    return State(
        buckets,
        tuple(param.to(bucket.device) for bucket, param in zip(buckets, packed["params"])),
        tuple(
            {k: v.to(bucket.device) if isinstance(v, Tensor) and v.ndim > 0 else v for k, v in rule_state.items()}
            for bucket, rule_state in zip(buckets, packed["rule_states"])
        ),
        None if buffers is None else tuple(buffers),
        None if grads is None else tuple(grads),
    )


def pack_step(step: Step) -> dict[str, Any]:
    """``step`` as plain containers of tensors; the batch must be one itself."""
    packed = {**vars(step), "surroundings": dict(vars(step.surroundings)), "settings": [dict(s) for s in step.settings]}
    del packed["versions"]
    return packed


def unpack_step(packed: dict[str, Any]) -> Step:
    """The transpose of :func:`pack_step`."""
    rest = {
        "versions": versions_of(packed["batch"]),
        "surroundings": Surroundings(**{k: tuple(v) for k, v in packed["surroundings"].items()}),
        "settings": tuple(packed["settings"]),
        "active": tuple(packed["active"]),
    }
    return Step(**{**packed, **rest})
