"""Training and validation, as a method sees them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..device.capture import Recorder
from ..device.readings import Readings
from ..tune.hyperparameter_set import HyperparameterSet
from .gradient import GradientStage
from .live import Live
from .live_model import LiveModel
from .live_optimizer import LiveOptimizer
from .running import RunningBuffers
from .state import Part, State
from .transition import Transition
from .update import UpdateStage
from .user_functions import GradTransform, Loss
from .validation import Objective, Validation


@dataclass(frozen=True)
class Problem:
    """What is trained, tuned and validated.

    Args:
        live: the model and the wrapped optimizer, as they stand.
        transition: a training step.
        objective: the validation loss.
        hyperparameters: what is tuned.
        readings: where numbers are asked for that decide whether a hypergradient is right.
    """

    live: Live
    transition: Transition
    objective: Objective
    hyperparameters: HyperparameterSet
    readings: Readings

    @property
    def records(self) -> bool:
        """Whether work on the device is recorded, to be replayed."""
        return self.transition.gradient.recorder is not None

    def adjoint(self, validation: Validation) -> State:
        """The adjoint of the current state, with which a sweep begins."""
        grads = self.full(validation.grads)
        parts = tuple(Part(bucket, bucket.gather(grads), {}) for bucket in self.live.optimizer.buckets)
        return State(parts, validation.buffers)

    def full(self, tensors: list[Tensor | None]) -> list[Tensor]:
        """One tensor for each parameter, zeros for None."""
        return [torch.zeros_like(p) if t is None else t for p, t in zip(self.live.params, tensors)]


def make_problem(
    model: LiveModel,
    optimizer: LiveOptimizer,
    hyperparameters: HyperparameterSet,
    train_loss: Loss,
    val_loss: Loss,
    grad_transform: GradTransform | None,
    recorder: Recorder | None,
    *,
    twice_differentiable: bool,
) -> Problem:
    """Puts the stages together; the arguments are theirs."""
    readings, live = Readings(), Live(model, optimizer)
    running = RunningBuffers(model, readings)
    gradient = GradientStage(
        live,
        train_loss,
        grad_transform,
        hyperparameters.loss_tensors,
        running,
        readings,
        recorder,
        twice_differentiable=twice_differentiable,
    )
    transition = Transition(gradient, UpdateStage(optimizer.rule, hyperparameters, optimizer.bucket))
    return Problem(
        live, transition, Objective(live, val_loss, hyperparameters, running), hyperparameters, readings
    )
