"""The ways to products with the derivative of a training gradient: each is a class."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ..device.capture import Captured
from ..ground import autodiff
from ..ground.vectors import norm
from .gradient import GradientStage, LossAndGradient
from .reverse import Reverse
from .running import Trace
from .state import Buffers, PerParameter, State, Step
from .traced import Products, TracedGradient

SecondOrder: TypeAlias = Literal["reverse", "forward", "finite_difference"]


class FirstOrder(TracedGradient):
    """What the ways without a graph of the gradient share: gradients alone, at the state and near it.

    Args:
        known: the gradient at the state, where it was kept.
    """

    def __init__(
        self,
        stage: GradientStage,
        step: Step,
        state: State,
        *,
        with_buffers: bool = False,
        known: LossAndGradient | None = None,
    ) -> None:
        self._stage, self._step, self._state = stage, step, state
        if known is None:
            with stage.live.at(state):
                known = stage.revisit(step)
        self._known, self.loss, self._recomputes = known, known.loss, False
        self.grads = stage.transform(known, keep=True)
        stage.running.refuse_moving_padding(known.grads)

    def pull(self, adj_grads: PerParameter, adj_buffers: Buffers | None = None) -> Products:
        direction, direct = self._through_transform(adj_grads)
        along, reads = self._along(direction, with_buffers=adj_buffers is not None)
        if reads and adj_buffers is None:  # the loss reads buffers, which earlier steps may have moved
            along, _ = self._along(direction, with_buffers=True)
        found = [along, Products([], direct)]
        if adj_buffers is not None:
            with self._stage.live.at(self._state):
                pulled = self._stage.pull_buffers(self._step, adj_buffers, recomputes=self._recomputes)
            found.append(Products(*pulled))
        return _summed(found)

    def product(self, v: PerParameter) -> list[Tensor | None]:
        return self.pull(v).params

    def mixed(self, v: PerParameter) -> list[Tensor | None]:
        return self.pull(v).tensors if self._stage.tensors else []

    @abstractmethod
    def _along(self, direction: PerParameter, *, with_buffers: bool) -> tuple[Products, bool]:
        """Derivative of the gradient before its transformation, along ``direction`` in the parameters: as the
        second derivative is symmetric, it is the product with the transpose. And whether the loss reads
        buffers."""

    def _through_transform(self, adj_grads: PerParameter) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The adjoint of the gradient before its transformation, and what goes to tuned tensors on the
        way."""
        stage, known = self._stage, self._known
        if stage.grad_transform is None:
            return stage.running.without_padding(adj_grads), []
        raw = [None if g is None else autodiff.leaf(g) for g in known.grads]
        leaves = [g for g in raw if g is not None]
        found = autodiff.pulled(stage.transform_again(raw, known.rng), adj_grads, [*leaves, *stage.tensors])
        waiting = iter(found)
        direction = [None if g is None else next(waiting) for g in raw]
        return stage.running.without_padding(direction), found[len(leaves) :]

    def _gradients(self, *, with_buffers: bool, **options: Any) -> tuple[list[Tensor | None], Trace]:
        """Gradients in parameters, tuned tensors and buffers, with the model as it stands."""
        stage, trace = self._stage, self._stage.running.trace(buffers=with_buffers, padding=True)

        def also() -> list[Tensor]:
            return [*stage.tensors, *trace.before.values()]

        found = stage.revisit(self._step, also=also, trace=trace, **options)
        return [*found.grads, *found.others], trace

    def _products(self, found: Sequence[Tensor | None], trace: Trace) -> tuple[Products, bool]:
        num_params, num_tensors = len(self._stage.live.params), len(self._stage.tensors)
        self._recomputes = trace.recomputes
        tensors, buffers = found[num_params : num_params + num_tensors], found[num_params + num_tensors :]
        return Products(
            list(found[:num_params]), list(tensors), trace.placed(trace.of_buffers(iter(buffers)))
        ), trace.reads


