"""Products with the derivative of a training gradient: three ways to compute them."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from . import autodiff
from .buckets import as_list
from .capture import Captured
from .records import State, Step
from .training import Training
from .vectors import norm

SecondOrder: TypeAlias = Literal["reverse", "forward", "finite_difference"]
Tensors: TypeAlias = Sequence[Tensor | None]


class TracedGradient(ABC):
    r"""The training gradient :math:`g(\theta, \lambda)` of one step at one state, transformed as the update rule gets it.

    ``grads`` has one tensor for each parameter, None where the loss does not depend on it.
    """

    grads: list[Tensor | None]

    @abstractmethod
    def pull(self, adj_grads: Tensors, *, again: bool = False) -> tuple[list[Tensor | None], list[Tensor | None]]:
        r"""The products :math:`(\partial g/\partial\theta)^\top v` and :math:`(\partial g/\partial\lambda)^\top v`.

        Args:
            adj_grads: v, one tensor for each parameter; None stands for zeros.
            again: whether there will be another call.

        Returns:
            One tensor for each parameter, and one for each tuned tensor of the loss; None stands for zeros.
        """

    @property
    def error(self) -> Tensor | None:
        """Estimated relative error of the products so far; None if they are exact."""
        return None


class Reverse(TracedGradient):
    """Double backward: the gradient's own graph, gone through in reverse. Exact."""

    def __init__(self, training: Training, step: Step, state: State, *, with_buffers: bool = True) -> None:
        self._training, self._state = training, state
        with training.at(state, with_buffers=with_buffers):
            self.loss, raw, _ = training.revisit(step, create_graph=True)
            self.grads = training.transform(raw)

    def pull(self, adj_grads: Tensors, *, again: bool = False) -> tuple[list[Tensor | None], list[Tensor | None]]:
        training = self._training
        with training.at(self._state, with_buffers=False):
            return _pulled(training, self.grads, adj_grads, retain_graph=again)


class FirstOrder(TracedGradient):
    """What the ways without double backward share: gradients alone, at the state and near it."""

    def __init__(self, training: Training, step: Step, state: State) -> None:
        self._training, self._step, self._state = training, step, state
        if state.grads is None:
            with training.at(state):
                _, self.raw, _ = training.revisit(step, create_graph=False)
        else:
            self.raw = list(state.grads)
        self.grads = training.transform(self.raw, keep=True)

    def pull(self, adj_grads: Tensors, *, again: bool = False) -> tuple[list[Tensor | None], list[Tensor | None]]:
        direction, direct = self._through_transform(adj_grads)
        products, mixed = self.products(direction)
        return products, [m if d is None else d if m is None else m + d for m, d in zip(mixed, direct)]

    @abstractmethod
    def products(self, direction: Tensors) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Derivative of the gradient, in parameters and tuned tensors, along ``direction`` in the parameters: as the
        second derivative is symmetric, it is the product with the transpose."""

    def _through_transform(self, adj_grads: Tensors) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The adjoint of the gradient before its transformation, and what goes to tuned tensors on the way."""
        training = self._training
        tensors = training.hyperparameters.loss_tensors
        if training.grad_transform is None:
            return list(adj_grads), [None] * len(tensors)
        raw = [None if g is None else autodiff.leaf(g) for g in self.raw]
        return _pulled(training, training.transform(raw, keep=True), adj_grads, inputs=raw)


class Replayed(FirstOrder):
    """Double backward as one function of parameters, batch and direction, recorded once and replayed. Exact."""

    def __init__(self, captured: Captured, training: Training, step: Step, state: State) -> None:
        super().__init__(training, step, state)
        self._captured = captured

    def products(self, direction: Tensors) -> tuple[list[Tensor | None], list[Tensor | None]]:
        training, state = self._training, self._state
        if state.buffers is not None:
            training.model_state.set_buffers(state.buffers)
        training.return_to(self._step)
        values = as_list(state.buckets, state.params, len(training.params))
        return self._captured((values, self._step.batch, list(direction)))


