"""Numbers that Python needs from a device, read all at once: each read waits until the device has caught up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from .errors import HypergradientError

T = TypeVar("T")


def at_once(tensor: Tensor) -> bool:
    """Whether values can be read and compared without waiting for a device."""
    return tensor.device.type == "cpu"


class Reading(Generic[T]):
    """A Python value that follows from numbers on a device: there at once if they can be read at once, else when they
    have been read.

    Args:
        numbers: tensors of numbers, flags or counts.
        conclude: makes the value of them, all entries in order as floats, or raises an error.
    """

    def __init__(self, numbers: Sequence[Tensor], conclude: Callable[[list[float]], T]) -> None:
        self.numbers, self.conclude = list(numbers), conclude
        self._found: list[T] = []
        if all(map(at_once, self.numbers)):
            self.take(self.vector().tolist())

    @property
    def known(self) -> bool:
        """Whether the value is there."""
        return bool(self._found)

    @property
    def value(self) -> T:
        """The value."""
        return self._found[0]

    def vector(self) -> Tensor:
        """The numbers, one after the other, in float64."""
        flat = [number.detach().reshape(-1).to(self.numbers[0].device, torch.float64) for number in self.numbers]
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def take(self, numbers: list[float]) -> None:
        """Concludes the value from the numbers, now that they have been read."""
        self._found = [self.conclude(numbers)]


# What is recorded and replayed gives the same readings of new numbers.
register_pytree_node(
    Reading, lambda reading: (reading.numbers, reading.conclude), lambda numbers, conclude: Reading(list(numbers), conclude)
)


def now_or_later(numbers: Sequence[Tensor], conclude: Callable[[list[float]], T]) -> T | Reading[T]:
    """The value of a :class:`Reading` if it is there at once, else the reading."""
    reading = Reading(numbers, conclude)
    return reading.value if reading.known else reading


def settled(found: Any) -> Any:
    """The value of a reading, now that everything has been read; anything else as it is."""
    return found.value if isinstance(found, Reading) else found


def in_turn(first: Any, then: Any) -> Any:
    """``then``, a reading or not, whose errors come after those of ``first``."""
    if not isinstance(first, Reading):
        return then
    count = sum(number.numel() for number in first.numbers)

    def conclude(numbers: list[float]) -> Any:
        first.conclude(numbers[:count])
        return then.conclude(numbers[count:]) if isinstance(then, Reading) else then

    return Reading([*first.numbers, *(then.numbers if isinstance(then, Reading) else [])], conclude)


class Readings:
    """What waits to be read."""

    def __init__(self) -> None:
        self._waiting: list[Reading] = []

    def ask(self, numbers: Sequence[Tensor], conclude: Callable[[list[float]], T]) -> Reading[T]:
        """A reading, noted down unless its value is there at once."""
        reading = Reading(numbers, conclude)
        self.note(reading)
        return reading

    def note(self, found: object) -> None:
        """Notes ``found`` down if it is a reading whose value is not there yet."""
        if isinstance(found, Reading) and not found.known:
            self._waiting.append(found)

    def read(self) -> None:
        """Reads all numbers in one transfer. Values are concluded in the order of asking: the first error is raised."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        vectors = [reading.vector() for reading in waiting]
        numbers = iter(torch.cat([vector.to(vectors[0].device) for vector in vectors]).tolist())
        for reading, vector in zip(waiting, vectors):
            reading.take([next(numbers) for _ in range(vector.numel())])

    @contextmanager
    def before_errors(self) -> Iterator[None]:
        """What was asked before an error in the block comes before it: it may be the cause."""
        try:
            yield
        except HypergradientError:
            self.read()
            raise
