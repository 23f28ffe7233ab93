"""The recorded training steps: snapshots within a budget, and states recomputed from them, last step
first."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from ..device.offload import Offload, Parked
from ..step.batch import seen_again
from ..step.gradient import LossAndGradient
from ..step.second_order import Way
from ..step.state import State, Step
from ..step.transition import Linearization, Transition
from .base import History
from .generators import GeneratorPath
from .packing import pack_state, pack_step, unpack_state, unpack_step


class Snapshots(History):
    """The states before some steps, from which the others are computed again.

    Args:
        transition: what takes steps again.
        truncation: only the last so many steps are kept. None keeps all.
        max_snapshots: at most so many states are kept while training; the others are recomputed, for which
            the backward iteration keeps at most as many again, and three to work on. None keeps every state.
        offload: ``"cpu"`` keeps snapshots and batches in CPU memory.
        path: how states of random number generators are kept between snapshots; None keeps them as they are.
        keeps_gradients: keep the gradient beside each state.
    """

    def __init__(
        self,
        transition: Transition,
        truncation: int | None = None,
        max_snapshots: int | None = None,
        offload: str | None = None,
        *,
        path: GeneratorPath | None = None,
        keeps_gradients: bool = False,
    ) -> None:
        self._transition, self._truncation, self._max_snapshots = transition, truncation, max_snapshots
        self._offload = None if offload is None else Offload()
        self._path = path if max_snapshots is not None else None
        self._keeps_gradients = keeps_gradients
        self._steps: dict[int, Step | Parked] = {}
        self._snapshots: dict[int, tuple[State, LossAndGradient | None] | Parked] = {}
        self.clear()

    def clear(self) -> None:
        self._steps.clear()
        self._snapshots.clear()
        if self._offload is not None:
            self._offload.settle()
        if self._path is not None:
            self._path.clear()
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

    def take(self, step: Step, state: State) -> tuple[Step, State]:
        step, after, found = self._transition.take(step, state, keep=self._keeps_gradients)
        self.record(step, state, found if self._keeps_gradients else None)
        return step, after

    def record(
        self, step: Step, state: State, known: LossAndGradient | None = None, to_pull: State | None = None
    ) -> None:
        """Appends a step and, if it was wanted, the state before it, with the gradient there if that is to be
        kept. ``to_pull`` is what the step's pull reads of the state, where it is known."""
        wanted = self.wants_state()
        if self._max_snapshots is None:  # no step is taken again from it: it is differentiated alone
            state = to_pull or self._transition.update.to_pull(state, step)
        if wanted:
            self._keep_state(self._end, state, known)
        if self._path is not None:
            step = self._path.shortened(step, keep=wanted)
        self._keep_step(self._end, step)
        self._end += 1
        self._forget_truncated()

    def steps(self) -> Iterator[Step]:
        kept = (self._steps[t] for t in range(self._end - len(self), self._end))
        return (step.rest if isinstance(step, Parked) else step for step in kept)

    def num_visits(self) -> int:
        return len(self)

    def num_steps_per_visit(self) -> float:
        return 1

    def backward(self, way: Way) -> Iterator[Linearization]:
        for step, state, known in self.visits():
            yield self._transition.linearize(step, state, way, known)

    def visits(self) -> Iterator[tuple[Step, State, LossAndGradient | None]]:
        """Each step that counts, the state before it, and its gradient if that was kept, last step first.

        States that were not kept are recomputed from the snapshot before them. On the way, up to
        ``max_snapshots`` states are set aside so that as few steps as possible are taken again: binomial
        checkpointing (Griewank and Walther 2000, "Revolve").
        """
        try:
            yield from self._visits(self._max_snapshots or 0)
        finally:
            if self._offload is not None:
                self._offload.drop_fetched()

    def _visits(self, budget: int) -> Iterator[tuple[Step, State, LossAndGradient | None]]:
        aside: list[tuple[int, Step, State]] = []
        kept = list(self._snapshots)
        for t in reversed(range(self._end - len(self), self._end)):
            while kept[-1] > t:
                kept.pop()
            while aside and aside[-1][0] > t:
                aside.pop()
            known = None
            if aside:
                at, step, state = aside[-1]
            else:
                at, step, (state, known) = kept[-1], self._step(kept[-1]), self._snapshot(kept[-1])
            while at < t:
                for _ in range(next_snapshot(t - at + 1, budget - len(aside))):
                    self._fetch(self._steps[at + 1])
                    state = self._transition.apply(step, state)
                    at += 1
                    step = self._step(at)
                    if self._path is not None:
                        step = self._path.lengthened(step)
                if at < t:
                    aside.append((at, step, state))
            if t > self._end - len(self):
                self._fetch(self._steps[t - 1])
                if kept[-1] == t:
                    self._fetch(self._snapshots[kept[-2]])
            yield step, state, known

    def _keep_state(self, t: int, state: State, known: LossAndGradient | None) -> None:
        self._snapshots[t] = (state, known) if self._offload is None else self._offload.park((state, known))

    def _snapshot(self, t: int) -> tuple[State, LossAndGradient | None]:
        kept = self._snapshots[t]
        if isinstance(kept, Parked):
            assert self._offload is not None
            return self._offload.restored(kept)
        return kept

    def _keep_step(self, t: int, step: Step) -> None:
        if self._offload is None or not self._offload.moves(step.batch):
            self._steps[t] = step
        else:
            # The batch is the user's, who may fill it anew at once: it is copied as a part of the
            # computation.
            self._steps[t] = self._offload.park(step.batch, replace(step, batch=None), beside=False)

    def _step(self, t: int) -> Step:
        kept = self._steps[t]
        if isinstance(kept, Parked):
            assert self._offload is not None
            batch = self._offload.restored(kept)
            return replace(kept.rest, batch=batch, seen=seen_again(batch, kept.rest.seen))
        return kept

    def _fetch(self, kept: object) -> None:
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
        return {
            "end": self._end,
            "stride": self._stride,
            "steps": {t: pack_step(self._step(t)) for t in self._steps},
            "snapshots": {t: pack_state(*self._snapshot(t)) for t in self._snapshots},
            "path": None if self._path is None else self._path.state_dict(),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.clear()
        for t, packed in saved["steps"].items():
            self._keep_step(t, unpack_step(packed))
        for t, packed in saved["snapshots"].items():
            self._keep_state(t, *unpack_state(packed, self._transition.gradient.live.optimizer))
        self._end, self._stride = saved["end"], saved["stride"]
        if self._path is not None:
            self._path.load_state_dict(saved["path"])


def next_snapshot(num_states: int, num_free: int) -> int:
    """How far from a known state the next one is to be set aside, to go back through ``num_states`` states,
    the known one included, with ``num_free`` places.

    With c places and each step taken again at most r times, ``C(c + 1 + r, r)`` states can be gone back
    through.
    """
    if num_free <= 0:
        return num_states - 1
    repeats = 0
    while math.comb(num_free + 1 + repeats, repeats) < num_states:
        repeats += 1
    return min(
        math.comb(num_free + repeats, repeats - 1),
        num_states - math.comb(num_free + repeats - 1, repeats - 1),
    )