class Forward(FirstOrder):
    """Forward over reverse: the gradient computed with dual numbers. Exact, and keeps no graph of a
    gradient."""

    def _along(self, direction: PerParameter, *, with_buffers: bool) -> tuple[Products, bool]:
        _load_dual_formulas()
        stage = self._stage
        with (
            stage.live.at(self._state),
            stage.kernels(twice_differentiable=True),
            forward_ad.dual_level(),
            autodiff.explain_missing_forward_derivative(),
        ):
            with torch.no_grad():
                for p, v in zip(stage.live.params, direction):
                    if v is not None:
                        p.copy_(forward_ad.make_dual(p.detach(), v.reshape(p.shape)))
            found, trace = self._gradients(dual=True, with_buffers=with_buffers)
            tangents = [None if dual is None else forward_ad.unpack_dual(dual).tangent for dual in found]
        return self._products(tangents, trace)


class StepSize:
    r"""How far apart gradients are taken, chosen at the first product of a sweep and kept for the others.

    Two steps are tried, in units of :math:`1 + |\theta|`. At :math:`u^{1/3}`, u the rounding unit, the error
    of a difference of smooth functions, of order :math:`\epsilon^2`, meets that of rounding, of order
    :math:`u/\epsilon`. Gradients of networks with kinks (ReLU, max-pooling) jump: a short step meets few
    jumps, each as large as all that is sought, and :data:`WIDE` averages over many. What agrees better with a
    step of twice the length is taken.
    """

    WIDE = 0.05

    def __init__(self) -> None:
        self.relative: Tensor | None = None
        self.error: Tensor | None = None

    def choose(self, unit: float, difference: Callable[[float], PerParameter]) -> Tensor:
        """The step; ``difference`` gives the product by a step. Does not wait for the device."""
        if self.relative is None:
            errors = [_disagreement(difference(h), difference(2 * h)) for h in (unit ** (1 / 3), self.WIDE)]
            narrow = errors[0] <= errors[1]
            self.error = torch.where(narrow, errors[0], errors[1])
            self.relative = torch.full_like(self.error, self.WIDE).masked_fill(narrow, unit ** (1 / 3))
        return self.relative


class FiniteDifference(FirstOrder):
    r"""Central differences of gradients, :math:`(g(\theta + \epsilon v) - g(\theta - \epsilon v)) /
    2\epsilon`.

    Needs first derivatives alone. The step :math:`\epsilon = h (1 + |\theta|) / |v|` goes by norms; for h see
    :class:`StepSize`.
    """

    def __init__(
        self, stage: GradientStage, step: Step, state: State, *, step_size: StepSize, **options: Any
    ) -> None:
        super().__init__(stage, step, state, **options)
        self._step_size = step_size
        if options.get("known") is not None:  # nothing else computes the loss at the state again
            with stage.live.at(state):
                stage.loss_again(step)

    @property
    def error(self) -> Tensor | None:  # type: ignore[override]
        return self._step_size.error

    def _along(self, direction: PerParameter, *, with_buffers: bool) -> tuple[Products, bool]:
        length = norm(direction)
        scale = (1 + norm(self._state.params)) / length.masked_fill(~(length > 0), 1)
        unit = max(torch.finfo(param.dtype).eps for param in self._state.params)
        difference = partial(self._difference, direction, with_buffers=with_buffers)
        relative = self._step_size.choose(unit, lambda step: difference(step * scale)[0])
        return self._products(*difference(relative * scale))

    def _difference(
        self, direction: PerParameter, distance: Tensor, *, with_buffers: bool
    ) -> tuple[list[Tensor | None], Trace]:
        ends = []
        for signed in (distance, -distance):
            with self._stage.live.at(self._state, moved_by=(direction, signed)):
                found, trace = self._gradients(compare=False, with_buffers=with_buffers)
            ends.append(found)
        pairs = zip(*ends)
        return [
            None if a is None or b is None else (a - b).mul_((0.5 / distance).to(a)) for a, b in pairs
        ], trace


