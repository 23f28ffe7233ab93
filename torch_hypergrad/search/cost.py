"""What a search costs, counted in training steps."""

from __future__ import annotations

from optuna.study import Study, StudyDirection
from optuna.trial import FrozenTrial, TrialState

from ..hyper_optimizer import Evaluation, HyperOptimizer, HyperReport
from ..methods import DrMAD, ForwardMode, Implicit, Unrolled

COST = "cost"
"""The user attribute of a trial."""


def hyper_step_cost(hyper: HyperOptimizer, report: HyperReport | Evaluation, window: int) -> float:
    """A hyper step's cost in training steps, counted, not timed: a product with the Hessian is taken as 2
    training steps, a replayed step as 3, the validation gradient as 1 and a mixed product as 2.

    Args:
        hyper: who took it.
        report: what it said, for the number of products.
        window: training steps since the last one.
    """
    method = hyper._method
    if isinstance(method, Implicit):
        return 3 + 2 * (report.num_matvecs or 0) * method.num_batches
    if isinstance(method, ForwardMode):
        return 1 + 2 * window * sum(value.numel() for value in hyper.values().values())
    if isinstance(method, Unrolled) and method.truncation is not None:
        window = min(window, method.truncation)
    if isinstance(method, DrMAD):
        window = min(window, method.num_points or max(1, window // 10))
    return 1 + 3 * window


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
