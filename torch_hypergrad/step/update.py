"""The second stage of a training step: the update rule, on every part of the state that has a gradient."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from ..ground import autodiff
from ..ground.buckets import Bucket
from ..tune.hypergradient import Hypergradient
from ..tune.hyperparameter_set import HyperparameterSet
from ..tune.tuned import TunedSetting, write_setting
from ..updates import UpdateRule
from ..updates.base import Pulled
from .state import Part, PerParameter, State, Step

Tuned: TypeAlias = Mapping[TunedSetting, Tensor]


class UpdateStage:
    """An update rule with the tuned settings in their places.

    Args:
        bucket_of: the bucket of some parameters.
    """

    def __init__(
        self,
        rule: UpdateRule,
        hyperparameters: HyperparameterSet,
        bucket_of: Callable[[Sequence[int]], Bucket],
    ) -> None:
        self.rule, self.hyperparameters, self._bucket_of = rule, hyperparameters, bucket_of
        self._settings: dict[Bucket, tuple[Mapping[str, Any], list[Tensor], dict[str, Any]]] = {}
        self._reads: dict[Bucket, tuple[Mapping[str, Any], Collection[str] | None]] = {}

    def refined(self, state: State, active: Sequence[bool]) -> State:
        """``state`` with every part wholly with or wholly without gradients."""
        return state.refined(active, self._bucket_of)

    def tuned(self, bucket: Bucket) -> list[TunedSetting]:
        """The tuned settings of a bucket's group."""
        return self.hyperparameters.of_group[bucket.group]

    def leaves(self, bucket: Bucket, number: int) -> dict[TunedSetting, Tensor]:
        """What the rule gets for them at step ``number``, to differentiate with respect to."""
        return {setting: autodiff.leaf(setting.for_bucket(bucket, number)) for setting in self.tuned(bucket)}

    def settings(self, bucket: Bucket, step: Step, tuned: Tuned | None = None) -> dict[str, Any]:
        """The settings of a bucket at a step, with the tuned ones in their place (or those given as
        ``tuned``): the same mapping as long as nothing has changed."""
        given = step.settings[bucket.group]
        values = [
            setting.for_bucket(bucket, step.number) if tuned is None else tuned[setting]
            for setting in self.tuned(bucket)
        ]
        before = self._settings.get(bucket)
        if before is not None and before[0] is given and all(a is b for a, b in zip(before[1], values)):
            return before[2]
        settings = dict(given)
        for setting, value in zip(self.tuned(bucket), values):
            factor = setting.factor(given)
            write_setting(settings, setting.spec.name, value if factor == 1.0 else value * factor)
        self._settings[bucket] = given, values, settings
        return settings

    def reads(self, bucket: Bucket, step: Step, name: str) -> bool:
        """Whether :meth:`pull` reads the values of ``"grad"``, or of an entry of the rule's state."""
        settings, names = self._reads.get(bucket, (None, None))
        if settings is not step.settings[bucket.group]:
            settings = step.settings[bucket.group]
            names = (
                None if self.rule.pull_reads is None else self.rule.pull_reads(self.settings(bucket, step))
            )
            self._reads[bucket] = settings, names
        return names is None or name in names

    def to_pull(self, state: State, step: Step) -> State:
        """What :meth:`pull` reads of the state before a step."""
        return state.without(lambda bucket, key: not self.reads(bucket, step, key))

    def apply(self, state: State, grads: PerParameter, step: Step) -> State:
        """The state after the update. Buffers are left out."""
        with torch.no_grad():
            return State(
                tuple(self._applied(part, grads, step) for part in self.refined(state, _active(grads)).parts)
            )

    def _applied(self, part: Part, grads: PerParameter, step: Step) -> Part:
        bucket, param, rule_state = part
        if grads[bucket.indices[0]] is None:
            return part
        return Part(
            bucket, *self.rule.update(param, bucket.gather(grads), rule_state, self.settings(bucket, step))
        )

    def pull(
        self, state: State, grads: PerParameter, step: Step, adjoint: State, into: Hypergradient
    ) -> tuple[State, list[Tensor | None]]:
        """Vector-Jacobian products of the update alone: from the adjoint of the state after it to that of the
        refined ``state`` before it, without buffers, and of the gradients; what goes to tuned settings is
        added to ``into``.

        What is returned may share memory with ``adjoint``.
        """
        parts, adj_grads = [], dict[int, Tensor]()
        for part, adj in zip(state.parts, adjoint.parts):
            if step.active[part.bucket.indices[0]]:
                bucket = part.bucket
                grad = bucket.gather(grads) if self.reads(bucket, step, "grad") else bucket.unread
                pulled, by_setting = self._pulled(part, grad, step, adj)
                for setting, found in by_setting.items():
                    into.add_setting(setting, found, part.bucket, step.number)
                if pulled.grad is not None:
                    adj_grads.update(part.bucket.scatter(pulled.grad))
                adj = Part(part.bucket, pulled.param, dict(pulled.state))
            parts.append(adj)
        return State(tuple(parts)), [adj_grads.get(i) for i in range(len(grads))]

    def _pulled(self, part: Part, grad: Tensor, step: Step, adj: Part) -> tuple[Pulled, Tuned]:
        """By the rule's own formula where it has one for what is tuned, else by autograd."""
        bucket, param, rule_state = part
        tuned = self.tuned(bucket)
        if self.rule.pull is not None:
            with torch.no_grad():
                settings = self.settings(bucket, step)
                pulled = self.rule.pull(param, grad, rule_state, settings, adj.param, adj.rule_state)
                if pulled is not None and all(setting.spec.name in pulled.settings for setting in tuned):
                    factors = {setting: setting.factor(step.settings[bucket.group]) for setting in tuned}
                    return pulled, {s: pulled.settings[s.spec.name] * factor for s, factor in factors.items()}
        if any(value is bucket.unread for value in (grad, *rule_state.values())):
            raise ValueError(
                "The optimizer's update rule is registered with pull_reads, which left out vectors of "
                f"training step {step.number + 1}, but its pull gave None, or no adjoint of a tuned setting, "
                "so that autograd has to read them. Let pull_reads give None for settings that pull does not "
                "cover."
            )
        traced = _TracedUpdate(self, part, grad, step)
        found = autodiff.gradients(
            [traced.new_param, *(traced.new_state[key] for key in adj.rule_state)],
            traced.inputs(),
            [adj.param, *adj.rule_state.values()],
        )
        adj_param = torch.zeros_like(adj.param) if found[0] is None else found[0]
        by_state = {key: part for key, part in zip(traced.state, found[2:]) if part is not None}
        by_setting = {
            s: part for s, part in zip(traced.tuned, found[2 + len(traced.state) :]) if part is not None
        }
        return Pulled(adj_param, found[1], by_state, {}), by_setting

    def pusher(
        self, state: State, grads: PerParameter, step: Step
    ) -> Callable[[State, PerParameter, Mapping[TunedSetting, Tensor]], State]:
        """The update from tangents of the refined ``state``, of the gradients, and of the values of tuned
        settings, to those of the state after it."""
        pushes = [self._push_of(part, grads, step) for part in state.parts]

        def push(tangent: State, tan_grads: PerParameter, tan_values: Mapping[TunedSetting, Tensor]) -> State:
            parts = [push(part, tan_grads, tan_values) for push, part in zip(pushes, tangent.parts)]
            return replace(tangent, parts=tuple(parts))

        return push

    def _push_of(
        self, part: Part, grads: PerParameter, step: Step
    ) -> Callable[[Part, PerParameter, Mapping[TunedSetting, Tensor]], Part]:
        bucket = part.bucket
        if grads[bucket.indices[0]] is None:
            return lambda tangent, tan_grads, tan_values: tangent
        traced = _TracedUpdate(self, part, bucket.gather(grads), step)
        new_state = {key: value for key, value in traced.new_state.items() if autodiff.is_float(value)}
        push = autodiff.linearized([traced.new_param, *new_state.values()], traced.inputs())

        def push_part(
            tangent: Part, tan_grads: PerParameter, tan_values: Mapping[TunedSetting, Tensor]
        ) -> Part:
            tan_tuned = [
                s.lay_out(tan_values[s], bucket, step.number).to(value.dtype) if s in tan_values else None
                for s, value in traced.tuned.items()
            ]
            tan_state = [tangent.rule_state.get(key) for key in traced.state]
            tan_param, *rest = push([tangent.param, bucket.gather(tan_grads), *tan_state, *tan_tuned])
            return Part(bucket, tan_param, dict(zip(new_state, rest)))

        return push_part


class _TracedUpdate:
    """The update rule on one part, with a graph from its inputs, which are leaves, to its outputs."""

    def __init__(self, stage: UpdateStage, part: Part, grad: Tensor, step: Step) -> None:
        self.param, self.grad = autodiff.leaf(part.param), autodiff.leaf(grad)
        self.state = {k: autodiff.leaf(v) for k, v in part.rule_state.items() if autodiff.is_float(v)}
        self.tuned = stage.leaves(part.bucket, step.number)
        settings = stage.settings(part.bucket, step, self.tuned)
        with torch.enable_grad():
            state = {**part.rule_state, **self.state}
            self.new_param, self.new_state = stage.rule.update(self.param, self.grad, state, settings)

    def inputs(self) -> list[Tensor]:
        return [self.param, self.grad, *self.state.values(), *self.tuned.values()]


def _active(grads: PerParameter) -> list[bool]:
    return [g is not None for g in grads]
