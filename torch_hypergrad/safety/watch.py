"""Notices what somebody else writes in the middle of a recorded window."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import zip_longest

from torch import Tensor

from ..device import readings
from ..device.readings import Readings
from ..errors import TrajectoryError
from ..step.problem import Problem
from ..step.state import State, Step, differ, differs


class Watch:
    """Compares parameters, optimizer state and hyperparameters with what the last step left.

    Version counters show ordinary writes at once. Writes through ``.data`` leave no trace but the values,
    which are compared too: on a CPU at once, elsewhere at the hyper step, so that no step waits for the
    device.
    """

    def __init__(self, problem: Problem) -> None:
        self._live, self._hyperparameters = problem.live, problem.hyperparameters
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
        name = self._live.model.changed()
        if name is not None:
            raise TrajectoryError(tampering(f"the parameter {name!r}", number))
        for tuned, version in zip(self._hyperparameters.all, self._versions):
            if tuned.held._version != version:
                raise TrajectoryError(tampering(f"the hyperparameter {tuned.label!r}", number))

    def compare(self, state: State, number: int) -> Tensor | None:
        """Whether the values of the parameters are others than those written; None if nothing was written.

        Raises:
            TrajectoryError: if the optimizer's state is another one, or the values are known to be others.
        """
        if self._written is None:
            return None
        rule_states = ([part.rule_state for part in s.parts] for s in (state, self._written))
        if not all(a is b for a, b in zip_longest(*rule_states)):
            raise TrajectoryError(tampering("the optimizer's state", number))
        if all(a is b for a, b in zip(state.params, self._written.params)):
            return None
        tampered = differs(state, self._written)
        if readings.at_once(tampered) and bool(tampered):
            raise TrajectoryError(tampering("a parameter", number))
        return tampered

    def check_values(self, steps: Sequence[Step], number: int, asked: Readings) -> None:
        """As :meth:`check`, by values: those found at ``steps``, and those that are there before step
        ``number``."""
        flags = [(step.number, step.tampered) for step in steps if step.tampered is not None]
        tampered = self.compare(self._live.state(), number)
        if tampered is not None:
            flags.append((number, tampered))
        if flags:
            asked.ask([flag for _, flag in flags], partial(_refuse, "a parameter", [at for at, _ in flags]))
        for tuned, before in zip(self._hyperparameters.tensors, self._tensors):
            asked.ask(
                [differ(tuned.values(), before)],
                partial(_refuse, f"the hyperparameter {tuned.label!r}", [number]),
            )

    def hyperparameters_restored(self) -> None:
        """Takes the hyperparameters as they are now for unchanged: a hyper step that failed has put them
        back."""
        if self._written is not None:
            self._versions = self._hyperparameters.versions()


def _refuse(what: str, numbers: Sequence[int], flags: Sequence[float]) -> None:
    """Refuses the first step whose flag is up."""
    for number, flag in zip(numbers, flags):
        if flag:
            raise TrajectoryError(tampering(what, number))


def tampering(what: str, number: int) -> str:
    """The message."""
    return (
        f"Somebody else wrote to {what} before training step {number + 1}, in the middle of a recorded "
        "window. The recorded steps no longer lead to the current weights, so they cannot be "
        "differentiated. Do it after a hyper step or restart(), which end the window, or compute it in the "
        "training loss or grad_transform; with method=Implicit weights may be changed at any time."
    )
