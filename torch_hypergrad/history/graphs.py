"""Graphs that are kept, so that their steps need not be computed again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ..step.second_order import Way
from ..step.state import State, Step
from ..step.transition import Linearization, Transition
from .base import History
from .snapshots import Snapshots


class KeptGraphs(History):
    """The derivatives of the last steps with their graphs, over snapshots for the steps before and for
    another sweep.

    Args:
        max_graphs: at most so many.
    """

    def __init__(self, transition: Transition, snapshots: Snapshots, max_graphs: int) -> None:
        self._transition, self._snapshots, self._max_graphs = transition, snapshots, max_graphs
        self._graphs: dict[int, Linearization] = {}

    def take(self, step: Step, state: State) -> tuple[Step, State]:
        """Takes a step and keeps its graph in place of an older one."""
        step, after, graph = self._transition.linearize_taken(step, state)
        self._snapshots.record(step, state)
        self._graphs.pop(step.number - self._max_graphs, None)
        self._graphs[step.number] = graph
        return step, after

    def steps(self) -> Iterator[Step]:
        return self._snapshots.steps()

    def backward(self, way: Way) -> Iterator[Linearization]:
        """Kept graphs are gone through once."""
        for step, state, _ in self._snapshots.visits():
            graph = self._graphs.pop(step.number, None)
            if graph is not None:
                self._transition.gradient.check_batch(step)
            yield graph or self._transition.linearize(step, state, way)

    def clear(self) -> None:
        self._snapshots.clear()
        self._graphs.clear()

    def state_dict(self) -> dict[str, Any]:
        return self._snapshots.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.clear()
        self._snapshots.load_state_dict(saved)
