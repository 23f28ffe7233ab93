"""The implicit function theorem at the current weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import autodiff
from ..buckets import Bucket
from ..errors import SolverError
from ..hyperparameter_set import HyperparameterSet
from ..records import State, Step
from ..solvers import Solver
from ..solvers.base import check_positive_int
from ..training import Training
from ..trajectory import pack_step, unpack_step
from ..tuned import TunedSetting
from ..updates import UpdateRule
from .base import Method, Recording, Statistics, Validation, add_direct


@dataclass(frozen=True)
class Implicit(Method):
    r"""Takes the current weights for the training optimum :math:`F(\theta, \lambda) = 0` and differentiates that.

    .. math:: \frac{dL_{val}}{d\lambda} = \partial_\lambda L_{val} - (\partial_\lambda F)^\top q,
              \qquad (\partial_\theta F)^\top q = \nabla_\theta L_{val}

    F is the optimizer's stationarity: the gradient plus weight decay, which for decoupled decay (AdamW) is scaled by the
    frozen preconditioner. ``grad_transform`` does not move the optimum and is left out. There is no trajectory: weights
    may be changed or loaded between steps.

    Args:
        solver: how to solve for q: :class:`Neumann`, :class:`CG`, :class:`Cholesky` or :class:`Identity`.
        num_batches: F is the mean over the last so many training batches.

    Only what moves the optimum can be tuned: weight decay and the like, and tensors in the training loss. ``lr``,
    ``betas`` or ``momentum`` are refused.

    Raises:
        TypeError, ValueError: for a solver that is none, or ``num_batches`` below 1.

    Source: Bengio 2000; Pedregosa 2016; Lorraine, Vicol and Duvenaud 2020.
    """

    solver: Solver
    num_batches: int = 1

    replays: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if not isinstance(self.solver, Solver):
            raise TypeError(f"Implicit: solver must be a Solver such as Neumann(20), got {self.solver!r}.")
        check_positive_int(self.num_batches, "Implicit: num_batches")

    @property
    def needs_second_derivatives(self) -> bool:
        return True

    def check(self, hyperparameters: HyperparameterSet, rule: UpdateRule, optimizer_name: str) -> None:
        """Refuses settings that do not move the optimum."""
        if rule.stationarity is None:
            raise ValueError(
                f"{optimizer_name} has no stationarity, the equation that holds at its training optimum, so the implicit "
                "method cannot differentiate it. Use method=Unrolled(), or register its rule with a stationarity."
            )
        for setting in hyperparameters.settings:
            name = setting.spec.name
            if name not in rule.moves_optimum:
                able = ", ".join(rule.moves_optimum) or "none"
                raise ValueError(
                    f"{name!r} cannot be tuned with Implicit: it changes the way to the training optimum, not the optimum, "
                    "so its implicit hypergradient is zero although training depends on it. Use method=Unrolled(). Settings "
                    f"of {optimizer_name} that move the optimum: {able}."
                )
            if setting.spec.per == "step":
                raise ValueError(
                    f"Hyperparameter({name!r}, per='step') cannot be tuned with Implicit: an optimum has no training steps. "
                    "Use method=Unrolled(), or per='group'."
                )

    def start(self, training: Training) -> Recording:
        """No batches yet."""
        return ImplicitRecording(training, self.solver, self.num_batches)


class ImplicitRecording(Recording):
    """The last training batches."""

    checks_parameters = False

    def __init__(self, training: Training, solver: Solver, num_batches: int) -> None:
        self._training, self._solver = training, solver
        self._steps: deque[Step] = deque(maxlen=num_batches)

    def take(self, step: Step, state: State) -> tuple[Step, State]:
        step, after, _ = self._training.take(step, state)
        self._steps.append(step)
        return step, after

    def steps(self) -> Iterable[Step]:
        return self._steps

    def clear(self) -> None:
        self._steps.clear()

    def state_dict(self) -> dict[str, Any]:
        return {"steps": [pack_step(step) for step in self._steps]}

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._steps.clear()
        self._steps.extend(unpack_step(step) for step in saved["steps"])

    def hypergradient(self, validation: Validation) -> tuple[list[Tensor], Statistics]:
        training, hyperparameters = self._training, self._training.hyperparameters
        state = training.capture()
        grads = self._mean_gradients()
        active = [g is not None for g in grads]
        state = training.refine(state, active)
        buckets = [bucket for bucket in state.buckets if active[bucket.indices[0]]]
        tuned = {
            bucket: {s: autodiff.leaf(s.for_bucket(bucket, 0)) for s in hyperparameters.of_group[bucket.group]}
            for bucket in buckets
        }
        stationarity = self._stationarity(state, buckets, grads, tuned)
        params = [training.params[i] for bucket in buckets for i in bucket.indices]

        def matvec(v: Tensor) -> Tensor:
            found = autodiff.gradients([stationarity], params, [v], retain_graph=True)
            if all(product is None for product in found):
                raise SolverError(
                    "The training gradient does not depend on the parameters: the loss is linear in them and has no optimum. "
                    "Use a strictly convex loss, weight decay, or method=Unrolled()."
                )
            return _joined(found, params, like=v)

        b = _joined([validation.grads[i] for bucket in buckets for i in bucket.indices], params, like=stationarity.detach())
        q, info = self._solver.solve(matvec, b)
        totals = self._mixed_products(stationarity, q, tuned)
        gradients = [-g for g in hyperparameters.reduce(totals)]
        return add_direct(hyperparameters, gradients, validation), Statistics(info.num_matvecs, info.residual)

    def _mean_gradients(self) -> list[Tensor | None]:
        """The gradient at the current weights, with graph, as a mean over the recorded batches."""
        found = [self._training.revisit(step, create_graph=True)[1] for step in self._steps]
        means: list[Tensor | None] = []
        for of_batches in zip(*found):
            present = [g for g in of_batches if g is not None]
            means.append(torch.stack(present).sum(0) / len(found) if present else None)
        return means

    def _stationarity(
        self,
        state: State,
        buckets: Sequence[Bucket],
        grads: Sequence[Tensor | None],
        tuned: dict[Bucket, dict[TunedSetting, Tensor]],
    ) -> Tensor:
        """F as one vector, with the graph that all products share."""
        training, rule = self._training, self._training.rule
        rule_states = dict(zip(state.buckets, state.rule_states))
        parts = []
        assert rule.stationarity is not None
        with torch.enable_grad():
            for bucket in buckets:
                settings = training.settings(bucket, self._steps[-1], tuned[bucket])
                param, grad = bucket.gather(training.params), bucket.gather(grads)  # type: ignore[arg-type]
                parts.append(rule.stationarity(param, grad, rule_states[bucket], settings).reshape(-1))
            return torch.cat([part.to(parts[0].device) for part in parts])

    def _mixed_products(
        self, stationarity: Tensor, q: Tensor, tuned: dict[Bucket, dict[TunedSetting, Tensor]]
    ) -> list[Tensor]:
        """``(dF/dlambda)^T q`` for every hyperparameter."""
        hyperparameters = self._training.hyperparameters
        totals = hyperparameters.zero_adjoints()
        leaves = [(bucket, setting, leaf) for bucket, of in tuned.items() for setting, leaf in of.items()]
        inputs = [leaf for _, _, leaf in leaves] + hyperparameters.loss_tensors
        found = autodiff.gradients([stationarity], inputs, [q])
        for (bucket, setting, _), part in zip(leaves, found):
            if part is not None:
                setting.add_adjoint(totals[hyperparameters.settings.index(setting)], part, bucket, 0)
        for total, part in zip(totals[len(hyperparameters.settings) :], found[len(leaves) :]):
            if part is not None:
                total += part
        return totals


def _joined(tensors: Sequence[Tensor | None], params: Sequence[Tensor], like: Tensor) -> Tensor:
    filled = [torch.zeros_like(p) if t is None else t for t, p in zip(tensors, params)]
    return torch.cat([t.reshape(-1).to(like) for t in filled])
