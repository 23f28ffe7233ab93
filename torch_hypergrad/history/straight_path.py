"""A straight line between the first state and the last in the place of the states that training went
through."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import HypergradientError
from ..ground.buckets import Bucket
from ..step.gradient import GradientStage
from ..step.second_order import Way
from ..step.state import Buffers, Part, State, Step
from ..step.traced import TracedGradient
from ..step.transition import Linearization, Transition
from ..updates import UpdateRule
from ..updates.base import RuleState
from .base import History
from .packing import pack_state, pack_step, unpack_state, unpack_step


class StraightPath(History):
    r"""The steps with their batches, and of their states the first and the last alone. The state before step
    t of T is taken for

    .. math:: \theta_t \approx (1 - \tfrac tT)\, \theta_0 + \tfrac tT\, \theta_T,

    and likewise for the vectors of the optimizer's state and of the buffers. Where the optimizer has no state
    before its first step, the line begins at the state after it. What is one number (a count of steps, a
    product of momenta) is as it was at the step.

    Args:
        num_points: how many steps are gone back over, evenly spaced, the last one among them; None for a
            tenth of all.
    """

    def __init__(self, transition: Transition, num_points: int | None) -> None:
        self._transition, self._num_points = transition, num_points
        self.clear()

    def clear(self) -> None:
        self._steps: list[Step] = []
        self._numbers: list[Numbers] = []
        self._first: State | None = None
        self._last: State | None = None  # after the last step, but with the buffers before it

    def take(self, step: Step, state: State) -> tuple[Step, State]:
        step, after, _ = self._transition.take(step, state)
        if self._first is None:
            self._first = _begun(state, after, self._transition.update.rule)
        self._steps.append(step)
        self._numbers.append(Numbers.of(state))
        self._last = replace(after, buffers=state.buffers)
        return step, after

    def steps(self) -> Iterator[Step]:
        return iter(self._steps)

    def num_visits(self) -> int:
        return min(self._num_points or max(1, len(self._steps) // 10), len(self._steps))

    def num_steps_per_visit(self) -> float:
        return len(self._steps) / self.num_visits()

    def backward(self, way: Way) -> Iterator[Linearization]:
        """Of the losses the first alone is compared with the recorded one: its weights are known."""
        length, num, stage = len(self._steps), self.num_visits(), self._transition.gradient
        assert self._first is not None
        with stage.live.at(self._first):
            stage.loss_again(self._steps[0])
        for point in range(num):
            t = length - 1 - point * length // num
            # The loss is another one than it was: the state is none that training has been in.
            step = replace(self._steps[t], loss=None)
            yield self._transition.linearize(step, self._state(t), partial(_on_the_same_branch, way))

    def _state(self, t: int) -> State:
        """The state before step ``t``, as the line has it."""
        first, last = self._first, self._last
        assert first is not None
        assert last is not None
        buffers = None
        if last.buffers is not None and first.buffers is not None:
            share = t / max(len(self._steps) - 1, 1)
            places = zip(first.buffers, last.buffers, self._numbers[t].buffers)
            buffers = tuple(_buffer_on_line(*place, share) for place in places)
        return State(tuple(self._part(part, t) for part in last.parts), buffers)

    def _part(self, last: Part, t: int) -> Part:
        bucket, length = last.bucket, len(self._steps)
        assert self._first is not None
        first = _part_of(self._first.parts, bucket)
        begun = self._numbers[0].of_bucket(bucket)
        rule_state = self._numbers[t].of_bucket(bucket)
        for key, value in rule_state.items():
            if value is not None:
                continue
            if key not in first.rule_state or key not in last.rule_state:
                raise _no_line(f"{key!r} of the optimizer's state began after the first step of the window")
            start = 0 if key in begun else 1
            share = (t - start) / (length - start)
            rule_state[key] = torch.lerp(first.rule_state[key], last.rule_state[key], share)
        return Part(bucket, torch.lerp(first.param, last.param, t / length), rule_state)

    def state_dict(self) -> dict[str, Any]:
        ends = [None if end is None else pack_state(end) for end in (self._first, self._last)]
        return {
            "steps": [pack_step(step) for step in self._steps],
            "numbers": [[list(map(list, n.rule_states)), list(n.buffers)] for n in self._numbers],
            "ends": ends,
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._steps = [unpack_step(step) for step in saved["steps"]]
        self._numbers = [
            Numbers(tuple((tuple(indices), dict(numbers)) for indices, numbers in parts), tuple(buffers))
            for parts, buffers in saved["numbers"]
        ]
        optimizer = self._transition.gradient.live.optimizer
        ends = [None if end is None else unpack_state(end, optimizer)[0] for end in saved["ends"]]
        self._first, self._last = ends


@dataclass(frozen=True)
class Numbers:
    """What of a state are single numbers, kept of every step; None stands for each vector.

    Args:
        rule_states: for each part, the indices of its parameters, and its numbers by name.
        buffers: one entry for each buffer.
    """

    rule_states: tuple[tuple[tuple[int, ...], RuleState], ...]
    buffers: Buffers

    @staticmethod
    def of(state: State) -> Numbers:
        """Those of ``state``."""
        parts = [
            (part.bucket.indices, {k: None if _is_vector(v) else v for k, v in part.rule_state.items()})
            for part in state.parts
        ]
        buffers = tuple(None if _is_vector(buffer) else buffer for buffer in state.buffers or ())
        return Numbers(tuple(parts), buffers)

    def of_bucket(self, bucket: Bucket) -> RuleState:
        """A copy of those of the optimizer's state for parameters that were updated together."""
        for indices, numbers in self.rule_states:
            if bucket.indices[0] in indices and set(bucket.indices) <= set(indices):
                return dict(numbers)
        raise _parted()


