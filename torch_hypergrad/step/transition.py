"""One training step as a map from state to state: its value, and its linearization."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeAlias

import torch
from torch import Tensor

from ..tune.hypergradient import Hypergradient
from ..tune.hyperparameter_set import HyperparameterSet
from ..tune.tuned import TunedSetting, TunedTensor, write_setting
from .gradient import GradientStage, LossAndGradient
from .reverse import Reverse
from .second_order import Way
from .state import State, Step
from .traced import TracedGradient
from .update import UpdateStage

Tuned: TypeAlias = "TunedSetting | TunedTensor"


@dataclass(frozen=True)
class Transition:
    """The gradient stage, then the update stage."""

    gradient: GradientStage
    update: UpdateStage

    @property
    def tensors(self) -> list[TunedTensor]:
        """The tuned tensors that the training loss reads."""
        return self.update.hyperparameters.tensors

    def take(self, step: Step, state: State, *, keep: bool = False) -> tuple[Step, State, LossAndGradient]:
        """Takes ``step`` from the current state: the step with what came out of it, the state after it, and
        the gradient before any transformation, good for nothing unless it is to be kept."""
        found = self.gradient.plain(step)
        step = taken(step, found)
        return step, self.update.apply(state, self.gradient.transform(found, keep=keep), step), found

    def apply(self, step: Step, state: State) -> State:
        """The state after a recorded step, computed again from the one before."""
        with self.gradient.live.at(state):
            found = self.gradient.revisit(step)
        after = self.update.apply(state, self.gradient.transform(found), step)
        return replace(after, buffers=self.gradient.live.model.buffers())

    def linearize(
        self, step: Step, state: State, way: Way, known: LossAndGradient | None = None
    ) -> Linearization:
        """The derivative of a recorded step at the state before it.

        Args:
            way: how the gradient is traced.
            known: the gradient before any transformation, where it was kept.
        """
        trace = partial(way, self.gradient, step, state, known=known)
        return Linearization(self, step, state, lambda with_buffers: trace(with_buffers=with_buffers))

    def linearize_taken(self, step: Step, state: State) -> tuple[Step, State, Linearization]:
        """Takes ``step`` from the current state and keeps its graph: the step with what came out of it, the
        state after it, and its derivative, which stays valid when training goes on."""
        stage, kept = self.gradient, self.update.to_pull(state, step)
        with stage.live.model.copied_buffers():
            gradient = Reverse(stage, step, kept, with_buffers=True, is_taken=True)
        step = taken(step, gradient)
        after = self.update.apply(state, gradient.grads, step)
        gradient.keep(values=any(self.update.reads(part.bucket, step, "grad") for part in state.parts))
        return step, after, Linearization(self, step, kept, lambda with_buffers: gradient)


class Linearization:
    """The derivative of one step at one state.

    Args:
        state: what the pull reads of it.
        trace: gives the gradient at the state, with or without the buffers after it.
    """

    def __init__(
        self, transition: Transition, step: Step, state: State, trace: Callable[[bool], TracedGradient]
    ) -> None:
        self._transition, self._step, self.state, self._trace = transition, step, state, trace
        self.error: Tensor | None = None
        """Estimated relative error of the products in :meth:`pull`; None if they are exact."""

    def gradient(self) -> list[Tensor]:
        """The values of the gradient, as far as they are there."""
        return [grad for grad in self._trace(True).grads if grad is not None]

    def pull(self, adjoint: State, into: Hypergradient) -> State:
        """From the adjoint of the state after the step to that of the state before it; what goes to
        hyperparameters is added to ``into``. Can be called once."""
        update, gradient = self._transition.update, self._trace(adjoint.buffers is not None)
        fine = update.refined(self.state, self._step.active)
        before, adj_grads = update.pull(fine, gradient.grads, self._step, adjoint, into)
        products = gradient.pull(adj_grads, adjoint.buffers)
        self.error = gradient.error
        into.add_tensors(products.tensors)
        before = State(before.owning_params().parts, products.buffers)
        pieces = before.per_parameter(len(products.params))
        pairs = [(p, q) for p, q in zip(pieces, products.params) if p is not None and q is not None]
        if pairs:
            # One that lies transposed is turned first: to turn and add at once takes longer.
            torch._foreach_add_([piece for piece, _ in pairs], [product.contiguous() for _, product in pairs])
        return before if fine is self.state else before.merged(self.state)

    def pull_hyperparameters(self, adjoint: State, into: Hypergradient) -> None:
        """As :meth:`pull`, where nothing counts that was before the step, and nobody asks for that adjoint.
        Nothing is differentiated twice unless the training loss reads tuned tensors."""
        update, step = self._transition.update, self._step
        if self._transition.tensors:
            self.pull(adjoint, into)
            return
        reads_grads = any(update.reads(part.bucket, step, "grad") for part in self.state.parts)
        grads = self._trace(False).grads if reads_grads else [None] * len(step.active)
        update.pull(update.refined(self.state, step.active), grads, step, adjoint, into)

    def pusher(self) -> Callable[[State, Mapping[Tuned, Tensor]], State]:
        """From a tangent of the state before the step, and one of the values of hyperparameters (zero where
        missing), to the tangent of the state after it. Exact, as often as one likes, by double backward."""
        update, gradient = self._transition.update, self._trace(True)
        assert isinstance(gradient, Reverse)
        grads, step = gradient.grads, self._step
        push_gradient, push_update = (
            gradient.pusher(),
            update.pusher(update.refined(self.state, step.active), grads, step),
        )
        tensors = self._transition.tensors

        def push(tangent: State, values: Mapping[Tuned, Tensor]) -> State:
            tangent = update.refined(tangent, step.active)
            tan_params = tangent.per_parameter(len(grads))
            tan_grads, buffers = push_gradient(tan_params, [values.get(t) for t in tensors], tangent.buffers)
            settings = {t: v for t, v in values.items() if isinstance(t, TunedSetting)}
            return replace(push_update(tangent, tan_grads, settings), buffers=buffers)

        return push


def taken(step: Step, found: LossAndGradient | TracedGradient) -> Step:
    """The step with what came out of it."""
    assert found.loss is not None
    return replace(
        step, given=None, loss=found.loss.detach(), active=tuple(g is not None for g in found.grads)
    )


def take_with_optimizer(transition: Transition, step: Step) -> Step:
    """Takes ``step`` by the wrapped optimizer itself, at its own speed; no state of it can be recorded."""
    stage, update = transition.gradient, transition.update
    optimizer, params = stage.live.optimizer.optimizer, stage.live.params
    found = stage.plain(step)
    grads = stage.transform(found)
    groups, before = optimizer.param_groups, [p.grad for p in params]
    untuned = [dict(group) for group in groups]
    stage.live.forget()
    try:
        for tuned in update.hyperparameters.settings:
            value = tuned.values().item() * tuned.factor(step.settings[tuned.group])
            write_setting(groups[tuned.group], tuned.spec.name, value)
        for p, g in zip(params, grads):
            p.grad = None if g is None else g.detach()
        optimizer.step()
    finally:
        for group, settings in zip(groups, untuned):
            group.update(settings)
        for p, g in zip(params, before):
            p.grad = g
    return taken(step, found)


def optimizer_can_step(hyperparameters: HyperparameterSet) -> bool:
    """Whether the wrapped optimizer's own ``step`` can take the tuned settings: as numbers, known without
    waiting."""
    return all(t.granularity.is_number and t.leaf.device.type == "cpu" for t in hyperparameters.settings)
