"""Honest rivals: the same model with hyperparameters fixed, searched and tuned, or trained on more images."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import torch
from scipy.stats import loguniform, uniform
from sklearn.model_selection import ParameterSampler
from tqdm import tqdm

from .build import make_optimizer
from .config import CompareConfig, Config, ConfigError
from .run_folder import RunFolder, write_atomically
from .start import folder_of, run_in
from .stopping import StopRequest, TrainingError, stop_on_signals

DEFAULT, GRID, RANDOM = "fixed default", "best of a grid", "best of a random search"
TUNED, BOTH, VAL_ALONE = (
    "tuned by hypergradients",
    "best of the grid, on both sets",
    "best of the grid, on validation set",
)
ROWS = (DEFAULT, GRID, RANDOM, TUNED, VAL_ALONE, BOTH)


@dataclass(frozen=True)
class Trial:
    """One run of a comparison."""

    config: Config
    path: Path

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
    _check(config, num_seeds, num_jobs)
    folder = folder_of(config, f"compare-{name}")
    seeds = [
        replace(config, train=replace(config.train, seed=config.train.seed + i)) for i in range(num_seeds)
    ]
    rivals = [Rivals(seed, folder) for seed in seeds]
    with stop_on_signals() as stop, _workers(num_jobs, stop) as workers:
        for of_seed in (Rivals.first_round, Rivals.second_round):
            workers.run([trial for rival in rivals for trial in of_seed(rival)])
            if stop.signal is not None:
                return folder, [], stop.signal
    rows = [row for rival in rivals for row in rival.rows()]
    return folder, sorted(rows, key=lambda row: ROWS.index(row.parent.name)), None


def _check(config: Config, num_seeds: int, num_jobs: int) -> None:
    if num_seeds < 1 or num_jobs < 1:
        raise ConfigError(f"--seeds and --jobs must be at least 1, got {num_seeds} and {num_jobs}.")
    if config.method is None:
        raise ConfigError("compare needs a configuration that tunes something: method is null.")
    for value in (config.compare.low, config.compare.high):
        named = config.optimizer | {config.compare.setting: value}
        try:
            make_optimizer(named, "optimizer", [torch.zeros(1, requires_grad=True)])
        except ConfigError as error:
            raise ConfigError(f"compare.setting={config.compare.setting}: {error}") from error


class Rivals:
    """All that one seed trains: the tuned run, its rivals, and the trials of their searches."""

    def __init__(self, config: Config, folder: Path) -> None:
        self._config, self._folder = config, folder
        self._tuned = Trial(config, self._place(TUNED))
        self._default = Trial(_fixed(config), self._place(DEFAULT))
        self._grid = self._search(GRID, _grid(config.compare))
        self._random: list[Trial] = []

    def first_round(self) -> list[Trial]:
        """What needs no results."""
        return [self._tuned, self._default, *self._grid]

    def second_round(self) -> list[Trial]:
        """A random search that costs what the tuned run cost, and the grid's best value on other images."""
        if not self._tuned.finished:
            raise TrainingError(
                f"The tuned run in {self._tuned.path} failed, so there is nothing to compare."
            )
        steps_of_trial = self._tuned.summary["steps"] / self._config.train.episodes
        num_trials = max(1, round(self._tuned.summary["cost"] / steps_of_trial))
        self._random = self._search(RANDOM, _random(self._config, num_trials))
        return [*self._random, *self._on_other_parts()]

    def rows(self) -> list[Path]:
        """The folders of the runs to compare; of a search a copy of its best, with the cost of all."""
        single = [
            trial.path for trial in (self._default, self._tuned, *self._on_other_parts()) if trial.finished
        ]
        searched = [
            _copy(trials, self._place(row)) for row, trials in ((GRID, self._grid), (RANDOM, self._random))
        ]
        return single + [row for row in searched if row is not None]

    def _place(self, row: str) -> Path:
        return self._folder / row / f"seed-{self._config.train.seed}"

    def _search(self, row: str, values: Iterable[float]) -> list[Trial]:
        setting, place = (
            self._config.compare.setting,
            self._folder / "trials" / row / f"seed-{self._config.train.seed}",
        )
        quiet = replace(self._config, output=replace(self._config.output, tensorboard=False))
        return [
            Trial(_fixed(quiet, **{setting: value}), place / f"{setting}={value:.4g}") for value in values
        ]

    def _on_other_parts(self) -> list[Trial]:
        """As many training steps as the others take, which a scheduler is made for."""
        best = _best(self._grid)
        if best is None:
            return []
        same_length = replace(best.config.train, steps=best.summary["steps"], epochs=None)
        sets = {BOTH: "train_and_val"} | ({VAL_ALONE: "val"} if self._config.task.get("label_noise") else {})
        return [
            Trial(replace(best.config, train=replace(same_length, part=part)), self._place(row))  # type: ignore[arg-type]
            for row, part in sets.items()
        ]


