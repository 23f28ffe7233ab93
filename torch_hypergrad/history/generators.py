"""States of random number generators between snapshots, kept as the way from one to the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..step.state import Step

Rng: TypeAlias = tuple[Tensor, ...]

NUM_TWISTER_BYTES = 24 + 624 * 8
"""Of torch's state of the CPU's generator: seed and place, and the numbers of a Mersenne twister."""

MAX_DRAWS = 2**20
"""Numbers drawn between two steps among which the way is looked for."""

NUM_COMPARED = 8
"""Numbers in a row that are taken for the same place."""


class GeneratorPath:
    """A generator's state takes 5 KB, and is another one for each step if random numbers are drawn. Of the
    steps without a snapshot only the way is kept: how many numbers were drawn in the loop between the end of
    the step before and the beginning of this one.

    Args:
        now: the generators' states as they are.
    """

    def __init__(self, now: Callable[[], Rng]) -> None:
        self._now = now
        self.clear()

    def clear(self) -> None:
        """Begins a window."""
        self._after: Rng | None = None

    def shortened(self, step: Step, *, keep: bool) -> Step:
        """A step that has just been taken, with the way to its generators in their place; whole if they are
        kept."""
        after, self._after = self._after, self._now()
        if keep or after is None:
            return step
        way = (_way(after[0], step.surroundings.rng[0]), *step.surroundings.rng[1:])
        return replace(step, surroundings=replace(step.surroundings, rng=way))

    def lengthened(self, step: Step) -> Step:
        """The step with its generators, when the step before has just been taken again."""
        way, *others = step.surroundings.rng
        rng = (_at_end(self._now()[0], way), *others)
        return replace(step, surroundings=replace(step.surroundings, rng=rng))

    def state_dict(self) -> Any:
        """Where the last step ended."""
        return None if self._after is None else list(self._after)

    def load_state_dict(self, saved: Any) -> None:
        """Takes over what :meth:`state_dict` gave."""
        self._after = None if saved is None else tuple(saved)


def _way(start: Tensor, end: Tensor) -> Tensor:
    """From one state to another: the number of draws, and what the state holds besides the twister; or the
    other state itself, where the twister did not get there by itself (it was seeded anew)."""
    if torch.equal(start, end):
        return torch.empty(0, dtype=torch.uint8)
    target = _drawn(end, NUM_COMPARED)
    size = 1024
    while size <= MAX_DRAWS:
        stream = _drawn(start, size + NUM_COMPARED)
        for place in (stream[:size] == target[0]).nonzero()[:, 0].tolist():
            if torch.equal(stream[place : place + NUM_COMPARED], target):
                way = torch.cat([torch.tensor([place]).view(torch.uint8), _rest(end)])
                return way if torch.equal(_at_end(start, way), end) else end
        size *= 8
    return end


def _at_end(start: Tensor, way: Tensor) -> Tensor:
    if len(way) == 0:
        return start
    if len(way) == len(start):
        return way
    number, rest = int(way[:8].view(torch.int64)), way[8:]
    generator = torch.Generator()
    generator.set_state(start)
    torch.empty(number, dtype=torch.int32).random_(generator=generator)
    end = generator.get_state()
    _rest(end).copy_(rest)
    return end


def _drawn(state: Tensor, number: int) -> Tensor:
    """The next numbers of a generator in this state."""
    generator = torch.Generator()
    generator.set_state(state)
    return torch.empty(number, dtype=torch.int32).random_(generator=generator)


def _rest(state: Tensor) -> Tensor:
    """What a state holds besides the twister's numbers: a second normal number that was drawn in advance."""
    return state[NUM_TWISTER_BYTES:]
