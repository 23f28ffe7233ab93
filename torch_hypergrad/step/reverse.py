"""Double backward."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor

from ..ground import autodiff
from .gradient import GradientStage, LossAndGradient
from .state import Buffers, PerParameter, State, Step
from .traced import Products, TracedGradient


class Reverse(TracedGradient):
    """Double backward: the gradient's own graph, gone through in reverse. Exact.

    Args:
        step: None takes ``batch`` with the model and its surroundings as they stand, as what is recorded
            does.
        with_buffers: trace the buffers.
        known: of no use.
        is_taken: the step is being taken, and not taken again: buffers are where they should be.
    """

    def __init__(
        self,
        stage: GradientStage,
        step: Step | None,
        state: State | None,
        *,
        with_buffers: bool = False,
        known: LossAndGradient | None = None,
        is_taken: bool = False,
        batch: Any = None,
    ) -> None:
        self._stage, self._step, self._state = stage, step, state
        self._versions: list[int] | None = None
        with nullcontext() if state is None else stage.live.at(state, with_buffers=not is_taken):
            found = self._evaluated(batch, with_buffers=with_buffers)
        if self.reads and not with_buffers and state is not None:
            with stage.live.at(state):  # the loss reads buffers, which earlier steps may have moved
                found = self._evaluated(batch, with_buffers=True)
        self.loss, self.grads = found.loss, stage.transform(found)
        self._traced: list[Any] = self.grads
        self._is_active = [g is not None for g in self.grads]

    def keep(self, *, values: bool) -> None:
        """Lets the graph outlive its step, to be gone back through when parameters and buffers have moved on.

        Args:
            values: keep those of the gradient too; else ``grads`` has none from now on.
        """
        self.loss, self._versions = None, self._stage.live.model.versions()
        if not values:
            self._traced = [None if g is None else autodiff.edge(g) for g in self.grads]
            self.grads = [None] * len(self.grads)

    def _evaluated(self, batch: Any, *, with_buffers: bool) -> LossAndGradient:
        stage, step = self._stage, self._step
        self._trace = stage.running.trace(buffers=with_buffers, padding=True, check=step is not None)
        if step is None:
            return stage.evaluate(batch, create_graph=True, trace=self._trace)
        return stage.revisit(step, create_graph=True, trace=self._trace)

    @property
    def reads(self) -> bool:
        """Whether the loss reads buffers."""
        return self._trace.reads

    @contextmanager
    def _going_back(self) -> Iterator[None]:
        """Where the graph is gone through: parts of it may be computed again (checkpointing), as they
        were."""
        live = self._stage.live
        if self._step is not None:
            live.model.set_modes(self._step.surroundings)
        is_kept = self._versions is not None
        there = nullcontext() if self._state is None else live.at(self._state, with_buffers=is_kept)
        then = nullcontext() if self._versions is None else live.model.at_versions(self._versions)
        with there, then, self._stage.kernels(twice_differentiable=True), self._trace.hooked():
            yield

    def _pulled(
        self,
        v: PerParameter,
        inputs: Sequence[Tensor],
        adj_buffers: Buffers | None = None,
        *,
        again: bool = True,
    ) -> list[Tensor | None]:
        trace = self._trace
        outputs, adjoints = [*self._traced, *trace.after.values()], [*v, *trace.at(adj_buffers)]
        with self._going_back():
            return autodiff.pulled(outputs, adjoints, inputs, retain_graph=again or None)

    def pull(self, adj_grads: PerParameter, adj_buffers: Buffers | None = None) -> Products:
        params, tensors, trace = self._active(), self._stage.tensors, self._trace
        found = iter(self._pulled(adj_grads, [*params, *tensors, *trace.leaves], adj_buffers, again=False))
        products = self._spread(found)
        mixed = [next(found) for _ in tensors]
        buffers = trace.placed(trace.of_buffers(found), adj_buffers)
        trace.add_rows(products, list(found))
        return Products(products, mixed, buffers)

    def product(self, v: PerParameter) -> list[Tensor | None]:
        found = iter(self._pulled(v, [*self._active(), *self._trace.leaves]))
        products = self._spread(found)
        self._trace.of_buffers(found)
        self._trace.add_rows(products, list(found))
        return products

    def mixed(self, v: PerParameter) -> list[Tensor | None]:
        return self._pulled(v, self._stage.tensors)

    def pusher(
        self,
    ) -> Callable[[PerParameter, Sequence[Tensor | None], Buffers | None], tuple[list, Buffers | None]]:
        """From tangents of parameters, tuned tensors and buffers to those of the gradient and of the buffers
        after the loss, exactly."""
        trace, active = self._trace, [i for i, is_active in enumerate(self._is_active) if is_active]
        outputs = [*(self.grads[i] for i in active), *trace.after.values()]
        inputs = [*self._active(), *self._stage.tensors, *trace.leaves]
        with self._going_back():
            push = autodiff.linearized(outputs, inputs)  # type: ignore[arg-type]

        def push_all(
            params: PerParameter, tensors: Sequence[Tensor | None], buffers: Buffers | None
        ) -> tuple:
            tangents = [*(params[i] for i in active), *tensors, *trace.tangents(buffers, params)]
            with self._going_back():
                found = push(tangents)
            grads = dict(zip(active, found))
            return [grads.get(i) for i in range(len(self.grads))], trace.placed(found[len(active) :], buffers)

        return push_all

    def _active(self) -> list[Tensor]:
        return [p for p, is_active in zip(self._stage.live.params, self._is_active) if is_active]

    def _spread(self, found: Iterator[Tensor | None]) -> list[Tensor | None]:
        """One entry for each parameter from one for each active parameter."""
        return [next(found) if is_active else None for is_active in self._is_active]
