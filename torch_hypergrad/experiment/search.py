"""The command search: a study whose trials are runs, its table and its report."""

from __future__ import annotations

import io
import json
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna.visualization.matplotlib as plots
import pandas as pd
import yaml
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from ..search import best_so_far
from .config import ConfigError
from .report.groups import in_markdown
from .report.page import Page, Section, Table, write_page
from .report.read import read_run
from .report.style import DPI, Picture, finish, fixed, number, panels, report_style
from .run_folder import RunFolder, as_dict
from .stopping import TrainingError, stop_on_signals
from .study import COST, FOLDER, REASON, Search, begun
from .workers import workers

FEWEST = 3  # complete trials that a picture needs


def search(study: Search, num_workers: int) -> int | None:
    """Trains trials until the study is over; what is there already is not trained again.

    Returns:
        The signal that stopped it, or None.

    Raises:
        ConfigError: before anything is trained.
        TrainingError: if no trial was finished.
    """
    if min(num_workers, 1 if study.num_trials is None else study.num_trials) < 1:
        raise ConfigError(
            f"--workers and --trials must be at least 1, got {num_workers}, {study.num_trials}."
        )
    study.check()
    study.study()  # before several would make it
    print(f"Searching in {study.folder}", file=sys.stderr)
    with stop_on_signals() as stop, workers(num_workers, stop) as pool:
        failures = pool.run([study] * num_workers, quiet=True)
    if len(failures) == num_workers and stop.signal is None:
        raise TrainingError(failures[0])
    return stop.signal


def table_of_study(search: Search) -> str:
    """The best trials, for the terminal."""
    best = sorted(_of(search.study(), TrialState.COMPLETE), key=lambda trial: trial.value or 0.0)[:5]
    table = pd.DataFrame({"best": f"trial {trial.number}", **_cells(trial)} for trial in best)
    return in_markdown(table, num_words=2)


def report_of_study(search: Search) -> Path:
    """Writes ``report/report.html`` in the folder of the study, and returns its path."""
    study, out = search.study(), search.folder / "report"
    with report_style():
        drawn = (_best_against_cost(study), *(_plotted(study, *plot) for plot in PLOTS))
        pictures = [picture for picture in drawn if picture is not None]
    trials = begun(study)
    states = Counter(trial.state for trial in trials)
    table = pd.DataFrame(
        {"trial": str(trial.number), "state": trial.state.name.lower(), **_cells(trial)} for trial in trials
    )
    reasons = [f"Trial {t.number}: {t.user_attrs[REASON]}" for t in trials if REASON in t.user_attrs]
    page = Page(
        title=f"A search of {len(trials)} trials",
        subtitle=f"{', '.join(search.space)}, by the sampler {search.sampler}"
        + (f" with the pruner {search.pruner}" if search.pruner != "none" else "")
        + (
            f"; {', '.join(search.config.tune)} by hypergradients in each trial."
            if search.config.tune
            else "."
        ),
        numbers=_best(study),
        facts=[
            ("Trials", ", ".join(f"{states[state]} {state.name.lower()}" for state in SHOWN)),
            (
                "Cost",
                f"as much as {sum(trial.user_attrs.get(COST, 0) for trial in trials):,.0f} training steps",
            ),
            ("Folder", str(search.folder)),
        ],
        sections=[
            Section("The search", (), pictures),
            Section("Trials", reasons[:12], (), [Table(table, num_words=3)]),
        ],
        configuration=yaml.safe_dump(as_dict(search.config), sort_keys=False),
    )
    return write_page(page, out)


SHOWN = (TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL, TrialState.RUNNING)


def _of(study: Study, state: TrialState) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(state,))


def _cells(trial: FrozenTrial) -> dict[str, str]:
    return {
        "settings": ", ".join(f"{key} {_shown(value)}" for key, value in trial.params.items()),
        "validation loss": fixed(trial.value, 4),
        "cost (training steps)": f"{trial.user_attrs.get(COST, 0):,.0f}",
    }


def _shown(value: Any) -> str:
    return number(value) if isinstance(value, float) else str(value)


def _best(study: Study) -> list[tuple[str, str]]:
    """The best trial's validation loss, and what it does on the test set."""
    if not _of(study, TrialState.COMPLETE):
        return []
    best = study.best_trial
    found = [(f"{best.value:.4f}", f"validation loss of trial {best.number}, the best")]
    folder = RunFolder(Path(best.user_attrs[FOLDER]))
    if folder.finished:  # of a worker on another machine it is there
        test = json.loads(folder.summary_file.read_text(encoding="utf-8"))["test"]
        measures = read_run(folder.path).words.measures
        found += [(measure.shown(test[measure.name]), f"its test {measure.name}") for measure in measures]
    return found


# ---- pictures ----------------------------------------------------------------------------------------------


def _best_against_cost(study: Study) -> Picture | None:
    costs, values = best_so_far(study)
    if not costs:
        return None
    figure, (axes,) = panels(1, 1, 3.6)
    axes.step(costs, values, where="post", marker="o", ms=3)
    axes.set(xlabel="cost (training steps)", ylabel="best validation loss so far")
    caption = "The best validation loss so far against what all trials had cost by then."
    return finish(figure, "best_so_far", caption)


PLOTS: tuple[tuple[str, str, Callable[[Study], Axes]], ...] = (
    (
        "importance",
        "How much of the spread of validation losses each key explains.",
        plots.plot_param_importances,
    ),
    ("parallel", "All trials: a line for each, the better the darker.", plots.plot_parallel_coordinate),
)


def _plotted(study: Study, name: str, caption: str, plot: Callable[[Study], Axes]) -> Picture | None:
    """One of Optuna's own, where there are trials enough for it."""
    if len({trial.value for trial in _of(study, TrialState.COMPLETE)}) < FEWEST:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # which of them are experimental depends on the version
        figure = plot(study).figure
    assert isinstance(figure, Figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight")  # no layout engine takes Optuna's axes
    pyplot.close(figure)  # pyplot would keep it
    return Picture.of(name, caption, buffer.getvalue())
