"""Notices what somebody else writes in the middle of a recorded window."""

from __future__ import annotations

import torch
from torch import Tensor

from .errors import TrajectoryError
from .records import State
from .training import Training


class Watch:
    """Compares parameters, optimizer state and hyperparameters with what the last step left.

    Version counters show ordinary writes at once. Writes through ``.data`` leave no trace but the values, which are
    compared too: on a CPU at once, elsewhere at the hyper step, so that no step waits for the device.
    """

    def __init__(self, training: Training) -> None:
        self._training, self._hyperparameters = training, training.hyperparameters
        self.reset()

    def reset(self) -> None:
        """Begins a window: until its first step, everything may be written to."""
        self._written: State | None = None
        self._versions: list[int] = []
        self._tensors: list[Tensor] = []

    def step_written(self, state: State) -> None:
        """Takes ``state`` for what must be found next time."""
        if self._written is None:
            self._versions = self._hyperparameters.versions()
            self._tensors = [tuned.values() for tuned in self._hyperparameters.tensors]
        self._written = state

    def check(self, number: int) -> None:
        """Refuses to go on if anything was written to before step ``number``."""
        if self._written is None:
            return
        changed = self._training.changed()
        if changed is not None:
            raise TrajectoryError(tampering(changed, number))
        for tuned, version in zip(self._hyperparameters.all, self._versions):
            if tuned.leaf._version != version:
                raise TrajectoryError(tampering(f"the hyperparameter {tuned.label!r}", number))

    def compare(self, state: State, number: int) -> Tensor | None:
        """Whether the values of the parameters are others than those written; None if nothing was written."""
        if self._written is None:
            return None
        if all(a is b for a, b in zip(state.params, self._written.params)):
            return None
        tampered = differs(state, self._written)
        if tampered.device.type == "cpu" and bool(tampered):
            raise TrajectoryError(tampering("a parameter", number))
        return tampered

    def check_values(self, number: int) -> None:
        """As :meth:`check`, by values. Waits for the device."""
        tampered = self.compare(self._training.capture(), number)
        if tampered is not None and bool(tampered):
            raise TrajectoryError(tampering("a parameter", number))
        for tuned, before in zip(self._hyperparameters.tensors, self._tensors):
            if not torch.equal(tuned.values(), before):
                raise TrajectoryError(tampering(f"the hyperparameter {tuned.label!r}", number))


def tampering(what: str, number: int) -> str:
    """The message."""
    return (
        f"Somebody else wrote to {what} before training step {number + 1}, in the middle of a recorded window. The recorded "
        "steps no longer lead to the current weights, so they cannot be differentiated. Do it after a hyper step or "
        "restart(), which end the window, or compute it in the training loss or grad_transform; with method=Implicit weights "
        "may be changed at any time."
    )


def differs(state: State, other: State) -> Tensor:
    """Whether any parameter differs, as a bool tensor; no synchronization. NaN equals NaN."""
    flags = [_differ(a, b) for a, b in zip(state.params, other.params)]
    return torch.stack([flag.to(flags[0].device) for flag in flags]).any()


def _differ(a: Tensor, b: Tensor) -> Tensor:
    if a.device.type == "cpu" and torch.equal(a, b):
        return torch.tensor(False)
    return ((a != b) & ~(a.isnan() & b.isnan())).any()
