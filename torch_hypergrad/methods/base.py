"""What a method is: options that a user chooses, and a window of the training that they apply to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, Protocol

from torch import Tensor

from ..step.problem import Problem
from ..step.state import State, Step
from ..step.validation import Validation
from ..tune.hypergradient import Hypergradient
from ..tune.hyperparameter_set import HyperparameterSet
from ..updates import UpdateRule


class Validate(Protocol):
    """The user's validation batches, as a method may ask for them."""

    @property
    def rtol(self) -> float | None:
        """The tolerance asked for, of a method that solves; None for the solver's own."""

    def __call__(self, state: State | None = None) -> Validation:
        """The validation loss and its gradients at a state; None for the current one."""


@dataclass(frozen=True)
class Statistics:
    """What a method reports about a hypergradient, in numbers that may still be on their way from the device;
    None stands for what it does not have.

    Args:
        num_matvecs: products with the Jacobian of the stationarity, those of power iterations included.
        residual: norm of ``b - A x`` over the norm of ``b``; None where it was not computed.
        product_error: estimated relative error of products by finite differences.
        adjoint_growth: largest norm of the parameters' adjoint over a sweep, over that at its end.
    """

    num_matvecs: int | None = None
    residual: float | Tensor | None = None
    product_error: float | Tensor | None = None
    adjoint_growth: float | Tensor | None = None


class Window(ABC):
    """What a method keeps of the training since the last hyper step."""

    reads_states = True
    """Whether :meth:`take` is given the state before the step; if not, the wrapped optimizer takes the step
    itself."""

    checks_parameters = True
    """Whether nobody else may write to the parameters while steps are recorded."""

    @abstractmethod
    def take(self, step: Step, state: State | None) -> tuple[Step, State | None]:
        """Takes one training step from ``state``, the current one, and notes it: the step with what came out
        of it, and the state after it, to be written to the model. Both states are None where the optimizer
        takes the step."""

    @abstractmethod
    def note(self, step: Step) -> None:
        """Notes the batch of a step that is not taken.

        Raises:
            TypeError: of a method that differentiates the steps themselves.
        """

    @abstractmethod
    def steps(self) -> Iterable[Step]:
        """The recorded steps that the hypergradient depends on."""

    @abstractmethod
    def hypergradient(self, validate: Validate) -> tuple[Hypergradient, Statistics]:
        """The derivative of the validation loss with respect to the values of each hyperparameter."""

    @abstractmethod
    def clear(self) -> None:
        """Forgets every step."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain containers of tensors."""

    @abstractmethod
    def load_state_dict(self, saved: dict[str, Any]) -> None:
        """Takes over what :meth:`state_dict` gave."""


def refuse_note(method: str) -> NoReturn:
    """Says that there is nothing to differentiate in a step that was not taken."""
    raise TypeError(
        f"{method} differentiates the training steps themselves, so a batch cannot be recorded without one. "
        "Call step(batch), or take method=Implicit(...), which needs the batch alone."
    )


class Method(ABC):
    """A way to compute hypergradients. Instances are immutable options and may be shared."""

    replays: ClassVar[bool] = True
    """Whether recorded steps are differentiated as they were taken, for which training must use the same
    kernels."""

    @property
    def warnings(self) -> Sequence[str]:
        """What is to be said with each hypergradient."""
        return ()

    def cost(self, window: int, num_values: int, num_matvecs: int | None) -> float:
        """Of a hypergradient, in training steps; counted, not timed: a replayed step is taken as 3, a product
        with the Hessian and a mixed product as 2 each, the validation gradient as 1.

        Args:
            window: training steps since the last one.
            num_values: how many values are tuned.
            num_matvecs: products, as it reported.
        """
        return 1 + 3 * window

    @property
    @abstractmethod
    def needs_second_derivatives(self) -> bool:
        """Whether the training loss must have second derivatives, by double backward or dual numbers."""

    @abstractmethod
    def check(self, hyperparameters: HyperparameterSet, rule: UpdateRule, optimizer_name: str) -> None:
        """Refuses what the method cannot do, with a ``ValueError``, when the HyperOptimizer is made."""

    @abstractmethod
    def start(self, problem: Problem) -> Window:
        """An empty window."""
