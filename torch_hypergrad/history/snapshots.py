"""The recorded training steps: snapshots within a budget, and states recomputed from them, last step first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch import Tensor

from .offload import Offload, Parked
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
        self._offload = None if offload is None else Offload()
        self._steps: dict[int, Step | Parked] = {}
        self._snapshots: dict[int, State | Parked] = {}
        self.clear()

    def clear(self) -> None:
        """Forgets every step."""
        self._steps.clear()
        self._snapshots.clear()
        if self._offload is not None:
            self._offload.settle()
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
            self._keep_state(self._end, state)
        self._keep_step(self._end, step)
        self._end += 1
        self._forget_truncated()

    def steps(self) -> Iterator[Step]:
        """The steps that count, first step first; without batches where these were moved away."""
        kept = (self._steps[t] for t in range(self._end - len(self), self._end))
        return (step.rest if isinstance(step, Parked) else step for step in kept)

    def backward(self) -> Iterator[tuple[Step, State]]:
        """Each step that counts and the state before it, last step first.

        States that were not kept are recomputed from the snapshot before them. On the way, up to ``max_snapshots``
        states are set aside so that as few steps as possible are taken again: binomial checkpointing (Griewank and
        Walther 2000, "Revolve").
        """
        try:
            yield from self._backward(self._max_snapshots or 0)
        finally:
            if self._offload is not None:
                self._offload.drop_fetched()

    def _backward(self, budget: int) -> Iterator[tuple[Step, State]]:
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
                    step = self._step(at)
                    self._fetch(self._steps[at + 1])
                    state = self._training.replay(step, state)
                    at += 1
                if at < t:
                    aside.append((at, state))
            step = self._step(t)
            if t > self._end - len(self):
                self._fetch(self._steps[t - 1])
                if kept[-1] == t:
                    self._fetch(self._snapshots[kept[-2]])
            yield step, state

    def _keep_state(self, t: int, state: State) -> None:
        if self._offload is None:
            self._snapshots[t] = state
        else:
            tree = (state.params, state.rule_states, state.buffers, state.grads)
            self._snapshots[t] = self._offload.park(tree, state.buckets)

    def _snapshot(self, t: int) -> State:
        kept = self._snapshots[t]
        if not isinstance(kept, Parked) or self._offload is None:
            return kept  # type: ignore[return-value]
        return State(kept.rest, *self._offload.restored(kept))

    def _keep_step(self, t: int, step: Step) -> None:
        if self._offload is None or not self._offload.moves(step.batch):
            self._steps[t] = step
        else:
            # The batch is the user's, who may fill it anew at once: it is copied as a part of the computation.
            self._steps[t] = self._offload.park(step.batch, replace(step, batch=None), beside=False)

    def _step(self, t: int) -> Step:
        kept = self._steps[t]
        if not isinstance(kept, Parked) or self._offload is None:
            return kept  # type: ignore[return-value]
        batch = self._offload.restored(kept)
        return replace(kept.rest, batch=batch, versions=versions_of(batch))

    def _fetch(self, kept: Step | State | Parked) -> None:
        """Starts to bring back what will be needed next."""
        if isinstance(kept, Parked) and self._offload is not None:
            self._offload.fetch(kept)

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
            "steps": {t: pack_step(self._step(t)) for t in self._steps},
            "snapshots": {t: pack_state(self._snapshot(t)) for t in self._snapshots},
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self.clear()
        for t, packed in saved["steps"].items():
            self._keep_step(t, unpack_step(packed))
        for t, packed in saved["snapshots"].items():
            self._keep_state(t, unpack_state(packed, self._training))
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
