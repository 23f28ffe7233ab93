"""What ends training: errors, and Ctrl-C and SIGTERM as a request that the loop reads between two steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


class TrainingError(Exception):
    """Training cannot go on. The message is one line: what happened, why, the remedy."""


@dataclass
class StopRequest:
    """Which signal asked for a stop, if any."""

    signal: int | None = None

    @property
    def requested(self) -> bool:
        """Whether to stop after this step."""
        return self.signal is not None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While it lasts, the first SIGINT or SIGTERM is a request; a second Ctrl-C interrupts at once."""
    request = StopRequest()

    def ask(number: int, frame: FrameType | None) -> None:
        request.signal = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
