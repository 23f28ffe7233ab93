"""Reverse mode through the recorded training steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from ..adjoint import Adjoint, merged
from ..buckets import as_list
from ..hyperparameter_set import HyperparameterSet
from ..readings import now_or_later
from ..records import State, Step
from ..second_order import Reverse, SecondOrder, TracedGradient, check_second_order, way_of
from ..training import Training
from ..trajectory import Trajectory
from ..update_adjoint import UpdateAdjoint, pull_update
from ..updates import UpdateRule
from ..vectors import norm
from .base import Method, Recording, Statistics, Validation, add_direct


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
        max_graphs: keep the graphs of the last so many steps instead of replaying them, which is the fastest way for short
            windows, and takes the memory of as many graphs; those of steps that a truncation leaves out are not kept. It
            never changes the answer.
        second_order: how the products with second derivatives are computed: ``"reverse"`` by double backward;
            ``"forward"`` by forward over reverse, which keeps no graph of a gradient; ``"finite_difference"`` by central
            differences of gradients, which need first derivatives alone, and so work with compiled modules, fused
            attention and own kernels. The first two are exact; the report estimates the error of the third. Parts of
            the loss without a graph are constants with ``"reverse"`` alone (see ``docs/notation.md``).

    Memory: ``(1 + number of state vectors) x parameters x snapshots``, and one step's graph; one vector more for each
    snapshot, its gradient, where every state is kept and ``second_order`` is not ``"reverse"`` or steps are captured.
    Time: a replayed step costs a gradient with graph and one double backward; by finite differences two gradients.

    Raises:
        TypeError: for numbers that are no ints.
        ValueError: for numbers below 1, ``max_snapshots=1`` with a truncation, an unknown ``offload`` or
            ``second_order``, or ``max_graphs`` with another way than ``"reverse"``, or with ``offload``.

    Source: Maclaurin, Duvenaud and Adams 2015; Franceschi et al. 2017, section 3.1.
    """

    truncation: int | None = None
    max_snapshots: int | None = None
    offload: Literal["cpu"] | None = None
    max_graphs: int | None = None
    second_order: SecondOrder = "reverse"

    def __post_init__(self) -> None:
        for name in ("truncation", "max_snapshots", "max_graphs"):
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
        check_second_order(self.second_order, "Unrolled")
        if self.max_graphs is not None and (self.second_order != "reverse" or self.offload is not None):
            raise ValueError(
                f"Unrolled: max_graphs={self.max_graphs} keeps graphs of double backward in the device's memory, so it goes "
                f"with second_order='reverse' and offload=None, got second_order={self.second_order!r}, "
                f"offload={self.offload!r}. Leave max_graphs out, or the other."
            )

    @property
    def keeps_graphs(self) -> bool:
        return self.max_graphs is not None

    @property
    def needs_second_derivatives(self) -> bool:
        return self.second_order != "finite_difference"

    def check(self, hyperparameters: HyperparameterSet, rule: UpdateRule, optimizer_name: str) -> None:
        """Every hyperparameter can be unrolled."""

    def start(self, training: Training) -> Recording:
        """An empty trajectory."""
        return UnrolledRecording(training, self)


