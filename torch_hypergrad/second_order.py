"""Products with the derivative of a training gradient: three ways to compute them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Literal, TypeAlias, get_args

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from . import autodiff
from .buckets import as_list
from .capture import Captured
from .records import State, Step
from .training import Training

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

    @abstractmethod
    def estimated_error(self, adj_grads: Tensors) -> Tensor | None:
        """The relative error of the products with ``adj_grads`` as far as it can be estimated; None if they are exact."""


class Reverse(TracedGradient):
    """Double backward: the gradient's own graph, gone through in reverse. Exact."""

    def __init__(self, training: Training, step: Step, state: State) -> None:
        self._training, self._state = training, state
        with training.at(state):
            self.loss, raw, _ = training.revisit(step, create_graph=True)
            self.grads = training.transform(raw)

    def pull(self, adj_grads: Tensors, *, again: bool = False) -> tuple[list[Tensor | None], list[Tensor | None]]:
        training = self._training
        with training.at(replace(self._state, buffers=None)):
            return _pulled(training, self.grads, adj_grads, retain_graph=again)

    def estimated_error(self, adj_grads: Tensors) -> Tensor | None:
        return None


class FirstOrder(TracedGradient):
    """What the ways without double backward share: gradients alone, at the state and near it."""

    def __init__(self, training: Training, step: Step, state: State) -> None:
        self._training, self._step, self._state = training, step, state
        if state.grads is None:
            with training.at(state):
                _, self._raw, _ = training.revisit(step, create_graph=False)
        else:
            self._raw = list(state.grads)
        self.grads = training.transform(self._raw)

    def pull(self, adj_grads: Tensors, *, again: bool = False) -> tuple[list[Tensor | None], list[Tensor | None]]:
        direction, direct = self._through_transform(adj_grads)
        products, mixed = self._products(direction)
        return products, [m if d is None else d if m is None else m + d for m, d in zip(mixed, direct)]

    @abstractmethod
    def _products(self, direction: Tensors) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """Derivative of the gradient, in parameters and tuned tensors, along ``direction`` in the parameters: as the
        second derivative is symmetric, it is the product with the transpose."""

    def _through_transform(self, adj_grads: Tensors) -> tuple[list[Tensor | None], list[Tensor | None]]:
        """The adjoint of the gradient before its transformation, and what goes to tuned tensors on the way."""
        training = self._training
        tensors = training.hyperparameters.loss_tensors
        if training.grad_transform is None:
            return list(adj_grads), [None] * len(tensors)
        raw = [None if g is None else autodiff.leaf(g) for g in self._raw]
        return _pulled(training, training.transform(raw), adj_grads, inputs=raw)


class Replayed(FirstOrder):
    """Double backward as one function of parameters, batch and direction, recorded once and replayed. Exact."""

    def __init__(self, captured: Captured, training: Training, step: Step, state: State) -> None:
        super().__init__(training, step, state)
        self._captured = captured

    def _products(self, direction: Tensors) -> tuple[list[Tensor | None], list[Tensor | None]]:
        training, state = self._training, self._state
        if state.buffers is not None:
            training.model_state.set_buffers(state.buffers)
        training.return_to(self._step)
        values = as_list(state.buckets, state.params, len(training.params))
        return self._captured((values, self._step.batch, list(direction)))

    def estimated_error(self, adj_grads: Tensors) -> Tensor | None:
        return None


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

    def _products(self, direction: Tensors) -> tuple[list[Tensor | None], list[Tensor | None]]:
        training = self._training
        with training.at(self._state), forward_ad.dual_level(), autodiff.explain_missing_forward_derivative():
            with torch.no_grad():
                for p, v in zip(training.params, direction):
                    if v is not None:
                        p.copy_(forward_ad.make_dual(p.detach(), v.reshape(p.shape)))
            _, grads, others = training.revisit(self._step, create_graph=False, also=training.hyperparameters.loss_tensors)
            return _tangents(grads), _tangents(others)

    def estimated_error(self, adj_grads: Tensors) -> Tensor | None:
        return None


class FiniteDifference(FirstOrder):
    r"""Central differences of gradients, :math:`(g(\theta + \epsilon v) - g(\theta - \epsilon v)) / 2\epsilon`.

    Needs first derivatives alone. The step is :math:`\epsilon = u^{1/3} (1 + |\theta|) / |v|` with u the rounding
    unit: there the error of the difference, of order :math:`\epsilon^2`, meets that of rounding, of order
    :math:`u/\epsilon`.
    """

    def _products(self, direction: Tensors) -> tuple[list[Tensor | None], list[Tensor | None]]:
        return self._difference(direction, self._distance(direction))

    def estimated_error(self, adj_grads: Tensors) -> Tensor | None:
        """How far the products with one and with two steps are apart."""
        direction, _ = self._through_transform(adj_grads)
        distance = self._distance(direction)
        near, far = (self._difference(direction, factor * distance)[0] for factor in (1, 2))
        pairs = [(a, b) for a, b in zip(near, far) if a is not None and b is not None]
        return norm([a - b for a, b in pairs]) / norm([a for a, _ in pairs])

    def _distance(self, direction: Tensors) -> Tensor:
        unit = max(torch.finfo(param.dtype).eps for param in self._state.params)
        length = norm(direction)
        return unit ** (1 / 3) * (1 + norm(self._state.params)) / length.masked_fill(~(length > 0), 1)

    def _difference(self, direction: Tensors, distance: Tensor) -> tuple[list[Tensor | None], list[Tensor | None]]:
        training = self._training
        ends = []
        for signed in (distance, -distance):
            with training.at(self._state, moved_by=(direction, signed)):
                _, grads, others = training.revisit(self._step, create_graph=False, also=training.hyperparameters.loss_tensors)
            ends.append([*grads, *others])
        found = [None if a is None or b is None else (a - b).mul_((0.5 / distance).to(a)) for a, b in zip(*ends)]
        return found[: len(training.params)], found[len(training.params) :]


WAYS: dict[str, type[Reverse] | type[Forward] | type[FiniteDifference]] = {
    "reverse": Reverse,
    "forward": Forward,
    "finite_difference": FiniteDifference,
}


def way_of(training: Training, second_order: SecondOrder) -> Callable[[Training, Step, State], TracedGradient]:
    """How the products are computed, recorded if the training captures."""
    captured = training.captured(partial(double_backward, training), "the product with the training gradient's derivative")
    if captured is None or second_order != "reverse":
        return WAYS[second_order]
    return partial(Replayed, captured)


def check_second_order(value: object, owner: str) -> None:
    """Refuses anything but the name of a way.

    Raises:
        ValueError: with the names.
    """
    if value not in WAYS:
        raise ValueError(f"{owner}: second_order must be one of {', '.join(map(repr, get_args(SecondOrder)))}, got {value!r}.")


def norm(tensors: Tensors) -> Tensor:
    """Euclidean norm of all tensors together, without waiting for the device."""
    found = [t for t in tensors if t is not None]
    return torch.stack([n.to(found[0].device) for n in torch._foreach_norm(found)]).norm() if found else torch.zeros(())


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


def _tangents(duals: Tensors) -> list[Tensor | None]:
    return [None if dual is None else forward_ad.unpack_dual(dual).tangent for dual in duals]
