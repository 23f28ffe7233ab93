"""What a search costs, counted in training steps."""

from __future__ import annotations

from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ..hyper_optimizer import Evaluation, HyperOptimizer, HyperReport

COST = "cost"
"""The user attribute of a trial."""


def hyper_step_cost(hyper: HyperOptimizer, report: HyperReport | Evaluation, window: int) -> float:
    """A hyper step's cost in training steps, as its method counts it (:meth:`Method.cost`).

    Args:
        hyper: who took it.
        report: what it said, for the number of products.
        window: training steps since the last one.
    """
    num_values = sum(value.numel() for value in hyper.values().values())
    return hyper.method.cost(window, num_values, report.num_matvecs)


def best_so_far(study: Study) -> tuple[list[float], list[float]]:
    """The best value of finished trials against what all had cost by then, in the order in which they ended.

    The cost is the trials' user attribute ``"cost"``, in training steps, which :func:`hypergradients` counts;
    a trial without hypergradients sets it by ``trial.set_user_attr("cost", num_steps)``. Trials that were
    pruned or failed add to the cost alone.

    Returns:
        Costs and values of equal length, to draw as steps.

    Raises:
        ValueError: if a complete trial has no cost.
    """
    better = max if study.direction == StudyDirection.MAXIMIZE else min
    costs: list[float] = []
    values: list[float] = []
    total = 0.0
    for trial in sorted(_finished(study), key=_end):
        total += trial.user_attrs.get(COST, 0.0)
        if trial.value is not None and trial.state == TrialState.COMPLETE:
            if COST not in trial.user_attrs:
                raise ValueError(
                    f"Trial {trial.number} has no cost. Count it with hypergradients(trial, hyper), or by "
                    "trial.set_user_attr('cost', num_steps) in the objective."
                )
            costs.append(total)
            values.append(better([trial.value, *values[-1:]]))
    return costs, values


def _finished(study: Study) -> list[FrozenTrial]:
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]


def _end(trial: FrozenTrial) -> float:
    return trial.datetime_complete.timestamp() if trial.datetime_complete else 0.0