class UnrolledRecording(Recording):
    """A trajectory, the graphs of its last steps, and the sweep over it."""

    def __init__(self, training: Training, method: Unrolled) -> None:
        self._training = training
        self._trajectory = Trajectory(training, method.truncation, method.max_snapshots, method.offload)
        self._way, self._max_graphs = way_of(training, method.second_order), method.max_graphs
        if method.max_graphs is not None and method.truncation is not None:
            self._max_graphs = min(method.max_graphs, method.truncation)
        exact_and_eager = method.second_order == "reverse" and not training.captures
        self._keeps_grads = not exact_and_eager and method.max_snapshots is None and method.max_graphs is None
        self._graphs: dict[int, TracedGradient] = {}

    def take(self, step: Step, state: State | None) -> tuple[Step, State]:
        assert state is not None
        if self._max_graphs is not None:
            return self._take_traced(step, state, self._max_graphs)
        step, after, grads = self._training.take(step, state, keep_grads=self._keeps_grads)
        self._trajectory.record(step, state if grads is None else replace(state, grads=grads))
        return step, after

    def _take_traced(self, step: Step, state: State, max_graphs: int) -> tuple[Step, State]:
        """The same, and keeps the graph of the step's gradient in place of an older one."""
        with self._training.model_state.copied_buffers():
            gradient = Reverse(self._training, step, state, with_buffers=False)
        step = self._training.finish(step, gradient.loss, gradient.grads)
        self._trajectory.record(step, state)
        self._graphs.pop(step.number - max_graphs, None)
        self._graphs[step.number] = gradient
        return step, self._training.advance(state, gradient.grads, step)

    def steps(self) -> Iterable[Step]:
        return self._trajectory.steps()

    def clear(self) -> None:
        self._trajectory.clear()
        self._graphs.clear()

    def state_dict(self) -> dict[str, Any]:
        return self._trajectory.state_dict()

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self._trajectory.load_state_dict(saved)

    def hypergradient(self, validation: Validation) -> tuple[list[Tensor], Statistics]:
        hyperparameters = self._training.hyperparameters
        totals = hyperparameters.zero_adjoints()
        adjoint = self._final_adjoint(validation)
        largest = last = norm(adjoint.params)
        trace_gradient, error = self._way(), None
        for step, state in self._trajectory.backward():
            gradient = self._kept_graph(step) or trace_gradient(self._training, step, state)
            fine = self._training.optimizer_state.refine(state, step.active)
            adjoint, adj_grads = self._through_updates(step, fine, gradient.grads, adjoint, totals)
            adjoint = self._through_gradient(gradient, adjoint, adj_grads, totals)
            largest, error = torch.maximum(largest, norm(adjoint.params)), gradient.error
            if fine is not state:
                adjoint = merged(adjoint, state, len(self._training.params))
        gradients = add_direct(hyperparameters, hyperparameters.reduce(totals), validation)
        growth = now_or_later([largest, last], lambda norms: norms[0] / norms[1] if norms[1] else 1.0)
        product_error = None if error is None else now_or_later([error], lambda numbers: numbers[0])
        return gradients, Statistics(product_error=product_error, adjoint_growth=growth)

    def _final_adjoint(self, validation: Validation) -> Adjoint:
        params = self._training.params
        grads = [torch.zeros_like(p) if g is None else g for p, g in zip(params, validation.grads)]
        buckets = self._training.optimizer_state.buckets
        return Adjoint(buckets, tuple(b.gather(grads) for b in buckets), tuple({} for _ in buckets))

    def _through_updates(
        self, step: Step, state: State, grads: Sequence[Tensor | None], adjoint: Adjoint, totals: list[Tensor]
    ) -> tuple[Adjoint, list[Tensor | None]]:
        """Vector-Jacobian products of the update rule alone: the adjoint of the state before it, and of the gradient."""
        back = [
            UpdateAdjoint(adj_param, None, adj_state, {})
            if grads[bucket.indices[0]] is None
            else pull_update(self._training, bucket, param, grads, rule_state, step, adj_param, adj_state)
            for bucket, param, rule_state, adj_param, adj_state in zip(
                state.buckets, state.params, state.rule_states, adjoint.params, adjoint.rule_states
            )
        ]
        settings = self._training.hyperparameters.settings
        for bucket, pulled in zip(state.buckets, back):
            for setting, part in pulled.settings.items():
                setting.add_adjoint(totals[settings.index(setting)], part, bucket, step.number)
        before = Adjoint(state.buckets, tuple(b.param for b in back), tuple(b.rule_state for b in back))
        return before, as_list(state.buckets, [b.grad for b in back], len(self._training.params))

    def _through_gradient(
        self, gradient: TracedGradient, adjoint: Adjoint, adj_grads: Sequence[Tensor | None], totals: list[Tensor]
    ) -> Adjoint:
        """Adds the products with the gradient's derivative to the adjoint of the parameters and to ``totals``."""
        products, mixed = gradient.pull(adj_grads)
        for total, product in zip(totals[len(self._training.hyperparameters.settings) :], mixed):
            if product is not None:
                total += product
        params = adjoint.own_params()
        pieces = as_list(adjoint.buckets, params, len(products))
        pairs = [(piece, product) for piece, product in zip(pieces, products) if piece is not None and product is not None]
        if pairs:
            torch._foreach_add_([piece for piece, _ in pairs], [product for _, product in pairs])
        return replace(adjoint, params=params)

    def _kept_graph(self, step: Step) -> TracedGradient | None:
        gradient = self._graphs.pop(step.number, None)
        if gradient is not None:
            self._training.check_batch(step)
        return gradient
