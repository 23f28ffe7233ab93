"""Training to a tolerance, by scipy, at the current hyperparameters."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..errors import SolverError
from ..hyper_optimizer import NOT_GIVEN, HyperOptimizer
from ..methods import Implicit
from ..safety.checks import validation_batches
from ..solvers.base import check_number, check_positive_int
from ..step.inner_problem import InnerProblem
from ..step.second_order import ways
from ..step.state import State

FitMethod = Literal["lbfgs", "newton", "cg-newton"]

Vector = NDArray[np.float64]

_OF_SCIPY: dict[str, tuple[str, dict[str, Any]]] = {
    "lbfgs": ("L-BFGS-B", {"ftol": 0.0, "gtol": 0.0, "maxcor": 20}),
    "newton": ("trust-exact", {"gtol": 0.0}),
    "cg-newton": ("trust-ncg", {"gtol": 0.0}),
}
"""scipy's names, with its own rules for stopping off: the norm of the gradient decides alone."""


@dataclass(frozen=True)
class Fit:
    """How an inner problem was solved.

    Args:
        num_gradients: how often loss and gradient were computed on all batches.
        num_products: how many products with the Hessian were.
        grad_norm: the Euclidean norm of the gradient, weight decay included, at the end.
        loss: the training loss, weight decay included, at the end.
    """

    num_gradients: int
    num_products: int
    grad_norm: float
    loss: float


def fit(
    hyper: HyperOptimizer,
    batch: Any = NOT_GIVEN,
    *,
    batches: Iterable[Any] | None = None,
    tol: float,
    method: FitMethod = "lbfgs",
    max_iter: int = 1000,
) -> Fit:
    r"""Trains to the optimum of the training loss with its weight decay, from the current weights, until
    :math:`\|\nabla f\| \le tol`, and records the batches: what follows is ``hyper.evaluate`` or
    ``hyper.hyper_step``.

    Random numbers are the same in each evaluation, so that dropout gives one fixed function. The state of the
    wrapped optimizer is left alone.

    Args:
        hyper: with ``method=Implicit(...)`` and an optimizer whose decay is added to the gradient, as SGD's
            and Adam's is.
        batch: what ``train_loss`` is called with.
        batches: in its place, several of them, over which the loss is averaged; ``Implicit`` needs
            ``num_batches`` for all.
        tol: the norm of the gradient, weight decay included, to stop at.
        method: ``"lbfgs"``, by gradients alone; ``"newton"``, with the whole Hessian, for up to some hundreds
            of weights; ``"cg-newton"``, by products with it. They are scipy's L-BFGS-B, trust-exact and
            trust-ncg.
        max_iter: at most so many iterations.

    Raises:
        SolverError: if the tolerance was not reached; the weights are the best that were found.
        NonFiniteError: if the training loss is not finite at the current weights.
        TypeError, ValueError: for other methods or optimizers, numbers out of range, or too few
            ``num_batches``.

    Source: for hypergradients Pedregosa 2016, algorithm 1.
    """
    _check_options(tol, method, max_iter)
    given = _checked_batches(hyper, batch, batches)
    problem, implicit = hyper._problem, hyper.method
    assert isinstance(implicit, Implicit)
    way = ways(problem.transition.gradient.untransformed(), implicit.second_order)()
    with problem.live.model.autocast_for_losses(), problem.readings.before_errors():
        with problem.live.preserved():
            steps = [problem.live.begin(hyper._number, one, None) for one in given]
            search = _Search(InnerProblem(problem, steps, way), tol)
            search.run(method, max_iter)
            problem.readings.read()
        problem.live.write(search.state())
    hyper.begin_window()  # batches of before are no part of this problem
    for one in given:
        hyper.record(one)
    if not search.best.grad_norm <= tol:
        raise SolverError(_unfinished(search.best, tol, method, search.message))
    return search.best


