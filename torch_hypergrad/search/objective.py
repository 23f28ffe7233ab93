"""Objectives made from a function that builds and trains."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from optuna.exceptions import TrialPruned
from optuna.trial import BaseTrial, Trial

from ..errors import HypergradientError, NonFiniteError
from .heartbeat import watched
from .space import suggest
from .study import space_of

REASON = "pruned_because"
"""The user attribute of a trial that an error ended."""


def objective_of(train: Callable[[Trial, dict[str, Any]], Any]) -> Callable[[Trial], float]:
    """Optuna's objective, for ``study.optimize``, over the space of a study of :func:`create_study`.

    Args:
        train: ``train(trial, settings) -> validation loss``: builds with the settings by name, and trains.
            The trial is Optuna's, for ``trial.report``, or for :func:`hypergradients`.

    A ``HypergradientError`` or a loss that is not finite prunes the trial, with the reason as user attribute
    ``"pruned_because"``; another error stops the search, as in Optuna. Trials of workers that were killed are
    tried again (:func:`watched`).
    """

    def objective(trial: Trial) -> float:
        settings = suggest(trial, space_of(trial.study))
        with pruned_on_error(trial):
            value = train(trial, settings)
            try:
                loss = float(value)
            except (TypeError, ValueError) as error:
                raise TypeError(
                    f"train must return the validation loss as one number, got {value!r}."
                ) from error
            if not math.isfinite(loss):
                raise NonFiniteError(f"The validation loss is {loss}. These settings do not train.")
        return loss

    return watched(objective)


@contextmanager
def pruned_on_error(trial: BaseTrial) -> Iterator[None]:
    """Prunes the trial where a ``HypergradientError`` ends the block, and keeps the reason."""
    try:
        yield
    except HypergradientError as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        trial.set_user_attr(REASON, reason)
        raise TrialPruned(reason) from error
