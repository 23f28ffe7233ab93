"""Tuning by scipy: the validation loss after training, as a function of all values."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import scipy.optimize
import torch
from numpy.typing import NDArray
from scipy.optimize import Bounds, OptimizeResult
from torch import Tensor
from tqdm import tqdm

from ..hyper_optimizer import HyperOptimizer
from ..safety.hyper_step import Evaluation
from ..solvers.base import check_positive_int
from .cross_validation import CrossValidation

Vector = NDArray[np.float64]

WITH_BOUNDS = ("L-BFGS-B", "trust-constr", "TNC", "SLSQP")
WITHOUT_BOUNDS = ("BFGS", "CG")
"""scipy's methods that follow gradients."""


FLAT, STEEP = 1e-5, 1e-3
"""A derivative below the one stops a search, one above the other is worth following."""


def minimize(
    hyper: HyperOptimizer | CrossValidation,
    val_batch: Any,
    train: Callable[[], Any],
    *,
    method: str = "L-BFGS-B",
    max_evals: int = 100,
    options: dict[str, Any] | None = None,
    callback: Callable[[Evaluation, dict[str, Tensor]], None] | None = None,
    progress: bool = True,
) -> OptimizeResult:
    r"""Minimizes the validation loss after training over the values of all hyperparameters, with scipy.

    What scipy moves are the leaves: logarithms where ``log=True``. Bounds are those of the hyperparameters.
    At the end the values are the best ones that were found, and training has been done there.

    Args:
        hyper: what is tuned. Its hyper optimizer is not used.
        val_batch: what ``evaluate`` is called with: for :class:`CrossValidation` one for each fold.
        train: trains at the current values, for instance ``lambda: fit(hyper, batch, tol=1e-8)`` with
            :class:`Implicit`, or with :class:`Unrolled` a function that calls ``restart()`` and then
            ``step`` for each step. Called once for each evaluation.
        method: scipy's name: ``"L-BFGS-B"``, ``"trust-constr"``, ``"TNC"`` or ``"SLSQP"``; where nothing has
            bounds, ``"BFGS"`` or ``"CG"`` too.
        max_evals: at most so many trainings, the last one for the best values aside.
        options: scipy's options of the method.
        callback: called after each evaluation with it and the values.
        progress: show a bar.

    Returns:
        scipy's result: ``x`` are the best leaves, ``fun`` the validation loss there, ``nfev`` the number of
        evaluations, ``success`` and ``message`` scipy's; ``hyperparameters`` are the best values by name,
        and ``evaluation`` is theirs.

    Raises:
        ValueError: for another method, one without bounds where there are some, or a start out of bounds.
        HypergradientError: of an evaluation; the values are then the best ones before.

    Warns:
        RuntimeWarning: if the search stopped where the derivative is small on a log scale alone: multiplied
            with a tiny value it vanishes, however much the loss falls further on. Start at a larger value.
    """
    search = _Search(hyper, val_batch, train, max_evals, callback)
    _check(method, search.bounds())
    check_positive_int(max_evals, "minimize: max_evals")
    with tqdm(total=max_evals, desc="minimize", disable=not progress, unit="training") as search.bar:
        result = _run(search, method, options or {})
    search.train_at_best()
    search.warn_of_log_scale()
    assert search.best is not None
    result.update(x=search.best_leaves, fun=search.best.val_loss, nfev=search.num_evals)
    result.update(jac=search.best_gradient, hyperparameters=search.best_values, evaluation=search.best)
    return result


def _run(search: _Search, method: str, options: dict[str, Any]) -> OptimizeResult:
    """scipy's search, to its end or that of the evaluations; after an error the best values are put back."""
    bounds = search.bounds()
    try:
        return scipy.optimize.minimize(
            search.value,
            search.leaves(),
            jac=True,
            method=method,
            bounds=bounds if method in WITH_BOUNDS and _any(bounds) else None,
            options=options,
        )
    except _EnoughError:
        message = f"max_evals={search.num_evals} was reached."
        return OptimizeResult(success=False, status=1, message=message)
    except BaseException:
        search.put_back()
        raise