class _Search:
    """One minimization, which stops as soon as the gradient is small enough."""

    def __init__(self, inner: InnerProblem, tol: float) -> None:
        self._inner, self._tol, self._x = inner, tol, inner.start
        self._products: tuple[Vector, Callable[[Tensor], Tensor]] | None = None
        self._num_gradients = self._num_products = 0
        self.best = Fit(0, 0, math.inf, math.inf)
        self.message = ""

    def run(self, method: FitMethod, max_iter: int) -> None:
        """Searches, and leaves what was found in ``best``."""
        name, options = _OF_SCIPY[method]
        curvature = {"lbfgs": {}, "newton": {"hess": self._matrix}, "cg-newton": {"hessp": self._product}}
        second: dict[str, Any] = curvature[method]  # type: ignore[assignment]
        try:
            while True:
                before = self.best.grad_norm
                found = scipy.optimize.minimize(
                    self._value,
                    self._x.double().cpu().numpy(),
                    jac=True,
                    method=name,
                    options={**options, "maxiter": max_iter},
                    **second,
                )
                self.message = str(found.message)
                if found.status == 1 or not self.best.grad_norm < before / 2:
                    break  # else rounding has ended a search that may go on afresh
            if method != "lbfgs":  # the loss is flat to its last digit before the gradient is
                start, options = self._x.double().cpu().numpy(), {"maxiter": 20, "fatol": 0.0, "xatol": 0.0}
                scipy.optimize.root(lambda x: self._value(x)[1], start, method="krylov", options=options)
        except _ReachedError:
            return
        finally:
            counts = {"num_gradients": self._num_gradients, "num_products": self._num_products}
            self.best = replace(self.best, **counts)

    def state(self) -> State:
        """The state with the best parameters."""
        return self._inner.state(self._x)

    def _value(self, x: Vector) -> tuple[float, Vector]:
        at = self._tensor(x)
        loss, gradient = self._inner.value(at)
        self._num_gradients += 1
        norm = float(gradient.norm())
        if not math.isfinite(norm):
            return math.inf, np.zeros_like(x)
        if norm < self.best.grad_norm:
            self._x, self.best = at, replace(self.best, grad_norm=norm, loss=float(loss))
        if norm <= self._tol:
            raise _ReachedError
        return float(loss), gradient.double().cpu().numpy()

    def _product(self, x: Vector, v: Vector) -> Vector:
        if self._products is None or not np.array_equal(self._products[0], x):
            self._products = x.copy(), self._inner.hessian(self._tensor(x))
        self._num_products += 1
        return self._products[1](self._tensor(v)).double().cpu().numpy()

    def _matrix(self, x: Vector) -> NDArray[np.float64]:
        matrix = np.stack([self._product(x, row) for row in np.eye(len(x))])
        return (matrix + matrix.T) / 2

    def _tensor(self, x: Vector) -> Tensor:
        return torch.from_numpy(x.copy()).to(self._inner.start)


class _ReachedError(Exception):
    """The gradient is small enough."""


def _check_options(tol: Any, method: Any, max_iter: Any) -> None:
    check_number(tol, "fit: tol", positive=True)
    check_positive_int(max_iter, "fit: max_iter")
    if method not in _OF_SCIPY:
        raise ValueError(f"fit: method must be one of {', '.join(map(repr, _OF_SCIPY))}, got {method!r}.")


def _checked_batches(hyper: HyperOptimizer, batch: Any, batches: Iterable[Any] | None) -> list[Any]:
    """The batches. Refuses what the hypergradient would not be about."""
    if not isinstance(hyper.method, Implicit):
        raise TypeError(
            "fit trains to the optimum that method=Implicit(...) differentiates, and the HyperOptimizer has "
            f"{type(hyper.method).__name__}, which differentiates training steps. Call step(batch), or take "
            "method=Implicit(...)."
        )
    given = list(validation_batches(batch, NOT_GIVEN, batches, None).batches)
    if not given:
        raise ValueError("fit: batches is empty: there is nothing to train on.")
    if len(given) > hyper.method.num_batches:
        raise ValueError(
            f"fit trains on {len(given)} batches, and Implicit(num_batches={hyper.method.num_batches}) "
            "would differentiate the optimum on the last of them alone. Pass Implicit(..., "
            f"num_batches={len(given)}), or one batch of all."
        )
    return given


def _unfinished(best: Fit, tol: float, method: str, message: str) -> str:
    methods = {"lbfgs": ", method='newton' (small models) or 'cg-newton'", "cg-newton": ", method='newton'"}
    other = methods.get(method, "")
    return (
        f"fit came to a gradient of norm {best.grad_norm:.3g} after {best.num_gradients} gradients, and was "
        f"to reach tol={tol:.3g} (scipy's {_OF_SCIPY[method][0]} says: {message}). The weights are the best "
        f"that were found. Call it again to go on, pass a larger max_iter{other}, train in float64, or take "
        "a larger tol."
    )
