"""What a history is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from ..step.second_order import Way
from ..step.state import State, Step
from ..step.transition import Linearization


class History(ABC):
    """The training steps since the last hyper step, kept so that one can go back over them."""

    @abstractmethod
    def take(self, step: Step, state: State) -> tuple[Step, State]:
        """Takes a step from ``state``, the current one, and keeps what is needed of it: the step with what
        came out of it, and the state after it."""

    @abstractmethod
    def steps(self) -> Iterator[Step]:
        """The steps that count, first step first; without batches where these were moved away."""

    @abstractmethod
    def num_visits(self) -> int:
        """How many of them :meth:`backward` goes over."""

    @abstractmethod
    def num_steps_per_visit(self) -> float:
        """How many steps each of these stands for: 1 where all are gone over."""

    @abstractmethod
    def backward(self, way: Way) -> Iterator[Linearization]:
        """The derivative of each step that counts, last step first; ``way`` is how gradients are traced where
        no graph was kept."""

    @abstractmethod
    def clear(self) -> None:
        """Forgets every step."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything but graphs, as plain containers of tensors."""

    @abstractmethod
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""
