"""Training steps: taken once on the model, and taken again from any recorded state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import autodiff
from .buckets import Bucket, as_list
from .capture import Captured, recorder_for
from .errors import TrajectoryError
from .host_memory import keep_freed_memory
from .hyperparameter_set import HyperparameterSet
from .model_state import ModelState
from .optimizer_state import OptimizerState
from .records import RuleState, State, Step, TracedUpdate, versions_of
from .tuned import TunedSetting, write_setting
from .updates import UpdateRule

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
GradTransform: TypeAlias = Callable[[list[Tensor]], list[Tensor]]


class Training:
    """A model, its optimizer's update rule and its training loss, as a function from one state to the next.

    Args:
        twice_differentiable: take every step with kernels that can be differentiated twice, so that a step taken
            again has the very same gradient and the same dropout masks.
        keeps_graphs: graphs made inside :meth:`at` outlive the step, so that writing may not look like a change to autograd.
        captures: record the gradient of a step once and replay it as a whole, where that is possible.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        rule: UpdateRule,
        hyperparameters: HyperparameterSet,
        train_loss: Loss,
        grad_transform: GradTransform | None,
        names: Sequence[str],
        *,
        twice_differentiable: bool,
        keeps_graphs: bool,
        captures: bool = False,
    ) -> None:
        self.model, self.rule, self.hyperparameters = model, rule, hyperparameters
        self.train_loss, self.grad_transform = train_loss, grad_transform
        per_element = [any(t.spec.per == "element" for t in tuned) for tuned in hyperparameters.of_group]
        self.optimizer_state = OptimizerState(optimizer, rule, per_element)
        self.params = self.optimizer_state.params
        self.model_state = ModelState([model, *hyperparameters.modules], self.params, names, hyperparameters.loss_tensors)
        self._optimizer = optimizer
        keep_freed_memory()
        self._keeps_graphs = keeps_graphs
        self._twice_differentiable = twice_differentiable
        self._settings: tuple[dict[str, Any], ...] = ()
        self._written: State | None = None
        self._inspected = self._looked_at_loss = False
        self._recorder = recorder_for(self.params) if captures else None
        self.captures = self._recorder is not None
        # The training loss on a batch and its gradients, without graph, with model and generators as they stand.
        self.plain_gradients = self.captured(self._eager_gradients, "the training gradient") or self._eager_gradients

    # ---- the model and the wrapped optimizer, as they stand -------------------------------------------------------

    def capture(self) -> State:
        """The current state; what has changed since the last :meth:`write` is copied, the rest is shared."""
        held = self.optimizer_state
        if held.replaced():
            held.adopt()
        written = self._written
        if written is not None and written.buckets is held.buckets and self.model_state.holds(written.buckets, written.params):
            params = written.params
        else:
            params = tuple(bucket.gather([p.detach() for p in self.params]) for bucket in held.buckets)
        return State(held.buckets, params, held.rule_states, self.model_state.buffers())

    @contextmanager
    def at(
        self, state: State, moved_by: tuple[Sequence[Tensor | None], Tensor] | None = None, *, with_buffers: bool = True
    ) -> Iterator[None]:
        """Inside, the parameters are ``state``'s own memory, and the buffers have its values.

        Next to nothing is copied, and graphs made here stay valid when training goes on: they are gone back through
        inside another such block. Parameters must not be written to.

        Args:
            moved_by: a direction, one tensor for each parameter (None: zeros), and how far to go along it.
            with_buffers: if not, the buffers are left as they are.
        """
        values = as_list(state.buckets, state.params, len(self.params))
        if moved_by is not None:
            direction, distance = moved_by
            values = [p if v is None else torch.addcmul(p, v, distance.to(v)) for p, v in zip(values, direction)]  # type: ignore[arg-type]
        before = self.model_state.point_to(values)  # type: ignore[arg-type]
        try:
            if with_buffers and state.buffers is not None:
                self.model_state.set_buffers(state.buffers)
            yield
        finally:
            self.model_state.point_back(before)

    def load(self, state: State) -> None:
        """Puts parameters and buffers into the model."""
        self.model_state.write_params(state.buckets, state.params, counted=not self._keeps_graphs)
        if state.buffers is not None:
            self.model_state.set_buffers(state.buffers)

    def write(self, state: State) -> None:
        """Puts parameters into the model, and the rule's states into the optimizer in torch's own format."""
        self.model_state.write_params(state.buckets, state.params, counted=not self._keeps_graphs)
        self.optimizer_state.write(state.buckets, state.rule_states)
        self.model_state.mark_written()
        self._written = state

    def reset(self, state: State) -> None:
        """Makes ``state`` the current one, whatever was there before."""
        self.load(state)
        self.optimizer_state.reset(state.buckets, state.rule_states)
        self.model_state.mark_written()

    def changed(self) -> str | None:
        """What somebody else has written to since the last :meth:`write`, or None."""
        name = self.model_state.changed()
        if name is not None:
            return f"the parameter {name!r}"
        return "the optimizer's state" if self.optimizer_state.replaced() else None

    @contextmanager
    def undone_on_error(self, step: Step, buffers: Sequence[Tensor | None] | None) -> Iterator[None]:
        """Puts buffers (None: as they are now), modes and random number generators back if ``step``, just begun, fails."""
        buffers = self.model_state.buffers() if buffers is None else buffers
        try:
            yield
        except BaseException:
            self.model_state.set_buffers(buffers)
            self.model_state.set_surroundings(step.surroundings)
            raise

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Restores parameters, buffers, modes and random number generators at the end."""
        state, surroundings = self.capture(), self.model_state.surroundings()
        try:
            yield
        finally:
            self.load(state)
            self.model_state.set_surroundings(surroundings)
            self.model_state.mark_written()

    # ---- one step -------------------------------------------------------------------------------------------------

    def begin(self, number: int, batch: Any, tampered: Tensor | None) -> Step:
        """A step about to be taken; ``active`` and ``loss`` are filled in by :meth:`finish`."""
        if sum(len(group["params"]) for group in self._optimizer.param_groups) != len(self.params):
            raise ValueError(
                "The optimizer's param groups hold other parameters than when it was wrapped: a group or parameter was added "
                "after the HyperOptimizer was made. Make a new HyperOptimizer, or add the group before."
            )
        settings = tuple({k: _plain(v) for k, v in g.items() if k != "params"} for g in self._optimizer.param_groups)
        if settings != self._settings:
            self._settings = settings
        return Step(
            number, batch, versions_of(batch), self.model_state.surroundings(), self._settings, (), torch.empty(0), tampered
        )

    def finish(self, step: Step, loss: Tensor, grads: Sequence[Tensor | None]) -> Step:
        """The step with what came out of it."""
        return replace(step, loss=loss.detach(), active=tuple(g is not None for g in grads))

    def gradients(
        self, batch: Any, *, create_graph: bool = False, also: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
        """The training loss at the model's current weights, and its gradient for each parameter and each of ``also``."""
        with torch.enable_grad(), self.kernels(twice_differentiable=create_graph or self._twice_differentiable):
            with self.model_state.unwritten():
                loss = self.train_loss(self.model, batch)
            check_loss(loss, "train_loss")
            if not self._looked_at_loss:
                autodiff.refuse_reentrant_checkpoints(loss)
                self._looked_at_loss = True
            trainable = [i for i, p in enumerate(self.params) if p.requires_grad]
            # A seed that requires a gradient makes functions marked once_differentiable show in the graph, which they do
            # not when the gradient that reaches them is a constant.
            seed = torch.ones_like(loss).requires_grad_(create_graph)
            found = autodiff.gradients(
                [loss], [*(self.params[i] for i in trainable), *also], [seed], create_graph=create_graph
            )
            active = [(i, g) for i, g in zip(trainable, found) if g is not None]
            if create_graph and not self._inspected:
                autodiff.refuse_wrong_second_derivatives([g for _, g in active])
                self._inspected = True
        grads: list[Tensor | None] = [None] * len(self.params)
        for i, g in active:
            if g.layout is not torch.strided:
                raise ValueError(
                    f"The gradient of {self.model_state.names[i]!r} is sparse. Sparse gradients have no second derivative: "
                    "make the embedding with sparse=False."
                )
            grads[i] = g
        return loss, grads, found[len(trainable) :]

    def captured(self, function: Callable[[Any], Any], name: str) -> Captured | None:
        """A function of tensors and of the model, to be recorded and replayed; None where nothing is recorded."""
        if self._recorder is None:
            return None
        return Captured(function, self.model_state.memory, self.model_state.modes, self._recorder, name)

    def _eager_gradients(self, batch: Any) -> tuple[Tensor, list[Tensor | None]]:
        loss, grads, _ = self.gradients(batch)
        return loss.detach(), grads

    def transform(self, grads: Sequence[Tensor | None], *, keep: bool = False) -> list[Tensor | None]:
        """The gradients as the update rule gets them.

        Args:
            keep: ``grads`` are needed as they are, so that a transformation in place gets copies.
        """
        if self.grad_transform is None:
            return list(grads)
        with torch.enable_grad():
            given = [g.clone() if keep else g for g in grads if g is not None]
            transformed = iter(self._transformed(self.grad_transform, given))
        return [None if g is None else next(transformed) for g in grads]

    def kernels(self, *, twice_differentiable: bool) -> AbstractContextManager[None]:
        """The context to compute losses in."""
        return autodiff.differentiable_kernels(recurrent=self.model_state.recurrent) if twice_differentiable else nullcontext()

    def trainable(self) -> list[Tensor]:
        """The optimizer's parameters that require a gradient."""
        return [p for p in self.params if p.requires_grad]

    def _transformed(self, transform: GradTransform, grads: list[Tensor]) -> list[Tensor]:
        transformed = transform(list(grads))
        if not isinstance(transformed, (list, tuple)) or not all(isinstance(g, Tensor) for g in transformed):
            raise TypeError(f"grad_transform must return a list of tensors, one for each gradient, got {transformed!r}.")
        transformed = list(transformed)
        if any(g.requires_grad and not t.requires_grad for g, t in zip(grads, transformed)):
            raise ValueError(
                "grad_transform returned a gradient without a graph, so its derivative would be lost. Leave out .detach(), "
                ".data and torch.no_grad(); to switch a gradient off, multiply it by 0."
            )
        if [g.shape for g in transformed] != [g.shape for g in grads]:
            raise ValueError(
                "grad_transform must return one gradient for each it was given, in the same shapes: it was given "
                f"{[tuple(g.shape) for g in grads]} and returned {[tuple(g.shape) for g in transformed]}."
            )
        return transformed

    def revisit(
        self, step: Step, *, create_graph: bool, also: Sequence[Tensor] = ()
    ) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
        """:meth:`gradients` on a recorded step's batch, in its surroundings, at the model's current weights."""
        self.return_to(step)
        return self.gradients(step.batch, create_graph=create_graph, also=also)

    def return_to(self, step: Step) -> None:
        """Brings back a recorded step's surroundings, and refuses a batch that was changed."""
        self.check_batch(step)
        self.model_state.set_surroundings(step.surroundings)

    def check_batch(self, step: Step) -> None:
        """Refuses a step whose batch is not what it was.

        Raises:
            TrajectoryError: if so.
        """
        if versions_of(step.batch) != step.versions:
            raise TrajectoryError(
                f"A tensor in the batch of training step {step.number + 1} was changed in place after the step. The step "
                "is replayed on the recorded batch, which is kept by reference: pass a fresh tensor to each step, or a "
                "clone of a buffer that is used again."
            )

    def take(
        self, step: Step, state: State, *, keep_grads: bool = False
    ) -> tuple[Step, State, tuple[Tensor | None, ...] | None]:
        """Takes ``step`` from the current state: the step with what came out of it, the state after it, and the gradients
        before any transformation if they are to be kept."""
        loss, grads = self.plain_gradients(step.batch)
        step = self.finish(step, loss, grads)
        after = self.advance(state, self.transform(grads, keep=keep_grads), step)
        return step, after, tuple(grads) if keep_grads else None

    @property
    def optimizer_can_step(self) -> bool:
        """Whether the wrapped optimizer's own ``step`` can take the tuned settings: as numbers, known without waiting."""
        return all(tuned.spec.per == "group" and tuned.leaf.device.type == "cpu" for tuned in self.hyperparameters.settings)

    def take_with_optimizer(self, step: Step) -> Step:
        """Takes ``step`` by the wrapped optimizer itself, at its own speed; no state of it can be recorded."""
        loss, grads = self.plain_gradients(step.batch)
        grads = self.transform(grads)
        groups, before = self._optimizer.param_groups, [p.grad for p in self.params]
        untuned = [dict(group) for group in groups]
        self._written = None
        try:
            for tuned in self.hyperparameters.settings:
                value = tuned.values().item() * tuned.factor(step.settings[tuned.group])
                write_setting(groups[tuned.group], tuned.spec.name, value)
            for p, g in zip(self.params, grads):
                p.grad = None if g is None else g.detach()
            self._optimizer.step()
        finally:
            for group, settings in zip(groups, untuned):
                group.update(settings)
            for p, g in zip(self.params, before):
                p.grad = g
        return self.finish(step, loss, grads)

    def replay(self, step: Step, state: State) -> State:
        """The state after a recorded step, computed again from the one before."""
        with self.at(state):
            _, grads, _ = self.revisit(step, create_graph=False)
        return replace(self.advance(state, self.transform(grads), step), buffers=self.model_state.buffers())

    def advance(self, state: State, grads: Sequence[Tensor | None], step: Step) -> State:
        """The update rule on every bucket that has gradients. Buffers are left out."""
        state = self.optimizer_state.refine(state, [g is not None for g in grads])
        params, rule_states = [], []
        with torch.no_grad():
            for bucket, param, rule_state in zip(state.buckets, state.params, state.rule_states):
                if grads[bucket.indices[0]] is not None:
                    grad = bucket.gather(grads)  # type: ignore[arg-type]
                    param, rule_state = self.rule.update(param, grad, rule_state, self.settings(bucket, step))
                params.append(param)
                rule_states.append(rule_state)
        return State(state.buckets, tuple(params), tuple(rule_states), None)

    def traced_update(
        self, bucket: Bucket, param: Tensor, grads: Sequence[Tensor | None], rule_state: RuleState, step: Step
    ) -> TracedUpdate:
        """The update rule on one bucket as :meth:`advance` calls it, to be differentiated."""
        with torch.enable_grad():
            param, grad = autodiff.leaf(param), autodiff.leaf(bucket.gather(grads))  # type: ignore[arg-type]
            state = {k: autodiff.leaf(v) for k, v in rule_state.items() if is_float(v)}
            tuned = {
                setting: autodiff.leaf(setting.for_bucket(bucket, step.number))
                for setting in self.hyperparameters.of_group[bucket.group]
            }
            new_param, new_state = self.rule.update(param, grad, {**rule_state, **state}, self.settings(bucket, step, tuned))
        return TracedUpdate(param, grad, state, tuned, new_param, new_state)

    def settings(self, bucket: Bucket, step: Step, tuned: Mapping[TunedSetting, Tensor] | None = None) -> dict[str, Any]:
        """The settings of a bucket at a step, with the tuned ones in their place (or those given as ``tuned``)."""
        settings = dict(step.settings[bucket.group])
        for setting in self.hyperparameters.of_group[bucket.group]:
            value = setting.for_bucket(bucket, step.number) if tuned is None else tuned[setting]
            factor = setting.factor(step.settings[bucket.group])
            write_setting(settings, setting.spec.name, value if factor == 1.0 else value * factor)
        return settings


def is_float(value: Any) -> bool:
    """Whether it is something to differentiate: a tensor of a floating-point type."""
    return isinstance(value, Tensor) and value.is_floating_point()


def _plain(value: Any) -> Any:
    """A setting that cannot change later: torch takes ``lr`` as a tensor, which schedulers write in place."""
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 else value


def check_loss(loss: Any, name: str) -> None:
    """Refuses what cannot be differentiated.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if it is not a scalar, or has no graph.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{name}(model, batch) returned {type(loss).__name__}, expected a scalar tensor. Return the loss itself, "
            "not loss.item() or a tuple."
        )
    if loss.numel() != 1:
        raise ValueError(
            f"{name}(model, batch) returned a tensor of shape {tuple(loss.shape)}, expected a scalar. Reduce it with "
            ".mean() or .sum()."
        )
    if not loss.requires_grad:
        raise ValueError(
            f"{name}(model, batch) returned a tensor without a graph: nothing in it depends on a parameter that requires "
            "a gradient. Likely causes: .detach(), .item(), torch.no_grad() inside, or a model that is frozen as a whole."
        )
