"""A search whose trials are runs."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import optuna
import yaml
from optuna.samplers import GridSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, Trial, TrialState

from ..search import create_study, make_sampler, objective_of
from .build import build
from .config import CompareConfig, Config, ConfigError
from .edits import FREE, differences, told
from .messages import one_line
from .parsing import config_with
from .run_folder import RunFolder, as_dict
from .start import run_in
from .stopping import StopRequest, TrainingError

COST, FOLDER, REASON, SKIPPED, CONFIG = "cost", "folder", "pruned_because", "skipped", "config"
LOCAL = (*FREE, "train.device", "task.root", "task.download")  # what may differ from machine to machine
STARTED = (TrialState.RUNNING, TrialState.COMPLETE, TrialState.PRUNED)
LONGEST_NAME = 100


class TakenBackError(Exception):
    """A trial that a signal ended, which is queued again; or one too many, before it trains."""


@dataclass(frozen=True)
class Search:
    """A search over keys of a configuration. Hypergradients tune what is under ``tune`` inside each trial.

    Args:
        config: what the trials have in common.
        space: what is searched, by dotted keys of the configuration.
        folder: where the trials' runs are, and the study where no storage is given.
        sampler: a name of :data:`torch_hypergrad.search.SAMPLERS`.
        pruner: a name of :data:`torch_hypergrad.search.PRUNERS`; it sees the validation loss of each
            evaluation.
        num_trials: how many are trained, however many workers there are: those that run, are complete or
            pruned. One that failed, or lost its worker, is made up for.
        budget: or when the trials together cost so many training steps, to the nearest trial: another begins
            if half of it, at the mean cost, still fits. Running ones are taken to cost the mean at least;
            before the first has ended nothing is known, and each worker begins one.
        storage: a URL that others can join by. None is a file in the folder.
        name: of the study.
        grid_points: of the sampler grid: values of each range.
    """

    config: Config
    space: Mapping[str, Any]
    folder: Path
    sampler: str = "tpe"
    pruner: str = "none"
    num_trials: int | None = None
    budget: float | None = None
    storage: str | None = None
    name: str = "search"
    grid_points: int = 5

    def __str__(self) -> str:
        return str(self.folder)

    # ---- the study -----------------------------------------------------------------------------------------

    def check(self) -> None:
        """Builds the first and the last point of the space, and trains nothing.

        Raises:
            ConfigError: a space, sampler, pruner or storage that is none, and keys that the configuration
                does not have.
        """
        if not self.space:
            raise ConfigError(
                "space is empty, so there is nothing to search. Give it keys of the configuration, such as "
                "space: {optimizer.lr: {type: float, low: 1e-3, high: 1, log: true}}."
            )
        self.study(in_memory=True)
        for place in (0, -1):
            build(self.config_of({key: _end(entry, place) for key, entry in self._stored_space().items()}))

    def study(self, in_memory: bool = False) -> Study:
        """Optuna's study, begun or gone on with.

        Raises:
            ConfigError: one line; see :func:`create_study`.
        """
        storage = None if in_memory else self.storage
        if storage is None and not in_memory:
            self.folder.mkdir(parents=True, exist_ok=True)
            storage = f"journal:///{(self.folder / 'study.log').resolve()}"
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # what became of a trial is told here
        space, seed = self._stored_space(), self.config.train.seed
        try:
            grid = self.sampler == "grid"
            sampler = make_sampler("grid", space, points=self.grid_points) if grid else self.sampler
            study = create_study(
                space, name=self.name, storage=storage, sampler=sampler, pruner=self.pruner, seed=seed
            )
        except (TypeError, ValueError, ConnectionError, ModuleNotFoundError) as error:
            raise ConfigError(f"search: {one_line(error)}") from error
        self._check_same(study)
        return study

    def _check_same(self, study: Study) -> None:
        """Refuses a study whose trials have another configuration in common; writes down that of a new
        one."""
        here = as_dict(self.config)
        there = study.user_attrs.get(CONFIG)
        if there is None:
            study.set_user_attr(CONFIG, here)
            return
        changes = {
            path: pair for path, pair in differences(there, here).items() if not path.startswith(LOCAL)
        }
        if changes:
            raise ConfigError(
                f"search: the study {self.name!r} has trials of another configuration: {told(changes)}. Take "
                "the same one to go on, or another --output.folder or --storage."
            )

    def _stored_space(self) -> dict[str, Any]:
        """Choices that a storage cannot keep, such as lists, as their YAML."""
        return {
            key: [_stored(choice) for choice in entry] if isinstance(entry, list) else entry
            for key, entry in self.space.items()
        }

    def config_of(self, settings: Mapping[str, Any]) -> Config:
        """The configuration of a trial.

        Raises:
            ConfigError: for values that it does not take.
        """
        given = {key: self._choice(key, value) for key, value in settings.items()}
        config = replace(self.config, space={}, compare=CompareConfig())
        quiet = replace(config.output, folder=None, loggers=[])
        return config_with(asdict(replace(config, output=quiet)), given)

    def _choice(self, key: str, value: Any) -> Any:
        entry = self.space[key]
        if not isinstance(entry, list):
            return value
        return next(choice for choice in entry if _stored(choice) == value)

    # ---- its trials ----------------------------------------------------------------------------------------

    def __call__(self, stop: StopRequest) -> None:
        """Trains trials until the search is over or a stop is requested; any number of workers may.

        Raises:
            TrainingError: if the last trial ended and none was finished.
        """
        study = self.study()
        objective = objective_of(lambda trial, settings: self._train(trial, settings, stop))
        while not stop.requested and not self._over(study):
            with suppress(TakenBackError):
                study.optimize(objective, n_trials=1, callbacks=[_tell])
        trials = study.get_trials(deepcopy=False)
        hopeful = any(trial.state in (TrialState.COMPLETE, TrialState.RUNNING) for trial in trials)
        if not stop.requested and not hopeful:
            reasons = [trial.user_attrs[REASON] for trial in trials if REASON in trial.user_attrs]
            reason = (reasons or ["All were pruned."])[-1]
            raise TrainingError(f"No trial of {self.folder} was finished. {reason}")

    def _over(self, study: Study) -> bool:
        exhausted = isinstance(study.sampler, GridSampler) and study.sampler.is_exhausted(study)
        queued = study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        return (exhausted and not queued) or self._exceeded(study, more=1)

    def _exceeded(self, study: Study, more: int) -> bool:
        """Whether the trials that have begun, and ``more``, are too many or too dear."""
        started = study.get_trials(deepcopy=False, states=STARTED)
        if self.num_trials is not None and len(started) + more > self.num_trials:
            return True
        running = [trial.user_attrs.get(COST, 0.0) for trial in started if not trial.state.is_finished()]
        ended = [t.user_attrs[COST] for t in started if t.state.is_finished() and COST in t.user_attrs]
        if self.budget is None or not ended:
            return False
        mean = sum(ended) / len(ended)
        expected = sum(ended) + sum(max(cost, mean) for cost in running)
        return expected + (more - 0.5) * mean > self.budget

    def _train(self, trial: Trial, settings: dict[str, Any], stop: StopRequest) -> float:
        if self._exceeded(trial.study, more=0):  # others began one at the same moment
            if trial.study.get_trials(deepcopy=False)[trial.number].system_attrs:  # of the queue, or a grid
                trial.study.enqueue_trial(trial.params)
            raise TakenBackError
        folder = RunFolder(self.folder / name_of(settings))
        trial.set_user_attr(FOLDER, str(folder.path))

        def watch(step: int, val_loss: float, cost: float) -> None:
            trial.set_user_attr(COST, cost)
            trial.report(val_loss, step)
            if trial.should_prune():
                raise optuna.TrialPruned

        try:
            finished = run_in(self.config_of(settings), folder, stop, quiet=True, watch=watch)
        except (ConfigError, TrainingError) as error:
            trial.set_user_attr(REASON, one_line(error))
            raise optuna.TrialPruned(one_line(error)) from error
        if not finished:
            trial.study.enqueue_trial(trial.params)
            raise TakenBackError
        summary = json.loads(folder.summary_file.read_text(encoding="utf-8"))
        trial.set_user_attr(COST, summary["cost"])
        trial.set_user_attr(SKIPPED, [summary["num_skipped"], summary["num_hyper_steps"]])
        return float(summary["val"]["loss"])


def begun(study: Study) -> list[FrozenTrial]:
    """The trials that were not taken back before they trained, and are not queued."""
    trials = study.get_trials(deepcopy=False)
    return [trial for trial in trials if FOLDER in trial.user_attrs and trial.state != TrialState.WAITING]


def _tell(study: Study, trial: FrozenTrial) -> None:
    """A line for each trial that has ended."""
    settings = ", ".join(f"{key} {_brief(value)}" for key, value in trial.params.items())
    if trial.state != TrialState.COMPLETE or trial.value is None:
        result = f"{trial.state.name.lower()}. {trial.user_attrs.get(REASON, '')}"
    else:
        best = " (the best so far)" if trial.value <= study.best_value else ""
        skipped, taken = trial.user_attrs.get(SKIPPED, (0, 0))
        lacks = f"; {skipped} of {taken + skipped} hyper steps were skipped" if skipped else ""
        result = f"validation loss {trial.value:.4f}{best}{lacks}"
    print(f"trial {trial.number}: {settings}: {result}".rstrip(), file=sys.stderr)


def name_of(settings: Mapping[str, Any]) -> str:
    """A folder's name that tells the settings, and that no others have."""
    told = ",".join(f"{key.rpartition('.')[2]}={_brief(value)}" for key, value in settings.items())
    told = "".join(sign if sign.isalnum() or sign in "=,.-+_" else "_" for sign in told)[:LONGEST_NAME]
    exact = json.dumps(settings, sort_keys=True).encode()
    return f"{told}-{hashlib.sha256(exact).hexdigest()[:6]}"


def _brief(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _stored(choice: Any) -> Any:
    if isinstance(choice, (str, int, float, bool, type(None))):
        return choice
    return yaml.safe_dump(choice, default_flow_style=True).strip()


def _end(entry: Any, place: int) -> Any:
    return entry[place] if isinstance(entry, list) else entry["low" if place == 0 else "high"]
