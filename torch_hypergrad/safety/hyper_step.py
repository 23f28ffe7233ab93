"""One hyper step: how the values move, what must hold of its numbers, and what it reports."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..device.readings import Reading, Readings
from ..errors import NonFiniteError, TrajectoryError
from ..methods import Method, Statistics
from ..step.problem import Problem
from ..step.state import State, Step
from ..step.validation import Batches, Validation
from ..tune.adaptive_step import AdaptiveStep
from ..tune.hyperparameter_set import HyperparameterSet
from ..tune.tuned import TunedSetting, TunedTensor
from .trust import warnings_of
from .watch import Watch


@dataclass(frozen=True)
class Evaluation:
    """The validation loss and its derivative.

    Args:
        val_loss: the validation loss.
        hypergradient: its derivative with respect to the values, with the names and shapes of ``values()``.
        num_matvecs: products that the solver of an implicit method took; None for other methods.
        residual: its relative residual, damping included; None for other methods and for :class:`Identity`.
        product_error: estimated relative error of products with second derivatives; None where these are
            exact.
        adjoint_growth: how much the adjoint of the parameters grew over the sweep, at most; None for other
            methods than :class:`Unrolled`.
        warnings: why the hypergradient should not be trusted, in sentences; empty if nothing speaks against
            it.
    """

    val_loss: float
    hypergradient: dict[str, Tensor]
    num_matvecs: int | None = None
    residual: float | None = None
    product_error: float | None = None
    adjoint_growth: float | None = None
    warnings: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class HyperReport:
    """What one hyper step did.

    Args:
        val_loss: the validation loss before the step.
        hypergradient_norm: Euclidean norm of the hypergradient with respect to the values.
        num_matvecs: products that the solver of an implicit method took; None for other methods.
        residual: its relative residual, damping included; None for other methods and for :class:`Identity`.
        product_error: estimated relative error of products with second derivatives; None where these are
            exact.
        adjoint_growth: how much the adjoint of the parameters grew over the sweep, at most; None for other
            methods than :class:`Unrolled`.
        constants: buffers that the window's steps moved and the hypergradient takes for constants: all but
            running statistics and those that :func:`register_buffers` knows of.
        clipped: for each setting that was projected onto a bound, how many of its values were.
        warnings: why the hypergradient should not be trusted, in sentences; empty if nothing speaks against
            it.
    """

    val_loss: float
    hypergradient_norm: float
    num_matvecs: int | None = None
    residual: float | None = None
    product_error: float | None = None
    adjoint_growth: float | None = None
    constants: list[str] = field(default_factory=list)
    clipped: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)


@contextmanager
def put_back_on_error(problem: Problem, hyper_optimizer: Optimizer, watch: Watch) -> Iterator[None]:
    """Puts values, the state of the hyper optimizer and random number generators back if the block fails."""
    hyperparameters, surroundings = problem.hyperparameters, problem.live.model.surroundings()
    leaves = [tuned.leaf.detach().clone() for tuned in hyperparameters.all]
    before = copy.deepcopy(hyper_optimizer.state_dict())
    try:
        yield
    except BaseException:
        hyper_optimizer.zero_grad()
        for tuned, leaf in zip(hyperparameters.all, leaves):
            tuned.set_leaf(leaf)
        hyper_optimizer.load_state_dict(before)
        problem.live.model.set_surroundings(surroundings)
        watch.hyperparameters_restored()
        raise


def move_values(
    hyperparameters: HyperparameterSet,
    hyper_optimizer: Optimizer,
    gradients: Sequence[Tensor],
    val_loss: Callable[[], float],
    asked: Readings,
    rtol: float | None = None,
) -> dict[str, Reading[float]]:
    """One step of the hyper optimizer and the projection: for each hyperparameter, how many values were
    clipped. An optimizer that follows the validation loss waits for it, and is told its tolerance.

    Raises:
        NonFiniteError: once the readings are read, if a value is not finite.
    """
    for tuned, gradient in zip(hyperparameters.all, gradients):
        tuned.set_leaf_gradient(gradient)
    if isinstance(hyper_optimizer, AdaptiveStep):
        asked.read()
        hyper_optimizer.step(val_loss, tolerance=0.0 if rtol is None else rtol)
    else:
        hyper_optimizer.step()
    hyper_optimizer.zero_grad()
    clipped = {
        tuned.label: asked.ask([tuned.project()], lambda counts: counts[0]) for tuned in hyperparameters.all
    }
    for tuned in hyperparameters.all:
        asked.ask([tuned.values().isfinite().all()], partial(_check_moved, tuned))
    return clipped


def check_recorded(steps: Sequence[Step], asked: Readings) -> None:
    """Refuses a window without steps, or with a training loss that is not finite.

    Raises:
        TrajectoryError, NonFiniteError: the latter once the readings are read.
    """
    if not steps:
        raise TrajectoryError(
            "There are no training steps to differentiate: none was taken since this HyperOptimizer was "
            "made, restarted or took its last hyper step. Call step(batch) first."
        )
    losses = [step.loss for step in steps if step.loss is not None]
    asked.ask(losses, partial(check_losses, [step for step in steps if step.loss is not None]))


def check_losses(steps: Sequence[Step], losses: Sequence[float]) -> None:
    """Refuses the first step whose training loss is not finite."""
    for step, loss in zip(steps, losses):
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"The training loss was {loss} at training step {step.number + 1}, so the steps after it "
                "have no derivative. Lower the learning rate, clip gradients with grad_transform, or "
                "restart(). Nothing was changed."
            )


def finite_validation_loss(losses: Sequence[float]) -> float:
    """The validation loss."""
    if not math.isfinite(losses[0]):
        raise NonFiniteError(
            f"The validation loss is {losses[0]} at the current weights, so it has no hypergradient. Weights "
            "that have diverged need a lower learning rate; check the validation batch too. Nothing was "
            "changed."
        )
    return losses[0]


def finite_norm(
    hyperparameters: HyperparameterSet, gradients: Sequence[Tensor], squares: Sequence[float]
) -> float:
    """The norm of the hypergradient, from those of its parts."""
    norm = math.sqrt(sum(squares))
    if not math.isfinite(norm):
        bad = [n for n, g in hyperparameters.named(gradients).items() if not g.isfinite().all()]
        raise NonFiniteError(
            f"The hypergradient of {', '.join(bad[:3])} is not finite, though every loss was. Adjoints that "
            "grow over the window overflow: shorten it with Unrolled(truncation=...), lower the learning "
            "rate, or raise the optimizer's eps. Nothing was changed."
        )
    return norm


def _check_moved(tuned: TunedSetting | TunedTensor, finite: Sequence[float]) -> None:
    if not finite[0]:
        values = tuned.values()
        raise NonFiniteError(
            f"The hyper step moved {tuned.label!r} to {values[~values.isfinite()][0].item()}. Lower the "
            "learning rate of the hyper_optimizer, or bound the value with low= and high=. Nothing was "
            "changed."
        )


def asked_statistics(statistics: Statistics, readings: Readings) -> dict[str, Any]:
    """A method's statistics by name, with readings in the place of tensors."""
    return {
        name: readings.ask([value], lambda numbers: numbers[0]) if isinstance(value, Tensor) else value
        for name, value in vars(statistics).items()
    }


def read_statistics(asked: dict[str, Any], params: Sequence[Tensor], method: Method) -> dict[str, Any]:
    """A method's statistics as numbers, now that they have been read, and the warnings that follow."""
    found = Statistics(**{name: n.value if isinstance(n, Reading) else n for name, n in asked.items()})
    return {**vars(found), "warnings": [*method.warnings, *warnings_of(found, params)]}


def num_clipped(clipped: dict[str, Reading[float]]) -> dict[str, int]:
    """How many values of each hyperparameter were clipped, where any were."""
    return {label: int(count.value) for label, count in clipped.items() if count.value}


class AskedValidation:
    """The validation loss, as a method asks for it: the loss at the current state must be finite, and is
    reported."""

    def __init__(self, problem: Problem, batches: Batches, rtol: float | None) -> None:
        self._problem, self._batches, self.rtol = problem, batches, rtol
        self._loss: Reading[float] | None = None

    def __call__(self, state: State | None = None) -> Validation:
        validation = self._problem.objective.at(self._batches, state)
        if state is None:
            self._loss = self._problem.readings.ask([validation.loss], finite_validation_loss)
        return validation

    def value(self) -> float:
        """The loss at the current state, now that it has been read."""
        assert self._loss is not None
        return self._loss.value
