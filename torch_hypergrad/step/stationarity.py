"""The equation that holds at the training optimum, and its transposed derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial, reduce
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..device import readings
from ..errors import SolverError
from ..ground import autodiff
from ..ground.buckets import Bucket
from ..ground.vectors import Layout
from ..tune.hypergradient import Hypergradient
from .state import PerParameter, State, Step
from .update import UpdateStage


class Derivatives(Protocol):
    """The transposed derivatives of F in parameters and gradient, as independent of each other."""

    def __call__(self, v: Tensor) -> tuple[Callable[[Tensor], Tensor] | None, Tensor]:
        """What adds ``(dF/dtheta)^T v`` to a vector, which it may write to, None for zero; and ``(dF/dg)^T
        v``."""


@dataclass(frozen=True)
class Space:
    """Flat vectors over the parameters of some buckets, which are some of ``num_params``."""

    buckets: tuple[Bucket, ...]
    num_params: int

    @cached_property
    def layout(self) -> Layout:
        """Where each bucket lies."""
        return Layout([bucket.shape for bucket in self.buckets])

    @cached_property
    def dtype(self) -> torch.dtype:
        """The widest of the buckets'."""
        return reduce(torch.promote_types, [bucket.dtype for bucket in self.buckets])

    def flat(self, tensors: Sequence[Tensor]) -> Tensor:
        """One new vector from tensors one after the other."""
        return torch.cat([tensor.reshape(-1).to(self.buckets[0].device, self.dtype) for tensor in tensors])

    def joined(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One new vector from one tensor for each of all parameters, None for zero."""
        places = [
            (i, shape) for bucket in self.buckets for i, shape in zip(bucket.indices, bucket.layout.shapes)
        ]
        zeros = partial(torch.zeros, dtype=self.dtype, device=self.buckets[0].device)
        return self.flat([zeros(shape) if (found := tensors[i]) is None else found for i, shape in places])

    def split(self, v: Tensor) -> list[Tensor]:
        """One tensor for each bucket, as the rule has them."""
        return [
            part.to(bucket.device, bucket.dtype) for part, bucket in zip(self.layout.split(v), self.buckets)
        ]

    def per_parameter(self, v: Tensor) -> list[Tensor | None]:
        """One tensor for each of all parameters."""
        pieces: list[Tensor | None] = [None] * self.num_params
        for bucket, part in zip(self.buckets, self.split(v)):
            for i, piece in bucket.scatter(part):
                pieces[i] = piece
        return pieces


class Diagonals(NamedTuple):
    """The derivatives of an elementwise F, which are diagonal. Found once: a product is bound by memory, and
    this way it reads and writes the least.

    Args:
        of_param: in the parameters; None for zero.
        of_grad: in the gradient.
    """

    of_param: Tensor | float | None
    of_grad: Tensor | float

    def __call__(self, v: Tensor) -> tuple[Callable[[Tensor], Tensor] | None, Tensor]:
        of_param, of_grad = self.of_param, self.of_grad
        by_grad = v if isinstance(of_grad, float) and of_grad == 1 else v * of_grad
        if of_param is None:
            return None, by_grad
        if isinstance(of_param, float):
            return (lambda vector: vector.add_(v, alpha=of_param)), by_grad
        return (lambda vector: vector.addcmul_(v, of_param)), by_grad


def product(
    space: Space, derivatives: Derivatives, v: Tensor, pull: Callable[[PerParameter], list[Tensor | None]]
) -> Tensor:
    """``A^T v`` as a new vector, A the derivative of F in the parameters, where ``pull`` takes the adjoint of
    the gradient further to them.

    Raises:
        SolverError: if nothing depends on the parameters.
    """
    by_param, by_grad = derivatives(v)
    products = pull(space.per_parameter(by_grad))
    if by_param is None and all(part is None for part in products):
        raise SolverError(
            "The training gradient does not depend on the parameters: the loss is linear in them and has no "
            "optimum. Use a strictly convex loss, weight decay, or method=Unrolled()."
        )
    vector = space.joined(products)
    return vector if by_param is None else by_param(vector)


class OptimumCondition:
    """The optimizer's F with parameters, gradient and tuned settings as independent leaves, and its
    transposed derivatives.

    Vectors are flat, over the parameters that have a gradient: those of ``space``. How the gradient itself
        depends on the
    parameters is not known here: :func:`product` is told.
    """

    def __init__(self, update: UpdateStage, step: Step, state: State, grads: PerParameter) -> None:
        self._rule = rule = update.rule
        assert rule.stationarity is not None
        refined = update.refined(state, [g is not None for g in grads])
        self._parts = [part for part in refined.parts if grads[part.bucket.indices[0]] is not None]
        buckets = [part.bucket for part in self._parts]
        self.space = Space(tuple(buckets), len(grads))
        self._params = [autodiff.leaf(part.param) for part in self._parts]
        self._grads = [autodiff.leaf(bucket.gather(grads)) for bucket in buckets]
        self._tuned = [update.leaves(bucket, 0) for bucket in buckets]
        self._settings = [update.settings(bucket, step, tuned) for bucket, tuned in zip(buckets, self._tuned)]
        try:
            with torch.enable_grad():
                self._values = [
                    rule.stationarity(param, grad, part.rule_state, settings)
                    for part, param, grad, settings in zip(
                        self._parts, self._params, self._grads, self._settings
                    )
                ]
        except KeyError as error:
            raise SolverError(
                f"The optimizer's optimum depends on {error} of its state, which is not there: it has taken "
                "no step. Call step(batch) before, or wrap an optimizer whose decay is added to the gradient."
            ) from error

    def value(self) -> Tensor:
        """F as a flat vector, without graph."""
        return self.space.flat([value.detach() for value in self._values])

    def derivatives(self) -> Derivatives:
        """Those of F in parameters and gradient: :class:`Diagonals` where the rule is elementwise."""
        if not self._rule.elementwise:
            return self._through_graph
        first = self._values[0]
        by_param, by_grad = self._pulled(
            torch.ones(self.space.layout.numel, dtype=self.space.dtype, device=first.device)
        )
        return Diagonals(None if by_param is None else _number_if_equal(by_param), _number_if_equal(by_grad))

    def _through_graph(self, v: Tensor) -> tuple[Callable[[Tensor], Tensor] | None, Tensor]:
        by_param, by_grad = self._pulled(v)
        return (None if by_param is None else partial(torch.add, by_param)), by_grad

    def _pulled(self, v: Tensor) -> tuple[Tensor | None, Tensor]:
        """``(dF/dtheta)^T v`` at a fixed gradient, None for zero; and ``(dF/dg)^T v``."""
        inputs = [*self._params, *self._grads]
        found = autodiff.gradients(self._values, inputs, self.space.split(v), retain_graph=True)
        filled = [torch.zeros_like(leaf) if part is None else part for leaf, part in zip(inputs, found)]
        half = len(self._parts)
        by_param = None if all(part is None for part in found[:half]) else self.space.flat(filled[:half])
        return by_param, self.space.flat(filled[half:])

    def pull_tuned(self, q: Tensor, into: Hypergradient) -> None:
        """Adds ``(dF/dlambda)^T q`` of the tuned settings."""
        leaves = [
            (p.bucket, setting, leaf)
            for p, tuned in zip(self._parts, self._tuned)
            for setting, leaf in tuned.items()
        ]
        found = autodiff.gradients(
            self._values, [leaf for _, _, leaf in leaves], self.space.split(q), retain_graph=True
        )
        for (bucket, setting, _), part in zip(leaves, found):
            if part is not None:
                into.add_setting(setting, part, bucket, 0)

    def preconditioner(self) -> Tensor:
        """The diagonal that the optimizer divides its steps by, as a flat vector.

        Raises:
            SolverError: if an entry is not positive.
        """
        preconditioner = self._rule.preconditioner
        assert preconditioner is not None
        with torch.no_grad():
            pairs = zip(self._parts, self._settings)
            diagonal = self.space.flat([preconditioner(part.rule_state, s) for part, s in pairs])
        bad = int((~(diagonal > 0) | ~diagonal.isfinite()).sum())
        if bad:
            raise SolverError(
                f"preconditioner='second_moments': {bad} of {len(diagonal)} entries of sqrt(v) + eps are not "
                "positive and finite. Weights that never had a gradient have v = 0: give the optimizer an "
                "eps above 0, or pass preconditioner=None."
            )
        return diagonal


def _number_if_equal(diagonal: Tensor) -> Tensor | float:
    """A number multiplies without being read for each entry; to know takes waiting for the device."""
    if not readings.at_once(diagonal) or not len(diagonal):
        return diagonal
    return float(diagonal[0]) if bool((diagonal == diagonal[0]).all()) else diagonal
