"""A straight line between the first state and the last in the place of the states that training went
through."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import HypergradientError
from ..ground.buckets import Bucket
from ..step.second_order import Way
from ..step.state import Part, State, Step
from ..step.transition import Linearization, Transition
from .base import History
from .packing import pack_state, pack_step, unpack_state, unpack_step


class StraightPath(History):
    r"""The steps with their batches, and of their states the first and the last alone. The state before step
    t of T is taken for

    .. math:: \theta_t \approx (1 - \tfrac tT)\, \theta_0 + \tfrac tT\, \theta_T,

    and likewise for the vectors of the optimizer's state, which are 0 before the first step if there were
    none. Buffers are the last ones.

    Args:
        num_points: how many steps are gone back over, evenly spaced, the last one among them; None for a
            tenth of all.
    """

    def __init__(self, transition: Transition, num_points: int | None) -> None:
        self._transition, self._num_points = transition, num_points
        self.clear()

    def clear(self) -> None:
        self._steps: list[Step] = []
        self._first: State | None = None
        self._last: State | None = None

    def take(self, step: Step, state: State) -> tuple[Step, State]:
        step, after, _ = self._transition.take(step, state)
        self._first = state if self._first is None else self._first
        self._steps.append(step)
        self._last = after
        return step, after

    def steps(self) -> Iterator[Step]:
        return iter(self._steps)

    def num_visits(self) -> int:
        return min(self._num_points or max(1, len(self._steps) // 10), len(self._steps))

    def num_steps_per_visit(self) -> float:
        return len(self._steps) / self.num_visits()

    def backward(self, way: Way) -> Iterator[Linearization]:
        length, num = len(self._steps), self.num_visits()
        for point in range(num):
            t = length - 1 - point * length // num
            # The loss is another one than it was: the state is none that training has been in.
            step = replace(self._steps[t], loss=None)
            yield self._transition.linearize(step, self._state(t), way)

    def _state(self, t: int) -> State:
        """The state before step ``t``, as the line has it."""
        first, last = self._first, self._last
        assert first is not None
        assert last is not None
        begun = {i: part for part in first.parts for i in part.bucket.indices}
        parts = [_between(begun[part.bucket.indices[0]], part, t, len(self._steps)) for part in last.parts]
        return State(tuple(parts), last.buffers if last.buffers is not None else first.buffers)

    def state_dict(self) -> dict[str, Any]:
        ends = [None if end is None else pack_state(end) for end in (self._first, self._last)]
        return {"steps": [pack_step(step) for step in self._steps], "ends": ends}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._steps = [unpack_step(step) for step in saved["steps"]]
        optimizer = self._transition.gradient.live.optimizer
        ends = [None if end is None else unpack_state(end, optimizer)[0] for end in saved["ends"]]
        self._first, self._last = ends


def _between(first: Part, last: Part, t: int, length: int) -> Part:
    """The part on the line, ``t`` of ``length`` steps from its beginning."""
    if first.bucket is not last.bucket:
        raise HypergradientError(
            "DrMAD: parameters that were updated together were no longer at the end of the window, since "
            "some had no gradient in a step, or the optimizer began anew for them: there is no line between "
            "their states. Use Unrolled()."
        )
    share = t / length
    rule_state = {
        key: _on_line(key, first.rule_state.get(key), value, share, t, last.bucket)
        for key, value in last.rule_state.items()
    }
    return Part(last.bucket, torch.lerp(first.param, last.param, share), rule_state)


def _on_line(key: str, before: Any, after: Any, share: float, t: int, bucket: Bucket) -> Any:
    if key == "step":
        return int(before or 0) + t
    if not isinstance(after, Tensor) or not after.is_floating_point():
        raise HypergradientError(
            f"DrMAD: {key!r} of the optimizer's state is {after!r}, and there is no line between two of "
            "these. Use Unrolled()."
        )
    return after * share if before is None else torch.lerp(before, after, share)
