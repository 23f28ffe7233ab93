"""Forward mode: tangents carried along training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..history.packing import pack_state, pack_step, unpack_state, unpack_step
from ..step.problem import Problem
from ..step.reverse import Reverse
from ..step.state import Part, State, Step
from ..step.transition import Linearization, taken
from ..tune.hypergradient import Hypergradient
from ..tune.hyperparameter_set import HyperparameterSet
from ..updates import UpdateRule
from .base import Method, Statistics, Validate, Window, refuse_note


@dataclass(frozen=True)
class ForwardMode(Method):
    r"""Carries the derivative of parameters and optimizer state for every single hyperparameter along
    training.

    .. math:: Z_{t+1} = \partial_\theta u\, Z_t + \partial_g u\, (H_t Z_t + \partial_\lambda g_t) + \dots

    and at the end the hypergradient is :math:`Z_T^\top \nabla_\theta L_{val}`. The answer is that of
    :class:`Unrolled`. Memory does not grow with the number of steps: one copy of parameters and optimizer
    state for each single number that is tuned. Time: each step costs one Hessian-vector product for each of
    them, so it is for few.

    Source: Franceschi et al. 2017, section 3.2.
    """

    @property
    def needs_second_derivatives(self) -> bool:
        return True

    def check(self, hyperparameters: HyperparameterSet, rule: UpdateRule, optimizer_name: str) -> None:
        """Every hyperparameter has a tangent."""

    def cost(self, window: int, num_values: int, num_matvecs: int | None) -> float:
        return 1 + 2 * window * num_values

    def start(self, problem: Problem) -> Window:
        """Zero tangents."""
        return ForwardWindow(problem)


@dataclass(frozen=True)
class Direction:
    """One single number that is tuned, and the derivative of the state in its direction (None: zero)."""

    tuned: int
    entry: int
    tangent: State | None = None


class ForwardWindow(Window):
    """One tangent for each number that is tuned."""

    def __init__(self, problem: Problem) -> None:
        self._problem, self._all = problem, problem.hyperparameters.all
        self.clear()

    def clear(self) -> None:
        self._steps: list[Step] = []
        sizes = [tuned.leaf.numel() for tuned in self._all]
        self._directions = [Direction(j, entry) for j, size in enumerate(sizes) for entry in range(size)]

    def note(self, step: Step) -> None:
        refuse_note("ForwardMode")

    def steps(self) -> Iterable[Step]:
        return self._steps

    def take(self, step: Step, state: State | None) -> tuple[Step, State]:
        assert state is not None
        transition, live = self._problem.transition, self._problem.live
        zero = State(tuple(Part(bucket, torch.zeros_like(param), {}) for bucket, param, _ in state.parts))
        with live.standing(state):
            traced = Reverse(transition.gradient, step, state, with_buffers=True, is_taken=True)
            step = taken(step, traced)
            push = Linearization(transition, step, state, lambda with_buffers: traced).pusher()
            self._directions = [
                replace(d, tangent=push(d.tangent or zero, {self._all[d.tuned]: self._unit(d)}))
                for d in self._directions
            ]
        after = transition.update.apply(state, traced.grads, step)
        self._steps.append(replace(step, batch=None, seen=()))
        return step, after

    def _unit(self, direction: Direction) -> Tensor:
        leaf = self._all[direction.tuned].leaf
        unit = torch.zeros(leaf.numel(), dtype=leaf.dtype, device=leaf.device)
        unit.narrow(0, direction.entry, 1).fill_(1)
        return unit.view(leaf.shape)

    def hypergradient(self, validate: Validate) -> tuple[Hypergradient, Statistics]:
        problem, validation = self._problem, validate()
        grads, total = problem.full(validation.grads), Hypergradient(problem.hyperparameters)
        problem.objective.add_direct(validation, total)
        sums = [
            [torch.zeros((), dtype=t.leaf.dtype, device=t.leaf.device)] * t.leaf.numel() for t in self._all
        ]
        for d in self._directions:
            if d.tangent is not None:
                pairs = [(part.bucket.gather(grads), part.param) for part in d.tangent.parts]
                pairs += zip(validation.buffers or (), d.tangent.buffers or ())  # type: ignore[arg-type]
                products = [(g * tan).sum() for g, tan in pairs if g is not None and tan is not None]
                for product in products:
                    sums[d.tuned][d.entry] = sums[d.tuned][d.entry] + product.to(
                        sums[d.tuned][d.entry].device
                    )
        for tuned, entries in zip(self._all, sums):
            total.add_direct(tuned, torch.stack(entries).view(tuned.leaf.shape) if entries else None)
        return total, Statistics()

    def state_dict(self) -> dict[str, Any]:
        tangents = [None if d.tangent is None else pack_state(d.tangent) for d in self._directions]
        return {"steps": [pack_step(step) for step in self._steps], "tangents": tangents}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.clear()
        optimizer = self._problem.live.optimizer
        self._steps = [unpack_step(step) for step in saved["steps"]]
        self._directions = [
            replace(direction, tangent=None if packed is None else unpack_state(packed, optimizer)[0])
            for direction, packed in zip(self._directions, saved["tangents"])
        ]
