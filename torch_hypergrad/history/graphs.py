"""Graphs that are kept, so that their steps need not be computed again."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Iterator
from typing import Any

from torch import Tensor

from ..ground.autodiff import num_nodes, weighing
from ..step.batch import watched
from ..step.second_order import Way
from ..step.state import State, Step
from ..step.transition import Linearization, Transition
from .base import History
from .snapshots import Snapshots


class Shelf(ABC):
    """The graphs that are kept, by the numbers of their steps, and whether there is a place for more.

    Args:
        max_age: only those of the last so many steps; None for all.
    """

    def __init__(self, max_age: int | None) -> None:
        self.graphs: dict[int, Linearization] = {}
        self._max_age = max_age

    def has_place_for(self, number: int) -> bool:
        """Whether step ``number``, taken now, may leave its graph. One that is too old then is given up."""
        if self._max_age is not None:
            self.pop(number - self._max_age)
        return self._has_place()

    @abstractmethod
    def _has_place(self) -> bool: ...

    @abstractmethod
    def take(self, transition: Transition, step: Step, state: State) -> tuple[Step, State, State] | None:
        """Takes a step with its graph, and keeps that if there is a place for it: the step, the state after
        it, and what its pull reads of the state before. None if the step could not be taken so, and was
        not."""

    def pop(self, number: int) -> Linearization | None:
        """Takes a graph off the shelf."""
        return self.graphs.pop(number, None)

    def clear(self) -> None:
        """Takes all off."""
        for number in list(self.graphs):
            self.pop(number)


class Newest(Shelf):
    """All of the last so many."""

    def _has_place(self) -> bool:
        return True

    def take(self, transition: Transition, step: Step, state: State) -> tuple[Step, State, State]:
        step, after, graph = transition.linearize_taken(step, state)
        self.graphs[step.number] = graph
        return step, after, graph.state


class Within(Shelf):
    """As many as fit, of the last so many; none once a window turns out to be more than twice as long as
    that, nor in the next one, as most graphs would be made for nothing.

    One graph of each kind of step is weighed. A step of a kind that is seen for the first time is weighed if
    the step before was of such a kind too; else its graph is not kept.

    Args:
        budget: in bytes, of what graphs hold besides states and batches.
        with_light: keep graphs that weigh no more than the state they begin at, whatever the budget.
    """

    def __init__(self, budget: int, *, with_light: bool, max_age: int | None) -> None:
        super().__init__(max_age)
        self._budget, self._with_light = budget, with_light
        self._weights: dict[Hashable, int] = {}
        self._held: dict[int, int] = {}
        self._total = self._light = 0
        self._is_new, self._can_weigh = True, True
        self._num_steps, self._is_long = 0, False

    def _has_place(self) -> bool:
        self._num_steps += 1
        self._is_long = self._is_long or self._turns_long()
        can_fit = self._is_new or self._fits(max(self._weights.values()))
        return can_fit and self._can_weigh and not self._is_long

    def _fits(self, weight: int) -> bool:
        return weight <= self._light or self._total + weight <= self._budget

    def take(self, transition: Transition, step: Step, state: State) -> tuple[Step, State, State] | None:
        before, weight = num_nodes(), None
        if not self._is_new:
            step, after, graph = transition.linearize_taken(step, state)
        elif (weighed := self._weighed(transition, step, state)) is None:
            return None
        else:
            step, after, graph, weight = weighed
        kind = num_nodes() - before, *(tensor.shape for tensor in watched(step.batch))
        self._is_new = kind not in self._weights
        weight = self._weights.get(kind) if weight is None else self._weights.setdefault(kind, weight)
        if weight is not None and self._fits(weight):
            self.graphs[step.number], self._held[step.number] = graph, weight
            self._total += weight
        return step, after, graph.state

    def _weighed(
        self, transition: Transition, step: Step, state: State
    ) -> tuple[Step, State, Linearization, int] | None:
        """Takes the step, and weighs its graph; None if that cannot be weighed."""
        live = transition.gradient.live
        try:
            with (
                live.undone_on_error(step, state.buffers),
                weighing(_known(transition, step, state)) as weigh,
            ):
                step, after, graph = transition.linearize_taken(step, state)
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error):
                raise
            self._can_weigh = False  # torch.func goes with none
            return None
        if self._with_light:
            self._light = graph.state.nbytes()
        return step, after, graph, weigh() + sum(g.nbytes for g in graph.gradient())

    def _turns_long(self) -> bool:
        return self._max_age is not None and self._num_steps > 2 * self._max_age

    def clear(self) -> None:
        super().clear()
        self._is_long, self._num_steps = self._turns_long(), 0

    def pop(self, number: int) -> Linearization | None:
        self._total -= self._held.pop(number, 0)
        return super().pop(number)


class KeptGraphs(History):
    """The derivatives of steps with their graphs, as far as there is a place for them, over snapshots for the
    other steps and for another sweep."""

    def __init__(self, transition: Transition, snapshots: Snapshots, shelf: Shelf) -> None:
        self._transition, self._snapshots, self._shelf = transition, snapshots, shelf

    def take(self, step: Step, state: State) -> tuple[Step, State]:
        """Takes a step, with its graph where there is a place for it."""
        has_place = self._shelf.has_place_for(step.number)
        found = self._shelf.take(self._transition, step, state) if has_place else None
        if found is None:
            return self._snapshots.take(step, state)
        step, after, to_pull = found
        self._snapshots.record(step, state, to_pull=to_pull)
        return step, after

    def steps(self) -> Iterator[Step]:
        return self._snapshots.steps()

    def num_visits(self) -> int:
        return self._snapshots.num_visits()

    def num_steps_per_visit(self) -> float:
        return 1

    def backward(self, way: Way) -> Iterator[Linearization]:
        """Kept graphs are gone through once."""
        for step, state, _ in self._snapshots.visits():
            graph = self._shelf.pop(step.number)
            if graph is not None:
                self._transition.gradient.check_batch(step)
            yield graph or self._transition.linearize(step, state, way)

    def clear(self) -> None:
        self._snapshots.clear()
        self._shelf.clear()

    def state_dict(self) -> dict[str, Any]:
        return self._snapshots.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.clear()
        self._snapshots.load_state_dict(saved)


def _known(transition: Transition, step: Step, state: State) -> Iterator[Tensor]:
    """What is there whether a step leaves its graph or not."""
    yield from state.params
    yield from transition.gradient.live.model.memory()
    yield from (tensor for tensor in watched(step.batch) if isinstance(tensor, Tensor))