def double_backward(training: Training, inputs: Any) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """The products with the derivative of the gradient, in the current surroundings: of the parameters' values, a batch
    and a direction."""
    values, batch, direction = inputs
    before = training.model_state.point_to(values)
    try:
        return _pulled(training, training.gradients(batch, create_graph=True)[1], direction)
    finally:
        training.model_state.point_back(before)


class Forward(FirstOrder):
    """Forward over reverse: the gradient computed with dual numbers. Exact, and keeps no graph of a gradient."""

    def products(self, direction: Tensors) -> tuple[list[Tensor | None], list[Tensor | None]]:
        training = self._training
        _load_dual_formulas()
        with (
            training.at(self._state),
            training.kernels(twice_differentiable=True),
            forward_ad.dual_level(),
            autodiff.explain_missing_forward_derivative(),
        ):
            with torch.no_grad():
                for p, v in zip(training.params, direction):
                    if v is not None:
                        p.copy_(forward_ad.make_dual(p.detach(), v.reshape(p.shape)))
            _, grads, others = training.revisit(self._step, create_graph=False, also=training.hyperparameters.loss_tensors)
            return _tangents(grads), _tangents(others)


class StepSize:
    r"""How far apart gradients are taken, chosen at the first product of a sweep and kept for the others.

    Two steps are tried, in units of :math:`1 + |\theta|`. At :math:`u^{1/3}`, u the rounding unit, the error of a
    difference of smooth functions, of order :math:`\epsilon^2`, meets that of rounding, of order :math:`u/\epsilon`.
    Gradients of networks with kinks (ReLU, max-pooling) jump: a short step meets few jumps, each as large as all that is
    sought, and :data:`WIDE` averages over many. What agrees better with a step of twice the length is taken.
    """

    WIDE = 0.05

    def __init__(self) -> None:
        self.relative: Tensor | None = None
        self.error: Tensor | None = None

    def choose(self, unit: float, difference: Callable[[float], Tensors]) -> Tensor:
        """The step; ``difference`` gives the product by a step. Does not wait for the device."""
        if self.relative is None:
            errors = [_disagreement(difference(step), difference(2 * step)) for step in (unit ** (1 / 3), self.WIDE)]
            narrow = errors[0] <= errors[1]
            self.error = torch.where(narrow, errors[0], errors[1])
            self.relative = torch.full_like(self.error, self.WIDE).masked_fill(narrow, unit ** (1 / 3))
        return self.relative


class FiniteDifference(FirstOrder):
    r"""Central differences of gradients, :math:`(g(\theta + \epsilon v) - g(\theta - \epsilon v)) / 2\epsilon`.

    Needs first derivatives alone. The step :math:`\epsilon = h (1 + |\theta|) / |v|` goes by norms; for h see
    :class:`StepSize`.
    """

    def __init__(self, training: Training, step: Step, state: State, step_size: StepSize) -> None:
        super().__init__(training, step, state)
        self._step_size = step_size

    @property
    def error(self) -> Tensor | None:
        return self._step_size.error

    def products(self, direction: Tensors) -> tuple[list[Tensor | None], list[Tensor | None]]:
        length = norm(direction)
        scale = (1 + norm(self._state.params)) / length.masked_fill(~(length > 0), 1)
        unit = max(torch.finfo(param.dtype).eps for param in self._state.params)
        relative = self._step_size.choose(unit, lambda step: self._difference(direction, step * scale))
        found, num_params = self._difference(direction, relative * scale), len(self._training.params)
        return found[:num_params], found[num_params:]

    def _difference(self, direction: Tensors, distance: Tensor) -> list[Tensor | None]:
        training = self._training
        ends = []
        for signed in (distance, -distance):
            with training.at(self._state, moved_by=(direction, signed)):
                _, grads, others = training.revisit(self._step, create_graph=False, also=training.hyperparameters.loss_tensors)
            ends.append([*grads, *others])
        return [None if a is None or b is None else (a - b).mul_((0.5 / distance).to(a)) for a, b in zip(*ends)]


Way: TypeAlias = Callable[[Training, Step, State], TracedGradient]


