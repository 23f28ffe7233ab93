"""Signs of life of running trials, for storages that keep none of their own: journals."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from optuna.exceptions import UpdateFinishedTrialError
from optuna.logging import get_logger
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from .storage import retry

HEARTBEAT = "heartbeat"
"""The user attribute: of a study the seconds between two beats, of a trial the time of its last one."""


def watched(objective: Callable[[Trial], Any], interval: int | None = None) -> Callable[[Trial], Any]:
    """An objective whose trials are tried again if their worker is killed, in a journal as in a database.

    While a trial runs, a thread writes the time to the storage; after each trial those of dead workers are
    looked for. The clocks of the machines must agree to within a heartbeat.

    Args:
        objective: Optuna's.
        interval: seconds between two signs of life. None takes what :func:`create_study` left, which is
            nothing where the storage watches its workers by itself.
    """

    @wraps(objective)
    def run(trial: Trial) -> Any:
        seconds = trial.study.user_attrs.get(HEARTBEAT) if interval is None else interval
        if seconds is None:
            return objective(trial)
        try:
            with _beating(trial, seconds):
                return objective(trial)
        finally:
            retry_stale(trial.study, seconds)

    return run


@contextmanager
def _beating(trial: Trial, interval: float) -> Iterator[None]:
    done = threading.Event()

    def beat() -> None:
        while not done.wait(interval):
            try:
                trial.set_user_attr(HEARTBEAT, time.time())
            except UpdateFinishedTrialError:
                return
            except Exception as error:  # the storage may be back by the next beat
                get_logger(__name__).warning(f"Trial {trial.number} could not write its heartbeat: {error}")

    trial.set_user_attr(HEARTBEAT, time.time())
    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def retry_stale(study: Study, interval: float) -> None:
    """Marks trials without a sign of life for twice the interval as failed, and queues their settings."""
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if time.time() - _last_beat(trial) > 2 * interval:
            try:
                failed = study.tell(trial.number, state=TrialState.FAIL)
            except (ValueError, UpdateFinishedTrialError):  # another worker was first, or it has ended
                continue
            retry()(study, failed)


def _last_beat(trial: FrozenTrial) -> float:
    """Never for a trial that nobody watches. One that is tried again has its predecessor's beat at first."""
    if HEARTBEAT not in trial.user_attrs or trial.datetime_start is None:
        return float("inf")
    return max(trial.user_attrs[HEARTBEAT], trial.datetime_start.timestamp())