def _on_the_same_branch(
    way: Way, stage: GradientStage, step: Step, state: State, **options: Any
) -> TracedGradient:
    """The gradient of a step on the line, of the parameters that had one in training."""
    traced = way(stage, step, state, **options)
    for name, was_active, grad in zip(stage.live.model.names, step.active, traced.grads):
        if was_active and grad is None:
            raise HypergradientError(
                f"DrMAD: the loss of training step {step.number + 1} depended on {name!r}, but does not at "
                "the weights that a straight line has there: it takes another branch. Use Unrolled()."
            )
    return traced


def _begun(state: State, after: State, rule: UpdateRule) -> State:
    """Where the line begins: ``state``, in the buckets of the state ``after`` the step, with vectors of the
    optimizer from there if it had none before."""
    parts = []
    for part in after.parts:
        before = _part_of(state.parts, part.bucket)
        rule_state = {k: v for k, v in {**part.rule_state, **before.rule_state}.items() if _is_vector(v)}
        for key, value in rule_state.items():
            _check_vector(key, value, rule)
        parts.append(Part(part.bucket, before.param, rule_state))
    return State(tuple(parts), state.buffers)


def _check_vector(key: str, value: Tensor, rule: UpdateRule) -> None:
    if not value.is_floating_point():
        raise _no_line(f"{key!r} of the optimizer's state has the dtype {value.dtype}")
    if key in rule.scalars:
        raise _no_line(
            f"{key!r} of the optimizer's state, usually one number, has a value for each weight here"
        )


def _part_of(parts: Sequence[Part], bucket: Bucket) -> Part:
    """The part of the parameters in ``bucket``."""
    for part in parts:
        if part.bucket is bucket:
            return part
        if set(bucket.indices) <= set(part.bucket.indices):
            return part.of(bucket)
    raise _parted()


def _buffer_on_line(
    first: Tensor | None, last: Tensor | None, number: Tensor | None, share: float
) -> Tensor | None:
    if number is not None or last is None:
        return number
    is_line = first is not None and first.shape == last.shape and last.is_floating_point()
    return torch.lerp(first, last, share) if is_line else last  # type: ignore[arg-type]


def _parted() -> HypergradientError:
    return _no_line("parameters are updated together that were not so at the beginning of the window")


def _no_line(why: str) -> HypergradientError:
    return HypergradientError(
        f"DrMAD takes states from a straight line, and there is none here: {why}. Use Unrolled()."
    )


def _is_vector(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0