def way(second_order: SecondOrder) -> Way:
    """How one sweep traces gradients."""
    if second_order == "finite_difference":
        return partial(FiniteDifference, step_size=StepSize())
    return {"reverse": Reverse, "forward": Forward}[second_order]


class MeanGradient:
    """The mean training gradient of some steps at one state, before any transformation, and products with its derivative
    that keep no graph; ``trace`` is one of the ways to them."""

    def __init__(self, training: Training, steps: Sequence[Step], state: State, trace: Way) -> None:
        traced = [trace(training, step, state) for step in steps]
        self._traced = [t for t in traced if isinstance(t, FirstOrder)]
        self._has_tensors = bool(training.hyperparameters.loss_tensors)

    def mean(self) -> list[Tensor | None]:
        """The gradient for each parameter."""
        return _means([t.raw for t in self._traced])

    def hessian_product(self, direction: Tensors) -> list[Tensor | None]:
        """``(dg/dtheta)^T v`` for each parameter."""
        return _means([t.products(direction)[0] for t in self._traced])

    def mixed_product(self, direction: Tensors) -> list[Tensor | None]:
        """``(dg/dlambda)^T v`` for each tuned tensor of the training loss."""
        return _means([t.products(direction)[1] for t in self._traced]) if self._has_tensors else []

    @property
    def error(self) -> Tensor | None:
        """Estimated relative error of the products; None if they are exact."""
        return self._traced[0].error


def way_of(training: Training, second_order: SecondOrder) -> Callable[[], Way]:
    """What begins a sweep: how its gradients are traced, with products that are recorded if the training captures."""
    captured = training.captured(partial(double_backward, training), "the product with the training gradient's derivative")
    if captured is None or second_order != "reverse":
        return partial(way, second_order)
    return lambda: partial(Replayed, captured)


def check_second_order(value: object, owner: str) -> None:
    """Refuses anything but the name of a way.

    Raises:
        ValueError: with the names.
    """
    if value not in get_args(SecondOrder):
        raise ValueError(f"{owner}: second_order must be one of {', '.join(map(repr, get_args(SecondOrder)))}, got {value!r}.")


def _pulled(
    training: Training, outputs: Tensors, adjoints: Tensors, *, inputs: Tensors | None = None, retain_graph: bool = False
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    """Vector-Jacobian products for ``inputs`` (None: the parameters that have a gradient) and the tuned tensors."""
    tensors = training.hyperparameters.loss_tensors
    every = [p if g is not None else None for p, g in zip(training.params, outputs)] if inputs is None else inputs
    active = [t for t in every if t is not None]
    pairs = [(g, v) for g, v in zip(outputs, adjoints) if g is not None and v is not None]
    found = autodiff.gradients(
        [g for g, _ in pairs], [*active, *tensors], [v for _, v in pairs], retain_graph=retain_graph or None
    )
    pulled = iter(found[: len(active)])
    return [None if t is None else next(pulled) for t in every], found[len(active) :]


@cache
def _load_dual_formulas() -> None:
    """torch loads some formulas at the first dual number, and warns there of a deprecated function that it calls itself."""
    with warnings.catch_warnings(), forward_ad.dual_level():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        forward_ad.make_dual(torch.zeros(()), torch.zeros(()))


def _means(every: Sequence[Tensors]) -> list[Tensor | None]:
    if len(every) == 1:
        return list(every[0])
    present = [[t for t in of_one if t is not None] for of_one in zip(*every)]
    return [torch.stack(tensors).sum(0).div_(len(every)) if tensors else None for tensors in present]


def _disagreement(a: Tensors, b: Tensors) -> Tensor:
    pairs = [(x, y) for x, y in zip(a, b) if x is not None and y is not None]
    length = norm([y for _, y in pairs])
    return norm([x - y for x, y in pairs]) / length.masked_fill(~(length > 0), 1)


def _tangents(duals: Tensors) -> list[Tensor | None]:
    return [None if dual is None else forward_ad.unpack_dual(dual).tangent for dual in duals]