class _Search:
    """Evaluations, the best of which is kept."""

    def __init__(
        self,
        hyper: HyperOptimizer | CrossValidation,
        val_batch: Any,
        train: Callable[[], Any],
        max_evals: int,
        callback: Callable[[Evaluation, dict[str, Tensor]], None] | None,
    ) -> None:
        self._hyper, self._val_batch, self._train = hyper, val_batch, train
        self._max_evals, self._callback = max_evals, callback
        self._folds = hyper.folds if isinstance(hyper, CrossValidation) else [hyper]
        self._hyperparameters = self._folds[0]._hyperparameters
        self._tuned = self._hyperparameters.all
        self._starts = [tuned.leaf.detach().clone() for tuned in self._tuned]
        self._trained: Vector = np.empty(0)
        self.num_evals = 0
        self.best: Evaluation | None = None
        self.best_leaves = self.best_gradient = self.leaves()
        self.best_values: dict[str, Tensor] = {}
        self.bar: tqdm | None = None

    def leaves(self) -> Vector:
        """The present leaves, as one vector."""
        return np.concatenate([tuned.leaf.detach().double().cpu().numpy().ravel() for tuned in self._tuned])

    def bounds(self) -> Bounds:
        """Those of the leaves."""
        pairs = [(tuned.scale.leaf_bounds, tuned.leaf.numel()) for tuned in self._tuned]
        low, high = (np.concatenate([np.full(n, pair[end]) for pair, n in pairs]) for end in (0, 1))
        return Bounds(low, high)

    def value(self, leaves: Vector) -> tuple[float, Vector]:
        """The validation loss and its derivative in the leaves, after training."""
        if self.num_evals >= self._max_evals:
            raise _EnoughError
        self._train_at(leaves)
        found = self._hyper.evaluate(self._val_batch)
        self.num_evals += 1
        gradient = self._leaf_gradient(found.hypergradient)
        if self.best is None or found.val_loss < self.best.val_loss:
            self.best, self.best_leaves, self.best_gradient = found, leaves.copy(), gradient
            self.best_values = self._values()
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix(best=f"{self.best.val_loss:.6g}")
        if self._callback is not None:
            self._callback(found, self._values())
        return found.val_loss, gradient

    def put_back(self) -> None:
        """Puts the best values back; the weights stay as they are."""
        self._move_to(self.best_leaves)

    def train_at_best(self) -> None:
        """Puts the best values back, and trains there."""
        if not np.array_equal(self._trained, self.best_leaves):
            self._train_at(self.best_leaves)

    def warn_of_log_scale(self) -> None:
        """Says where a derivative may have vanished because of the scale alone."""
        assert self.best is not None
        gradients = self._hyperparameters.from_named(self.best.hypergradient)
        for tuned, gradient, start in zip(self._tuned, gradients, self._starts):
            values = tuned.scale.values(tuned.leaf)
            stayed = (tuned.leaf.detach() - start).abs() < 1
            stuck = stayed & ((gradient * values).abs() < FLAT) & (gradient.abs() > STEEP)
            if tuned.scale.log and stuck.any():
                at, in_values = values[stuck][0], gradient[stuck][0]
                warnings.warn(
                    f"minimize stopped at {tuned.label!r} = {float(at):.3g} (close to where it began), with "
                    f"a derivative of the validation loss of {float(in_values):.3g}, but only "
                    f"{float(at * in_values):.3g} on the log scale, which multiplies it with the value: "
                    "begin at a larger value, init=1e-2 or the like.",
                    RuntimeWarning,
                    stacklevel=3,
                )

    def _train_at(self, leaves: Vector) -> None:
        self._move_to(leaves)
        self._train()
        self._trained = leaves.copy()

    def _move_to(self, leaves: Vector) -> None:
        self._hyper.begin_window()
        sizes = [tuned.leaf.numel() for tuned in self._tuned]
        parts = torch.from_numpy(leaves.copy()).split(sizes)
        for fold in self._folds:
            for tuned, part in zip(fold._hyperparameters.all, parts):
                tuned.set_leaf(part.view(tuned.leaf.shape).to(tuned.leaf))

    def _leaf_gradient(self, named: dict[str, Tensor]) -> Vector:
        gradients = zip(self._tuned, self._hyperparameters.from_named(named))
        parts = [tuned.scale.leaf_gradient(g, tuned.leaf) for tuned, g in gradients]
        return np.concatenate([part.double().cpu().numpy().ravel() for part in parts])

    def _values(self) -> dict[str, Tensor]:
        return self._hyperparameters.values()


def _check(method: str, bounds: Bounds) -> None:
    if method not in (*WITH_BOUNDS, *WITHOUT_BOUNDS):
        nearest = difflib.get_close_matches(str(method), (*WITH_BOUNDS, *WITHOUT_BOUNDS), n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(
            f"minimize: method must be one of {', '.join(map(repr, (*WITH_BOUNDS, *WITHOUT_BOUNDS)))}, got "
            f"{method!r}.{hint}"
        )
    if method in WITHOUT_BOUNDS and _any(bounds):
        raise ValueError(
            f"minimize: scipy's {method} keeps to no bounds, and hyperparameters have some (a setting's "
            "legal range is one). Take method='L-BFGS-B', or tune on a log scale without low and high."
        )


def _any(bounds: Bounds) -> bool:
    return bool(np.isfinite(bounds.lb).any() or np.isfinite(bounds.ub).any())


class _EnoughError(Exception):
    """No evaluations are left."""
