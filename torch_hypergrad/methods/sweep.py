"""The sweep: from the validation loss back over what a history kept of the training steps."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch

from ..ground.vectors import norm
from ..history.base import History
from ..step.problem import Problem
from ..step.second_order import SecondOrder, ways
from ..step.state import State, Step
from ..tune.hypergradient import Hypergradient
from .base import Statistics, Validate, Window, refuse_note


class SweepWindow(Window):
    """A history, and the sweep over it.

    Args:
        owner: the name of the method, for messages.
    """

    def __init__(self, problem: Problem, owner: str, history: History, second_order: SecondOrder) -> None:
        self._problem, self._owner, self._history = problem, owner, history
        self._ways = ways(problem.transition.gradient, second_order)
        self._kernels = partial(  # chosen once for a whole sweep
            problem.transition.gradient.kernels, twice_differentiable=second_order != "finite_difference"
        )

    def take(self, step: Step, state: State | None) -> tuple[Step, State]:
        assert state is not None
        return self._history.take(step, state)

    def note(self, step: Step) -> None:
        refuse_note(self._owner)

    def steps(self) -> Iterable[Step]:
        return self._history.steps()

    def clear(self) -> None:
        self._history.clear()

    def state_dict(self) -> dict[str, Any]:
        return self._history.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._history.load_state_dict(saved)

    def hypergradient(self, validate: Validate) -> tuple[Hypergradient, Statistics]:
        total, validation = Hypergradient(self._problem.hyperparameters), validate()
        adjoint = self._problem.adjoint(validation)
        lengths = [norm(adjoint.params)]
        way, error = self._ways(), None
        with self._kernels():
            num_before = self._history.num_visits() - 1
            for linearization, number in zip(self._history.backward(way), range(num_before, -1, -1)):
                if number == 0:
                    linearization.pull_hyperparameters(adjoint, total)
                    error = error if linearization.error is None else linearization.error
                    break
                adjoint = linearization.pull(adjoint, total)
                lengths.append(norm(adjoint.params))
                error = linearization.error
        total.scale(self._history.num_steps_per_visit())
        self._problem.objective.add_direct(validation, total)
        last, largest = lengths[0], torch.stack(lengths).max()
        growth = torch.where(last > 0, largest / last, torch.ones_like(last))
        return total, Statistics(product_error=error, adjoint_growth=growth)
