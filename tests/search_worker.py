"""A worker on a search, for tests that kill it: begins a trial, says so, and never ends it."""

import sys
import time
from pathlib import Path

import optuna

from torch_hypergrad.search import create_study, objective_of

SPACE = {"x": {"type": "float", "low": -1.0, "high": 1.0}}
HEARTBEAT = 1


def main(url: str, begun: str) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)

    def hang(trial: optuna.Trial, settings: dict[str, float]) -> float:
        trial.report(0.5, 1)
        Path(begun).write_text(str(trial.number))
        time.sleep(600)
        return 0.0

    create_study(SPACE, storage=url, heartbeat=HEARTBEAT).optimize(objective_of(hang), n_trials=1)


if __name__ == "__main__":
    main(*sys.argv[1:])
