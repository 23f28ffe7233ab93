"""Reverse mode through the recorded training steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .. import autodiff
from ..buckets import Bucket, as_list
from ..hyperparameter_set import HyperparameterSet
from ..records import State, Step
from ..training import Training
from ..trajectory import Trajectory
from ..updates import UpdateRule
from .base import Method, Recording, SolveStatistics, Validation, add_direct


@dataclass(frozen=True)
class Unrolled(Method):
    r"""Differentiates through the training steps since the last hyper step, last one first.

    With :math:`(\theta_{t+1}, s_{t+1}) = u(\theta_t, g_t, s_t, \lambda)`, the adjoints of :math:`\theta_{t+1}` and
    :math:`s_{t+1}` are pulled back through the update rule :math:`u` and then through the gradient :math:`g_t`, one step
    at a time: the graph of one step is all that ever lives. Exact for settings, batches, noise and buffers as recorded;
    buffers (BatchNorm's statistics) are constants, as everywhere in autograd.

    Args:
        truncation: only the last so many steps count (Williams and Peng 1990; Shaban et al. 2019). It changes the
            answer. None differentiates through all.
        max_snapshots: keep at most so many states while training and recompute the others, which keeps at most
            ``2 * max_snapshots + 3`` alive. It never changes the answer. None keeps every state. At least 2 with a
            truncation.
        offload: ``"cpu"`` keeps states and batches in CPU memory. It never changes the answer.

    Memory: ``(1 + number of state vectors) x parameters x snapshots``, and one step's graph.
    Time: a replayed step costs a gradient with graph and one double backward.

    Raises:
        TypeError: for numbers that are no ints.
        ValueError: for numbers below 1, ``max_snapshots=1`` with a truncation, or an unknown ``offload``.

    Source: Maclaurin, Duvenaud and Adams 2015; Franceschi et al. 2017, section 3.1.
    """

    truncation: int | None = None
    max_snapshots: int | None = None
    offload: Literal["cpu"] | None = None

    def __post_init__(self) -> None:
        for name in ("truncation", "max_snapshots"):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
                raise TypeError(f"Unrolled: {name} must be an int or None, got {number!r}.")
            if number is not None and number < 1:
                raise ValueError(f"Unrolled: {name} must be at least 1, got {number}. None means no limit.")
        if self.truncation is not None and self.max_snapshots == 1:
            raise ValueError(
                "Unrolled: max_snapshots=1 with a truncation: the window moves on, so an older and a newer snapshot are "
                "needed at once. Pass max_snapshots=2 or more."
            )
        if self.offload not in (None, "cpu"):
            raise ValueError(f"Unrolled: offload must be 'cpu' or None, got {self.offload!r}.")

    def check(self, hyperparameters: HyperparameterSet, rule: UpdateRule, optimizer_name: str) -> None:
        """Every hyperparameter can be unrolled."""

    def start(self, training: Training) -> Recording:
        """An empty trajectory."""
        return UnrolledRecording(training, Trajectory(training, self.truncation, self.max_snapshots, self.offload))


@dataclass(frozen=True)
class Adjoint:
    """The derivative of the validation loss with respect to a state: None stands for zeros."""

    buckets: tuple[Bucket, ...]
    params: tuple[Tensor, ...]
    rule_states: tuple[dict[str, Tensor], ...]


class UnrolledRecording(Recording):
    """A trajectory, and the sweep over it."""

    def __init__(self, training: Training, trajectory: Trajectory) -> None:
        self._training, self._trajectory = training, trajectory

    def record(self, step: Step, state: State, grads: Sequence[Tensor | None]) -> None:
        self._trajectory.record(step, state)

    def steps(self) -> Iterable[Step]:
        return self._trajectory.steps()

    def clear(self) -> None:
        self._trajectory.clear()

    def state_dict(self) -> dict[str, Any]:
        return self._trajectory.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._trajectory.load_state_dict(saved)

    def hypergradient(self, validation: Validation) -> tuple[list[Tensor], SolveStatistics]:
        hyperparameters = self._training.hyperparameters
        totals = hyperparameters.zero_adjoints()
        adjoint = self._final_adjoint(validation)
        last = largest = size_of(adjoint.params)
        for step, state in self._trajectory.backward():
            adjoint = self._step_back(step, state, adjoint, totals)
            largest = torch.maximum(largest, size_of(adjoint.params))
        statistics = SolveStatistics(adjoint_growth=growth(largest, last))
        return add_direct(hyperparameters, hyperparameters.reduce(totals), validation), statistics

    def _final_adjoint(self, validation: Validation) -> Adjoint:
        params = self._training.params
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, validation.grads)]
        buckets = self._training.optimizer_state.buckets
        return Adjoint(buckets, tuple(b.gather(grads) for b in buckets), tuple({} for _ in buckets))

    def _step_back(self, step: Step, state: State, adjoint: Adjoint, totals: list[Tensor]) -> Adjoint:
        """From the adjoint of the state after ``step`` to that of the state before it."""
        training = self._training
        training.load(state)
        _, grads = training.revisit(step, create_graph=True)
        refined = training.refine(state, step.active)
        back = [
            self._through_update(bucket, param, rule_state, grads, adj_param, adj_state, step, totals)
            for bucket, param, rule_state, adj_param, adj_state in zip(
                refined.buckets, refined.params, refined.rule_states, adjoint.params, adjoint.rule_states
            )
        ]
        adj_grads = as_list(refined.buckets, [adj_grad for _, adj_grad, _ in back], len(training.params))
        through_loss = self._through_gradient(grads, adj_grads, totals)
        params = [
            adj_param if adj_grad is None else adj_param + bucket.gather(through_loss)
            for bucket, (adj_param, adj_grad, _) in zip(refined.buckets, back)
        ]
        before = Adjoint(refined.buckets, tuple(params), tuple(adj_state for _, _, adj_state in back))
        return before if refined is state else merged(before, state, len(training.params))

    def _through_update(
        self,
        bucket: Bucket,
        param: Tensor,
        rule_state: dict[str, Any],
        grads: Sequence[Tensor | None],
        adj_param: Tensor,
        adj_state: dict[str, Tensor],
        step: Step,
        totals: list[Tensor],
    ) -> tuple[Tensor, Tensor | None, dict[str, Tensor]]:
        """Vector-Jacobian product of the update rule alone: adjoints of its parameters, gradient and state."""
        if grads[bucket.indices[0]] is None:
            return adj_param, None, adj_state
        update = self._training.traced_update(bucket, param, grads, rule_state, step)
        found = autodiff.gradients(
            [update.new_param, *(update.new_state[k] for k in adj_state)],
            [update.param, update.grad, *update.state.values(), *update.tuned.values()],
            [adj_param, *adj_state.values()],
        )
        settings = self._training.hyperparameters.settings
        for setting, part in zip(update.tuned, found[2 + len(update.state) :]):
            if part is not None:
                setting.add_adjoint(totals[settings.index(setting)], part, bucket, step.number)
        new_adj_param = torch.zeros_like(param) if found[0] is None else found[0]
        return new_adj_param, found[1], {k: adj for k, adj in zip(update.state, found[2:]) if adj is not None}

    def _through_gradient(
        self, grads: Sequence[Tensor | None], adj_grads: Sequence[Tensor | None], totals: list[Tensor]
    ) -> list[Tensor]:
        """Hessian-vector product for every parameter; the mixed products go to ``totals``."""
        training = self._training
        pairs = [(g, v) for g, v in zip(grads, adj_grads) if g is not None and v is not None]
        tensors = training.hyperparameters.loss_tensors
        trainable = [i for i, g in enumerate(grads) if g is not None]
        inputs = [training.params[i] for i in trainable] + tensors
        found = autodiff.gradients([g for g, _ in pairs], inputs, [v for _, v in pairs])
        by_index = dict(zip(trainable, found))
        products = [
            torch.zeros_like(p) if (product := by_index.get(i)) is None else product for i, p in enumerate(training.params)
        ]
        mixed = totals[len(training.hyperparameters.settings) :]
        for total, product in zip(mixed, found[len(trainable) :]):
            if product is not None:
                total += product
        return products


def size_of(tensors: Sequence[Tensor]) -> Tensor:
    """Euclidean norm over all tensors, on the device of the first: nothing waits for it."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0]) for norm in norms]))


def growth(largest: Tensor, last: Tensor) -> float:
    """How often ``last`` goes into ``largest``; 1 where the adjoint is zero from the beginning."""
    number, at_end = torch.stack([largest, last]).tolist()
    return number / at_end if at_end else 1.0


def merged(adjoint: Adjoint, state: State, num_params: int) -> Adjoint:
    """The adjoint of ``state``, given that of the same state with its buckets split."""
    pieces = as_list(adjoint.buckets, adjoint.params, num_params)
    rule_states = []
    for bucket, rule_state in zip(state.buckets, state.rule_states):
        parts = [(b, a) for b, a in zip(adjoint.buckets, adjoint.rule_states) if b.indices[0] in bucket.indices]
        joined = {}
        for key in {key for _, adj in parts for key in adj}:
            held = [(b, adj[key]) for b, adj in parts if key in adj]
            joined[key] = _joined(bucket, rule_state[key], held, num_params)
        rule_states.append(joined)
    params = tuple(bucket.gather(pieces) for bucket in state.buckets)  # type: ignore[arg-type]
    return Adjoint(state.buckets, params, tuple(rule_states))


def _joined(bucket: Bucket, whole: Tensor, held: Sequence[tuple[Bucket, Tensor]], num_params: int) -> Tensor:
    if whole.ndim == 0:
        return torch.stack([adj for _, adj in held]).sum()
    zeros = as_list([bucket], [torch.zeros_like(whole)], num_params)
    found = as_list([b for b, _ in held], [adj for _, adj in held], num_params)
    return bucket.gather([z if f is None else f for z, f in zip(zeros, found)])  # type: ignore[misc]