def _fixed(config: Config, **options: float) -> Config:
    """The same training without tuning."""
    return replace(
        config,
        tune={},
        method=None,
        optimizer=config.optimizer | options,
        train=replace(config.train, episodes=1, hyper_every=None, warmup=0),
    )


def _grid(search: CompareConfig) -> list[float]:
    space = np.geomspace if search.log else np.linspace
    return space(search.low, search.high, search.grid_size).tolist()


def _random(config: Config, num_trials: int) -> list[float]:
    search = config.compare
    spread = (
        loguniform(search.low, search.high) if search.log else uniform(search.low, search.high - search.low)
    )
    drawn = ParameterSampler({search.setting: spread}, num_trials, random_state=config.train.seed)
    return [float(draw[search.setting]) for draw in drawn]


def _best(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the least validation loss."""
    return min(
        (t for t in trials if t.finished), key=lambda trial: trial.summary["val"]["loss"], default=None
    )


def _copy(trials: Sequence[Trial], place: Path) -> Path | None:
    best = _best(trials)
    if best is None:
        return None
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(best.path, place, ignore=shutil.ignore_patterns("checkpoints", "tensorboard", ".lock"))
    summaries = [trial.summary for trial in trials if trial.finished]
    totals = {key: sum(summary[key] for summary in summaries) for key in ("cost", "seconds")} | {
        "num_trials": len(trials)
    }
    write_atomically(place / "summary.json", json.dumps(best.summary | totals, indent=2).encode())
    return place


# ---- processes ---------------------------------------------------------------------------------------------

_stop_workers: Event


def _workers(num_jobs: int, stop: StopRequest) -> Workers:
    return ThisProcess(stop) if num_jobs == 1 else Processes(num_jobs, stop)


class WorkerStop(StopRequest):
    """The request of the main process, as a worker sees it."""

    @property
    def requested(self) -> bool:
        """Whether to stop after this step."""
        return _stop_workers.is_set()


def _begin_worker(event: Event) -> None:
    global _stop_workers
    _stop_workers = event
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process hears them, and sets the event
        signal.signal(number, signal.SIG_IGN)
    Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Also where it was killed and could tell nobody."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _work(trial: Trial, stop: StopRequest) -> str | None:
    """Runs a trial, also one that was begun; why it failed, if it did."""
    try:
        run_in(trial.config, RunFolder(trial.path), stop, quiet=True)
    except TrainingError as error:
        return str(error)
    return None


class Workers(ABC):
    """Who runs trials."""

    def __enter__(self) -> Workers:
        return self

    @abstractmethod
    def __exit__(self, *_: object) -> None:
        """Ends what was begun."""

    def run(self, trials: Sequence[Trial]) -> None:
        """Runs them all, or until a stop is requested; a bar counts them."""
        with tqdm(total=len(trials), desc="compare", unit="run", dynamic_ncols=True) as bar:
            for trial, failure in self.results(trials):
                if failure is not None:
                    bar.write(f"{trial.path}: {failure}")
                bar.update()

    @abstractmethod
    def results(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, str | None]]:
        """Each trial when it has ended, and why it failed, if it did."""


class ThisProcess(Workers):
    """One trial after the other."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def __exit__(self, *_: object) -> None:
        """There is nothing to end."""

    def results(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, str | None]]:
        for trial in trials:
            if not self._stop.requested:
                yield trial, _work(trial, self._stop)


class Processes(Workers):
    """Several at a time, each in a process that ends with this one."""

    def __init__(self, num_jobs: int, stop: StopRequest) -> None:
        context = multiprocessing.get_context("spawn")
        self._event, self._stop = context.Event(), stop
        self._pool = ProcessPoolExecutor(num_jobs, context, _begin_worker, (self._event,))

    def __exit__(self, *_: object) -> None:
        self._event.set()
        self._pool.shutdown(cancel_futures=True)

    def results(self, trials: Sequence[Trial]) -> Iterator[tuple[Trial, str | None]]:
        futures = {self._pool.submit(_work, trial, WorkerStop()): trial for trial in trials}
        for future in self._completed(futures):
            yield futures[future], future.result()

    def _completed(self, futures: Iterable[Future[str | None]]) -> Iterator[Future[str | None]]:
        left = set(futures)
        while left:
            done, left = wait(left, timeout=0.2, return_when=FIRST_COMPLETED)
            yield from done
            if self._stop.requested and not self._event.is_set():
                self._event.set()
                left = {future for future in left if not future.cancel()}
