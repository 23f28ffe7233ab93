"""One configuration with several seeds."""

from __future__ import annotations

from pathlib import Path

from .compare import Trained, of_seeds
from .config import Config, ConfigError
from .start import folder_of
from .stopping import TrainingError, stop_on_signals
from .workers import workers


def train_seeds(
    config: Config, name: str, num_seeds: int, num_jobs: int
) -> tuple[Path, list[Path], int | None]:
    """Trains a run for each seed, in ``NAME/seed-N`` of a new folder, or goes on with those that are there.

    Returns:
        The folder, the runs that are finished, and the signal that stopped it or None.

    Raises:
        ConfigError: before anything is trained.
        TrainingError: if none could be finished.
    """
    if num_seeds < 1 or num_jobs < 1:
        raise ConfigError(f"--seeds and --jobs must be at least 1, got {num_seeds} and {num_jobs}.")
    folder = folder_of(config, f"seeds-{name}")
    runs = [Trained(each, folder / name / f"seed-{each.train.seed}") for each in of_seeds(config, num_seeds)]
    with stop_on_signals() as stop, workers(num_jobs, stop) as pool:
        failures = pool.run(runs)
    finished = [run.path for run in runs if run.finished]
    if stop.signal is None and not finished:
        raise TrainingError(f"No run in {folder} was finished. {failures[-1]}")
    return folder, finished, stop.signal
