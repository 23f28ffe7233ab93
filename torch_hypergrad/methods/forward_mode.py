"""Forward mode: tangents carried along training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .. import autodiff
from ..buckets import as_list
from ..hyperparameter_set import HyperparameterSet
from ..records import State, Step
from ..training import Training, is_float
from ..trajectory import pack_state, pack_step, unpack_state, unpack_step
from ..updates import UpdateRule
from .base import Method, Recording, Statistics, Validation, add_direct


@dataclass(frozen=True)
class ForwardMode(Method):
    r"""Carries the derivative of parameters and optimizer state for every single hyperparameter along training.

    .. math:: Z_{t+1} = \partial_\theta u\, Z_t + \partial_g u\, (H_t Z_t + \partial_\lambda g_t) + \dots

    and at the end the hypergradient is :math:`Z_T^\top \nabla_\theta L_{val}`. The answer is that of
    :class:`Unrolled`. Memory does not grow with the number of steps: one copy of parameters and optimizer state for each
    single number that is tuned. Time: each step costs one Hessian-vector product for each of them, so it is for few.

    Source: Franceschi et al. 2017, section 3.2.
    """

    @property
    def needs_second_derivatives(self) -> bool:
        return True

    def check(self, hyperparameters: HyperparameterSet, rule: UpdateRule, optimizer_name: str) -> None:
        """Every hyperparameter has a tangent."""

    def start(self, training: Training) -> Recording:
        """Zero tangents."""
        return ForwardRecording(training)


@dataclass(frozen=True)
class Direction:
    """One single number that is tuned, and the derivative of the state in its direction (None: zero)."""

    tuned: int
    entry: int
    tangent: State | None = None


class ForwardRecording(Recording):
    """One tangent for each number that is tuned."""

    def __init__(self, training: Training) -> None:
        self._training = training
        self._hyperparameters = training.hyperparameters
        self.clear()

    def clear(self) -> None:
        self._steps: list[Step] = []
        self._directions = [
            Direction(j, entry) for j, tuned in enumerate(self._hyperparameters.all) for entry in range(tuned.leaf.numel())
        ]

    def steps(self) -> Iterable[Step]:
        return self._steps

    def take(self, step: Step, state: State | None) -> tuple[Step, State]:
        assert state is not None
        training = self._training
        loss, raw, _ = training.gradients(step.batch, create_graph=True)
        grads = training.transform(raw)
        step = training.finish(step, loss, grads)
        self._push(step, state, grads)
        return step, training.advance(state, grads, step)

    def _push(self, step: Step, state: State, grads: Sequence[Tensor | None]) -> None:
        """Takes every tangent through the step."""
        training, tensors = self._training, self._hyperparameters.loss_tensors
        refined = training.optimizer_state.refine(state, step.active)
        active = [i for i, g in enumerate(grads) if g is not None]
        inputs = [training.params[i] for i in active] + tensors
        push_gradient = autodiff.linearized([grads[i] for i in active], inputs)  # type: ignore[misc]
        updates = [self._linearized_update(step, refined, k, grads) for k in range(len(refined.buckets))]
        directions = []
        for direction in self._directions:
            tangent = self._zero_tangent(refined) if direction.tangent is None else direction.tangent
            tangent = training.optimizer_state.refine(tangent, step.active)
            tan_params = as_list(tangent.buckets, tangent.params, len(training.params))
            pushed = push_gradient([*(tan_params[i] for i in active), *self._unit_tensors(direction)])
            tan_grads = [dict(zip(active, pushed)).get(i) for i in range(len(training.params))]
            after = [push(direction, tangent, k, tan_grads) for k, push in enumerate(updates)]
            params, rule_states = zip(*after)
            directions.append(replace(direction, tangent=State(refined.buckets, params, rule_states, None)))
        self._directions = directions
        self._steps.append(replace(step, batch=None, versions=()))

    def _linearized_update(
        self, step: Step, state: State, k: int, grads: Sequence[Tensor | None]
    ) -> Callable[[Direction, State, int, Sequence[Tensor | None]], tuple[Tensor, dict[str, Any]]]:
        """The update rule on bucket number k, from tangents to tangents."""
        bucket = state.buckets[k]
        if grads[bucket.indices[0]] is None:
            return lambda direction, tangent, k, tan_grads: (tangent.params[k], tangent.rule_states[k])
        update = self._training.traced_update(bucket, state.params[k], grads, state.rule_states[k], step)
        new_state = {k: v for k, v in update.new_state.items() if is_float(v)}
        outputs = [update.new_param, *new_state.values()]
        inputs = [update.param, update.grad, *update.state.values(), *update.tuned.values()]
        push = autodiff.linearized(outputs, inputs)

        def push_update(
            direction: Direction, tangent: State, k: int, tan_grads: Sequence[Tensor | None]
        ) -> tuple[Tensor, dict[str, Any]]:
            own = self._hyperparameters.all[direction.tuned]
            tan_tuned = [
                setting.lay_out(self._unit(direction), bucket, step.number).to(value.dtype) if setting is own else None
                for setting, value in update.tuned.items()
            ]
            tan_state = [tangent.rule_states[k].get(key) for key in update.state]
            tan_param, *rest = push([tangent.params[k], bucket.gather(tan_grads), *tan_state, *tan_tuned])  # type: ignore[arg-type]
            return tan_param, dict(zip(new_state, rest))

        return push_update

    def _zero_tangent(self, state: State) -> State:
        zeros = tuple(torch.zeros_like(param) for param in state.params)
        return State(state.buckets, zeros, tuple({} for _ in zeros), None)

    def _unit(self, direction: Direction) -> Tensor:
        unit = torch.zeros_like(self._hyperparameters.all[direction.tuned].leaf.detach())
        unit.view(-1).narrow(0, direction.entry, 1).fill_(1)
        return unit

    def _unit_tensors(self, direction: Direction) -> list[Tensor | None]:
        """The direction as it enters the gradient through the tuned tensors."""
        first = len(self._hyperparameters.settings)
        return [
            self._unit(direction) if direction.tuned == first + j else None for j in range(len(self._hyperparameters.tensors))
        ]

    def hypergradient(self, validation: Validation) -> tuple[list[Tensor], Statistics]:
        gradients = [torch.zeros_like(tuned.leaf.detach()) for tuned in self._hyperparameters.all]
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(self._training.params, validation.grads)]
        for direction in self._directions:
            if direction.tangent is not None:
                pairs = zip(direction.tangent.buckets, direction.tangent.params)
                entry = gradients[direction.tuned].view(-1)[direction.entry]
                for bucket, tan_param in pairs:
                    entry += (bucket.gather(grads) * tan_param).sum().to(entry.device)
        return add_direct(self._hyperparameters, gradients, validation), Statistics()

    def state_dict(self) -> dict[str, Any]:
        tangents = [None if d.tangent is None else pack_state(d.tangent) for d in self._directions]
        return {"steps": [pack_step(step) for step in self._steps], "tangents": tangents}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.clear()
        self._steps = [unpack_step(step) for step in saved["steps"]]
        self._directions = [
            replace(direction, tangent=None if packed is None else unpack_state(packed, self._training))
            for direction, packed in zip(self._directions, saved["tangents"])
        ]
