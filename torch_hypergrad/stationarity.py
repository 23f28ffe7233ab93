"""The equation that holds at the training optimum, and its transposed derivatives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from . import autodiff, readings
from .buckets import as_list
from .curvature import Pull
from .errors import SolverError
from .records import State, Step
from .training import Training
from .vectors import Layout


class Stationarity:
    """The optimizer's F with parameters, gradient and tuned settings as independent leaves, and its transposed derivatives.

    Vectors are flat, over the parameters that have a gradient. How the gradient itself depends on the parameters is not
    known here: :meth:`product` is told.
    """

    def __init__(self, training: Training, step: Step, state: State, grads: Sequence[Tensor | None]) -> None:
        self._training, rule = training, training.rule
        assert rule.stationarity is not None
        state = training.optimizer_state.refine(state, [g is not None for g in grads])
        parts = [part for part in zip(state.buckets, state.params, state.rule_states) if grads[part[0].indices[0]] is not None]
        self._buckets = [bucket for bucket, _, _ in parts]
        self._rule_states = [rule_state for _, _, rule_state in parts]
        self._layout = Layout([bucket.shape for bucket in self._buckets])
        self._params = [autodiff.leaf(param) for _, param, _ in parts]
        self._grads = [autodiff.leaf(bucket.gather(grads)) for bucket in self._buckets]  # type: ignore[arg-type]
        of_group = training.hyperparameters.of_group
        self._tuned = [{s: autodiff.leaf(s.for_bucket(b, 0)) for s in of_group[b.group]} for b in self._buckets]
        self._settings = [training.settings(bucket, step, tuned) for bucket, tuned in zip(self._buckets, self._tuned)]
        with torch.enable_grad():
            self._values = [
                rule.stationarity(param, grad, rule_state, settings)
                for param, grad, rule_state, settings in zip(self._params, self._grads, self._rule_states, self._settings)
            ]
        self._diagonals: tuple[Tensor | float | None, Tensor | float] | None = None
        first = self._values[0]
        self._device, self._dtype = first.device, _widest([value.dtype for value in self._values])

    def product(self, v: Tensor, pull: Pull) -> Tensor:
        """``A^T v`` as a new vector, where ``pull`` takes the adjoint of the gradient further to the parameters.

        Raises:
            SolverError: if nothing depends on the parameters.
        """
        by_param, by_grad = self._derivatives(v)
        products = pull(self._per_parameter(self._split(by_grad)))
        if by_param is None and all(part is None for part in products):
            raise SolverError(
                "The training gradient does not depend on the parameters: the loss is linear in them and has no optimum. "
                "Use a strictly convex loss, weight decay, or method=Unrolled()."
            )
        vector = self.joined(products)
        return vector if by_param is None else by_param(vector)

    def _derivatives(self, v: Tensor) -> tuple[Callable[[Tensor], Tensor] | None, Tensor]:
        """What adds ``(dF/dtheta)^T v`` at a fixed gradient to a vector, None for zero; and ``(dF/dg)^T v``.

        An elementwise rule has diagonal derivatives, found once: a product is bound by memory, and this way it reads and
        writes the least.
        """
        if not self._training.rule.elementwise:
            found = self._pulled(v)
            return (None if found[0] is None else partial(torch.add, found[0])), _or_zeros(found[1], v)
        if self._diagonals is None:
            by_param, by_grad = self._pulled(torch.ones_like(v))
            of = None if by_param is None else _number_if_equal(by_param)
            self._diagonals = of, _number_if_equal(_or_zeros(by_grad, v))
        of_param, of_grad = self._diagonals
        by_grad = v if isinstance(of_grad, float) and of_grad == 1 else v * of_grad
        if of_param is None:
            return None, by_grad
        if isinstance(of_param, float):
            return (lambda vector: vector.add_(v, alpha=of_param)), by_grad
        return (lambda vector: vector.addcmul_(v, of_param)), by_grad

    def _pulled(self, v: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """``(dF/dtheta)^T v`` at a fixed gradient, and ``(dF/dg)^T v``; None for zero."""
        found = autodiff.gradients(self._values, [*self._params, *self._grads], self._split(v), retain_graph=True)
        half = len(self._buckets)
        pair = []
        for parts in (found[:half], found[half:]):
            filled = [torch.zeros_like(param) if part is None else part for param, part in zip(self._params, parts)]
            flat = [part.reshape(-1).to(self._device, self._dtype) for part in filled]
            pair.append(None if all(part is None for part in parts) else torch.cat(flat))
        return pair[0], pair[1]

    def pull_tuned(self, q: Tensor, totals: Sequence[Tensor]) -> list[Tensor | None]:
        """Adds ``(dF/dlambda)^T q`` of the tuned settings to their totals; gives ``(dF/dg)^T q`` for each parameter."""
        hyperparameters = self._training.hyperparameters
        leaves = [(b, setting, leaf) for b, tuned in zip(self._buckets, self._tuned) for setting, leaf in tuned.items()]
        inputs = [*self._grads, *(leaf for _, _, leaf in leaves)]
        found = autodiff.gradients(self._values, inputs, self._split(q), retain_graph=True)
        for (bucket, setting, _), part in zip(leaves, found[len(self._buckets) :]):
            if part is not None:
                setting.add_adjoint(totals[hyperparameters.settings.index(setting)], part, bucket, 0)
        return self._per_parameter(found[: len(self._buckets)])

    def joined(self, tensors: Sequence[Tensor | None]) -> Tensor:
        """One new flat vector from one tensor for each parameter, None for zero."""
        pieces = []
        for bucket in self._buckets:
            for i, shape in zip(bucket.indices, bucket.layout.shapes):
                tensor = tensors[i]
                filled = torch.zeros(shape, dtype=self._dtype, device=self._device) if tensor is None else tensor
                pieces.append(filled.reshape(-1).to(self._device, self._dtype))
        return torch.cat(pieces)

    def preconditioner(self) -> Tensor:
        """The diagonal that the optimizer divides its steps by, as a flat vector.

        Raises:
            SolverError: if an entry is not positive.
        """
        preconditioner = self._training.rule.preconditioner
        assert preconditioner is not None
        with torch.no_grad():
            parts = [preconditioner(state, settings) for state, settings in zip(self._rule_states, self._settings)]
        diagonal = torch.cat([part.reshape(-1).to(self._device, self._dtype) for part in parts])
        bad = int((~(diagonal > 0) | ~diagonal.isfinite()).sum())
        if bad:
            raise SolverError(
                f"preconditioner='second_moments': {bad} of {len(diagonal)} entries of sqrt(v) + eps are not positive and "
                "finite. Weights that never had a gradient have v = 0: give the optimizer an eps above 0, or pass "
                "preconditioner=None."
            )
        return diagonal

    def _split(self, v: Tensor) -> list[Tensor]:
        return [part.to(value.device, value.dtype) for part, value in zip(self._layout.split(v), self._values)]

    def _per_parameter(self, of_buckets: Sequence[Tensor | None]) -> list[Tensor | None]:
        return as_list(self._buckets, of_buckets, len(self._training.params))


def _or_zeros(tensor: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if tensor is None else tensor


def _number_if_equal(diagonal: Tensor) -> Tensor | float:
    """A number multiplies without being read for each entry; to know takes waiting for the device."""
    if not readings.at_once(diagonal) or not len(diagonal):
        return diagonal
    return float(diagonal[0]) if bool((diagonal == diagonal[0]).all()) else diagonal


def _widest(dtypes: Sequence[torch.dtype]) -> torch.dtype:
    widest = dtypes[0]
    for dtype in dtypes[1:]:
        widest = torch.promote_types(widest, dtype)
    return widest
