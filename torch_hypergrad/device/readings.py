"""Numbers that Python needs from a device, read all at once: each read waits until the device has caught
up."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ..errors import HypergradientError

T = TypeVar("T")


def at_once(tensor: Tensor) -> bool:
    """Whether values can be read and compared without waiting for a device."""
    return tensor.device.type == "cpu"


class Reading(Generic[T]):
    """A Python value that follows from numbers on a device, and is there once they have been read.

    Args:
        numbers: tensors of numbers, flags or counts.
        conclude: makes the value of them, all entries in order as floats, or raises an error.
    """

    value: T

    def __init__(self, numbers: Sequence[Tensor], conclude: Callable[[list[float]], T]) -> None:
        self._numbers, self._conclude = list(numbers), conclude

    def vector(self) -> Tensor:
        """The numbers, one after the other, in float64."""
        device = self._numbers[0].device
        flat = [number.detach().reshape(-1).to(device, torch.float64) for number in self._numbers]
        return flat[0] if len(flat) == 1 else torch.cat(flat)

    def take(self, numbers: list[float]) -> None:
        """Concludes the value from the numbers, now that they have been read."""
        self.value = self._conclude(numbers)


class Readings:
    """What waits to be read."""

    def __init__(self) -> None:
        self._waiting: list[Reading] = []

    def ask(self, numbers: Sequence[Tensor], conclude: Callable[[list[float]], T]) -> Reading[T]:
        """A value that follows from numbers: there at once if they can be read at once, else after
        :meth:`read`."""
        reading = Reading(numbers, conclude)
        if all(map(at_once, numbers)):
            reading.take(reading.vector().tolist() if numbers else [])
        else:
            self._waiting.append(reading)
        return reading

    def read(self) -> None:
        """Reads all numbers in one transfer. Values are concluded in the order of asking: the first error is
        raised."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        vectors = [reading.vector() for reading in waiting]
        numbers = iter(torch.cat([vector.to(vectors[0].device) for vector in vectors]).tolist())
        for reading, vector in zip(waiting, vectors):
            reading.take([next(numbers) for _ in range(vector.numel())])

    @contextmanager
    def before_errors(self) -> Iterator[None]:
        """What was asked before an error in the block comes before it: it may be the cause. Nothing waits
        after an error."""
        try:
            yield
        except HypergradientError:
            self.read()
            raise
        except BaseException:
            self._waiting.clear()
            raise
