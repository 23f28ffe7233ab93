"""Hypergradients inside a trial: an outer search for what has no gradient, and the rest tuned on the way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from optuna.exceptions import TrialPruned
from optuna.trial import BaseTrial
from torch import Tensor

from ..hyper_optimizer import HyperOptimizer, HyperReport
from .cost import COST, hyper_step_cost
from .objective import pruned_on_error

TUNED = "tuned"
"""The user attribute with the values where hypergradients left them."""

MAX_NUMBERS = 100


class TrialTuning:
    """A HyperOptimizer in a trial of Optuna. Made by :func:`hypergradients`.

    Args:
        trial: the trial.
        hyper: what tunes in it.
    """

    def __init__(self, trial: BaseTrial, hyper: HyperOptimizer) -> None:
        if not isinstance(hyper, HyperOptimizer):
            raise TypeError(
                f"hypergradients(trial, hyper) takes a HyperOptimizer, got {type(hyper).__name__}."
            )
        self._trial, self._hyper = trial, hyper
        self._num_steps = self._window = 0
        self.cost = 0.0

    def step(self, batch: Any) -> Tensor:
        """``hyper.step``, counted."""
        loss = self._hyper.step(batch)
        self._num_steps += 1
        self._window += 1
        self.spend(1)
        return loss

    def hyper_step(self, *args: Any, **options: Any) -> HyperReport:
        """``hyper.hyper_step``, counted; its validation loss is reported to the pruner.

        Raises:
            TrialPruned: if the pruner gives the trial up.
            HypergradientError: as ``hyper.hyper_step``; outside of the block it is a ``TrialPruned``.
        """
        report = self._hyper.hyper_step(*args, **options)
        self.spend(hyper_step_cost(self._hyper, report, self._window))
        self._window = 0
        self.report(report.val_loss)
        return report

    def spend(self, num_steps: float) -> None:
        """Adds to the cost what is not trained by :meth:`step`: a ``fit`` of so many gradients."""
        self.cost += num_steps

    def report(self, val_loss: float) -> None:
        """Tells the pruner the validation loss after so many training steps, and stores what was spent.

        Raises:
            TrialPruned: if the pruner gives the trial up.
        """
        self.store()
        self._trial.report(val_loss, self._num_steps)
        if self._trial.should_prune():
            raise TrialPruned(f"Validation loss {val_loss:.6g} after {self._num_steps} training steps.")

    def store(self) -> None:
        """Writes cost and values to the trial's user attributes ``"cost"`` and ``"tuned"``."""
        self._trial.set_user_attr(COST, self.cost)
        self._trial.set_user_attr(
            TUNED, {name: _stored(value) for name, value in self._hyper.values().items()}
        )


@contextmanager
def hypergradients(trial: BaseTrial, hyper: HyperOptimizer) -> Iterator[TrialTuning]:
    """Gives an Optuna objective hypergradients: inside the block :class:`TrialTuning` trains and tunes.

    The pruner sees the validation loss of each hyper step. A ``HypergradientError`` prunes the trial, with
    the reason as user attribute ``"pruned_because"``. However it ends, its user attributes are ``"cost"``, in
    training steps as ``torch-hypergrad compare`` counts them, and ``"tuned"``: the values by name, of more
    than a hundred numbers their smallest, mean and largest.

    Args:
        trial: of the objective.
        hyper: a HyperOptimizer, made from what the trial suggests.

    Example:
        >>> import optuna, torch
        >>> from functools import partial
        >>> from torch_hypergrad import Hyperparameter, Unrolled
        >>> optuna.logging.set_verbosity(optuna.logging.WARNING)
        >>> batch = torch.ones(2, 3), torch.ones(2, 1)
        >>> def objective(trial):
        ...     width = trial.suggest_int("width", 1, 4)
        ...     model = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Linear(width, 1))
        ...     hyper = HyperOptimizer(
        ...         model, torch.optim.SGD(model.parameters(), lr=0.01),
        ...         lambda model, batch: (model(batch[0]) - batch[1]).square().mean(),
        ...         [Hyperparameter("lr")], Unrolled(), partial(torch.optim.SGD, lr=1e-4))
        ...     with hypergradients(trial, hyper) as tuning:
        ...         for step in range(1, 11):
        ...             tuning.step(batch)
        ...             if step % 5 == 0:
        ...                 tuning.hyper_step(batch)
        ...     return float(hyper.validation_loss(batch))
        >>> study = optuna.create_study()
        >>> study.optimize(objective, n_trials=2)
        >>> study.trials[0].user_attrs["cost"]
        42.0
    """
    tuning = TrialTuning(trial, hyper)
    with pruned_on_error(trial):
        try:
            yield tuning
        finally:
            tuning.store()


def _stored(value: Tensor) -> Any:
    if value.numel() <= MAX_NUMBERS:
        return value.tolist()
    return {"min": value.min().item(), "mean": value.mean().item(), "max": value.max().item()}