class Replayed(FirstOrder):
    """Double backward as one function of parameters, batch and adjoints, recorded once and replayed.
    Exact."""

    def __init__(
        self, stage: GradientStage, step: Step, state: State, *, captured: Captured, **options: Any
    ) -> None:
        super().__init__(stage, step, state, **options)
        self._captured = captured

    def pull(self, adj_grads: PerParameter, adj_buffers: Buffers | None = None) -> Products:
        direction, direct = self._through_transform(adj_grads)
        found, reads = self._replay(direction, adj_buffers)
        if reads and adj_buffers is None:
            running = self._stage.running
            zeros = [torch.zeros_like(running.buffer(i)) for i in running.floats]
            places = dict(zip(running.floats, zeros))
            found, _ = self._replay(direction, tuple(map(places.get, range(len(running.live.buffer_places)))))
        return _summed([found, Products([], direct)])

    def _along(self, direction: PerParameter, *, with_buffers: bool) -> tuple[Products, bool]:
        return self._replay(direction, None)

    def _replay(self, direction: PerParameter, adj_buffers: Buffers | None) -> tuple[Products, bool]:
        stage, state = self._stage, self._state
        if state.buffers is not None:
            stage.live.model.set_buffers(state.buffers)
        stage.return_to(self._step)
        values = state.per_parameter(len(stage.live.params))
        inputs = values, self._step.batch, list(direction), adj_buffers
        loss, products, reads = self._captured(inputs)
        stage.compare(self._step, loss)
        return Products(*products), reads


def double_backward(stage: GradientStage, inputs: Any) -> tuple[Tensor, Products, bool]:
    """The loss, the products with the derivative of the gradient, and whether the loss reads buffers, in the
    current surroundings: of the parameters' values, a batch, a direction, and the adjoints of the buffers."""
    values, batch, direction, adj_buffers = inputs
    before = stage.live.model.point_to(values)
    try:
        traced = Reverse(stage, None, None, with_buffers=adj_buffers is not None, batch=batch)
        assert traced.loss is not None
        return traced.loss.detach(), traced.pull(direction, adj_buffers), traced.reads
    finally:
        stage.live.model.point_back(before)


Way: TypeAlias = Callable[..., TracedGradient]
"""From a gradient stage, a step and the state before it to its gradient."""


def way(second_order: SecondOrder) -> Way:
    """How one sweep traces gradients."""
    if second_order == "finite_difference":
        return partial(FiniteDifference, step_size=StepSize())
    return {"reverse": Reverse, "forward": Forward}[second_order]


def ways(stage: GradientStage, second_order: SecondOrder) -> Callable[[], Way]:
    """What begins a sweep: how its gradients are traced, with products that are recorded if the stage
    records."""
    name = "the product with the training gradient's derivative"
    captured = (
        stage.captured(partial(double_backward, stage.untransformed()), name)
        if second_order == "reverse"
        else None
    )
    return partial(way, second_order) if captured is None else lambda: partial(Replayed, captured=captured)


def check_second_order(value: object, owner: str) -> None:
    """Refuses anything but the name of a way.

    Raises:
        ValueError: with the names.
    """
    if value not in get_args(SecondOrder):
        known = ", ".join(map(repr, get_args(SecondOrder)))
        raise ValueError(f"{owner}: second_order must be one of {known}, got {value!r}.")


@cache
def _load_dual_formulas() -> None:
    """torch loads some formulas at the first dual number, and warns there of a deprecated function that it
    calls itself."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def _summed(every: Sequence[Products]) -> Products:
    buffers = [found.buffers for found in every if found.buffers is not None]
    return Products(
        autodiff.add_lists([found.params for found in every]),
        autodiff.add_lists([found.tensors for found in every]),
        tuple(autodiff.add_lists(buffers)) if buffers else None,
    )


def _disagreement(a: PerParameter, b: PerParameter) -> Tensor:
    pairs = [(x, y) for x, y in zip(a, b) if x is not None and y is not None]
    length = norm([y for _, y in pairs])
    return norm([x - y for x, y in pairs]) / length.masked_fill(~(length > 0), 1)
