"""Honest rivals: the same model with hyperparameters fixed, searched and tuned, or trained on more
examples."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from optuna.trial import TrialState

from .config import Config, ConfigError
from .run_folder import RunFolder, write_atomically
from .start import folder_of, run_in
from .stopping import StopRequest, TrainingError, stop_on_signals
from .study import COST, FOLDER, Search
from .workers import Job, workers

DEFAULT, TUNED = "fixed default", "tuned by hypergradients"
ON_PARTS = {"val": "validation set", "train_and_val": "both sets"}
SEARCHES = {"grid": "grid", "random": "random search"}  # in words; others by the name of their sampler


def of_seeds(config: Config, num_seeds: int) -> list[Config]:
    """The configuration with so many seeds, from its own on."""
    first = config.train.seed
    return [replace(config, train=replace(config.train, seed=first + i)) for i in range(num_seeds)]


@dataclass(frozen=True)
class Trained:
    """One run of a comparison."""

    config: Config
    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def __call__(self, stop: StopRequest) -> None:
        """Trains it, or goes on with it."""
        run_in(self.config, RunFolder(self.path), stop, quiet=True)

    @property
    def summary(self) -> dict[str, Any]:
        """Its results."""
        return json.loads(RunFolder(self.path).summary_file.read_text())

    @property
    def finished(self) -> bool:
        """Whether it has results."""
        return RunFolder(self.path).finished


def compare(config: Config, name: str, num_seeds: int, num_jobs: int) -> tuple[Path, list[Path], int | None]:
    """Trains every rival for every seed; what is there already is not trained again.

    Returns:
        The folder, the folders of the runs to compare as ``ROW/seed-N``, and the signal that stopped it or
        None.

    Raises:
        ConfigError: before anything is trained, or if the folder holds runs of another configuration.
        TrainingError: if the tuned run failed. A failed trial of a search is left out, as a search would.
    """
    if num_seeds < 1 or num_jobs < 1:
        raise ConfigError(f"--seeds and --jobs must be at least 1, got {num_seeds} and {num_jobs}.")
    if config.method is None:
        raise ConfigError("compare needs a configuration that tunes something: method is null.")
    folder = folder_of(config, f"compare-{name}")
    rivals = [Rivals(each, folder) for each in of_seeds(config, num_seeds)]
    for search in rivals[0].searches:
        search.check()
    with stop_on_signals() as stop, workers(num_jobs, stop) as pool:
        for of_seed in (Rivals.first_round, Rivals.second_round, Rivals.third_round):
            pool.run([job for rival in rivals for job in of_seed(rival)])
            if stop.signal is not None:
                return folder, [], stop.signal
    order = rivals[0].names
    rows = [row for rival in rivals for row in rival.rows()]
    return folder, sorted(rows, key=lambda row: order.index(row.parent.name)), None


class Rivals:
    """All that one seed trains: the tuned run, and its rivals."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._tuned = Trained(config, self._place(TUNED))
        self._default = Trained(_untuned(config), self._place(DEFAULT))

    @property
    def searches(self) -> list[Search]:
        """One for each sampler, over the untuned configuration."""
        compare, searched = self._config.compare, _untuned(self._config)
        budget = self._tuned.summary["cost"] if self._tuned.finished else None
        return [
            Search(
                searched,
                compare.space,
                self._folder / "trials" / _row(sampler) / f"seed-{self._config.train.seed}",
                sampler,
                budget=None if sampler == "grid" else budget,
                grid_points=compare.grid_points,
            )
            for sampler in compare.samplers
        ]

    @property
    def names(self) -> list[str]:
        """Of all rows, in their order."""
        searches = [_row(sampler) for sampler in self._config.compare.samplers]
        return [DEFAULT, *searches, TUNED, *(self._on(part) for part in ON_PARTS)]

    def first_round(self) -> list[Job]:
        """What needs no results."""
        return [self._tuned, self._default]

    def second_round(self) -> list[Job]:
        """Searches that cost what the tuned run cost.

        Raises:
            TrainingError: if there is no tuned run.
        """
        if not self._tuned.finished:
            raise TrainingError(
                f"The tuned run in {self._tuned.path} failed, so there is nothing to compare."
            )
        return list(self.searches)

    def third_round(self) -> list[Job]:
        """The best values of the first search, on other examples."""
        return list(self._on_other_parts())

    def rows(self) -> list[Path]:
        """The folders of the runs to compare; of a search a copy of its best, with the cost of all."""
        single = [run.path for run in (self._default, self._tuned, *self._on_other_parts()) if run.finished]
        samplers = zip(self._config.compare.samplers, self.searches)
        searched = [_copy(search, self._place(_row(sampler))) for sampler, search in samplers]
        return single + [row for row in searched if row is not None]

    def _place(self, row: str) -> Path:
        return self._folder / row / f"seed-{self._config.train.seed}"

    def _on(self, part: str) -> str:
        first = next(iter(self._config.compare.samplers), "grid")
        return f"best of the {SEARCHES.get(first, first)}, on {ON_PARTS[part]}"

    def _on_other_parts(self) -> list[Trained]:
        """As many training steps as the others take, which a scheduler is made for. On the validation set
        alone where it has what the training set lacks, clean labels."""
        best = next((_best(search) for search in self.searches), None)
        if best is None:
            return []
        steps = best.summary["steps"]
        parts = ["train_and_val", *(["val"] if self._config.task.get("label_noise") else [])]
        found = []
        for part in parts:
            train = replace(best.config.train, steps=steps, epochs=None, part=part)  # type: ignore[arg-type]
            found.append(Trained(replace(best.config, train=train), self._place(self._on(part))))
        return found


def _row(sampler: str) -> str:
    return f"best of a {SEARCHES.get(sampler, f'search by {sampler}')}"


def _untuned(config: Config) -> Config:
    """The same training without tuning."""
    train = replace(config.train, episodes=1, hyper_every=None, warmup=0)
    return replace(config, tune={}, method=None, train=train)


def _best(search: Search) -> Trained | None:
    """The trial with the least validation loss."""
    study = search.study()
    if not study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
        return None
    best = study.best_trial
    return Trained(search.config_of(best.params), Path(best.user_attrs[FOLDER]))


def _copy(search: Search, place: Path) -> Path | None:
    best = _best(search)
    if best is None:
        return None
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(best.path, place, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", ".lock"))
    trials = search.study().get_trials(deepcopy=False)
    folders = dict.fromkeys(trial.user_attrs[FOLDER] for trial in trials if FOLDER in trial.user_attrs)
    runs = [Trained(search.config, Path(folder)) for folder in folders]
    totals = {
        "cost": sum(trial.user_attrs.get(COST, 0.0) for trial in trials),
        "seconds": sum(run.summary["seconds"] for run in runs if run.finished),
        "num_trials": len(trials),
    }
    write_atomically(place / "summary.json", json.dumps(best.summary | totals, indent=2).encode())
    return place
