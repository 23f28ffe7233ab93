"""Puts runs of several seeds together, and makes the tables that compare them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pandas as pd

from ..config import ConfigError
from .read import RecordedRun, read_run
from .style import DASH, fixed, number
from .words import LOSS, Measure, Words


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, or that lie in folders seed-0, seed-1, ... of one folder."""

    name: str
    runs: list[RecordedRun]

    @property
    def words(self) -> Words:
        """What things are called, as in the first run."""
        return self.runs[0].words

    @property
    def finished(self) -> list[RecordedRun]:
        return [run for run in self.runs if run.finished]

    @cached_property
    def results(self) -> pd.DataFrame:
        """Of each finished run, a row with its numbers."""
        return pd.DataFrame([run.results for run in self.finished])

    def numbers(self, path: str) -> pd.Series:
        """One number, such as test.loss, of each finished run that has it."""
        return self.results.get(path, pd.Series(dtype=float)).dropna()

    def measured(self, part: str, measure: Measure) -> pd.Series:
        """A measure on one part of the data, in the unit of its header."""
        return measure.factor * self.numbers(f"{part}.{measure.name}")


def read_groups(folders: Sequence[Path]) -> list[Group]:
    """Reads and groups the runs, in the order in which they are given.

    Raises:
        ConfigError: no folder, or one that holds no run.
    """
    if not folders:
        raise ConfigError(
            "A report needs the folder of at least one run, got none. Pass one that holds config.yaml."
        )
    found: dict[str, list[RecordedRun]] = {}
    for run in map(read_run, folders):
        found.setdefault(_key(run), []).append(run)
    names = _names([_row(runs[0]) for runs in found.values()])
    return [Group(name, runs) for name, runs in zip(names, found.values())]


def tasks_of(groups: Sequence[Group]) -> list[str]:
    """The data, losses and metrics of all runs in words; only numbers of runs that share them compare."""
    runs = [run for group in groups for run in group.runs]
    return list(dict.fromkeys(f"{run.data} ({run.words.in_brief})" for run in runs))


def _in_row(run: RecordedRun) -> bool:
    return run.folder.resolve().name.startswith("seed-")


def _key(run: RecordedRun) -> str:
    """The same for runs of one group."""
    if _in_row(run):
        return str(_row(run))
    return json.dumps({**_settings(run), "train.seed": None}, default=str)


def _row(run: RecordedRun) -> Path:
    """The folder that names the row."""
    path = run.folder.resolve()
    return path.parent if _in_row(run) else path


def _names(rows: Sequence[Path]) -> list[str]:
    """Each by the name of its folder, with as many of those above as no other row has."""
    names = []
    for row in rows:
        others, depth = [other.parts for other in rows if other != row], 1
        while any(other[-depth:] == row.parts[-depth:] for other in others):
            depth += 1
        names.append("/".join(row.parts[-depth:]))
    return names


# ---- numbers -----------------------------------------------------------------------------------------------


def spread(values: pd.Series, digits: int) -> str:
    """Mean ± sample standard deviation; a dash for no values."""
    mean = fixed(values.mean(), digits)
    return f"{mean} ± {fixed(values.std(), digits)}" if len(values) > 1 else mean


def mean_of(values: pd.Series, digits: int = 0) -> str:
    """The mean with so many digits after the point; a dash for no values."""
    return f"{values.mean():,.{digits}f}" if len(values) else DASH


def shown_measures(words: Words) -> list[Measure]:
    """What tables of several runs show: the first metric, and the loss."""
    return [*words.metrics[:1], LOSS]


def table_of_groups(groups: Sequence[Group]) -> pd.DataFrame:
    """A row for each group: what it tuned, how good it is on the test set, and what it cost."""
    measures = shown_measures(groups[0].words)
    return pd.DataFrame(
        {
            "row": group.name,
            "values tuned": _num_values(group),
            **{f"test {each.header}": spread(group.measured("test", each), each.digits) for each in measures},
            "cost (training steps)": mean_of(group.numbers("cost")),
            "seconds": mean_of(group.numbers("seconds"), 1),
        }
        for group in groups
    )


def _num_values(group: Group) -> str:
    """How many were tuned; a search has one, and some trials for it."""
    trials = group.numbers("num_trials")
    return f"1, by {mean_of(trials)} trials" if len(trials) else mean_of(group.numbers("num_values"))


def table_of(run_folders: Sequence[Path]) -> str:
    """For the terminal: one run's losses and metrics, or of several runs a row for each group of seeds.

    Raises:
        ConfigError: no folder, or one that holds no run.
    """
    groups = read_groups(run_folders)
    return in_markdown(table_of_run(groups[0].runs[0]) if len(run_folders) == 1 else table_of_groups(groups))


def in_markdown(table: pd.DataFrame, num_words: int = 1) -> str:
    """So many columns to the left, the numbers in the others to the right."""
    align = ["left"] * num_words + ["right"] * (table.shape[1] - num_words)
    if table.empty:
        return ""
    return str(table.to_markdown(index=False, tablefmt="github", disable_numparse=True, colalign=align))


def table_of_run(run: RecordedRun) -> pd.DataFrame:
    """Metrics and loss at the end on each set of examples; so far, of a run that has not finished."""
    sources = {
        "test": ("test", run.results),
        "validation": ("val", run.results),
        f"training{_of_all(run)}": ("train", run.results),
        "test, without tuning": ("test", run.baseline),
    }
    rows = [
        {run.words.examples: name}
        | {each.header: each.in_table(results.get(f"{part}.{each.name}")) for each in run.words.measures}
        for name, (part, results) in sources.items()
        if results.get(f"{part}.loss") is not None or (name == "test" and not run.results)
    ]
    return pd.DataFrame(rows)


def _of_all(run: RecordedRun) -> str:
    """How many training examples were evaluated, if these were not all."""
    summary = run.summary or {}
    every = summary.get("sizes", {}).get("train", 0)
    some = summary.get("evaluated", {}).get("train", every)
    return f" ({some:,} of {every:,})" if some < every else ""


# ---- what was tuned, what differs --------------------------------------------------------------------------


def tuned_in_brief(group: Group) -> str:
    """The last values of each setting: a number, or median and 5 % to 95 % quantiles, the ends those of the
    outermost tensor; means over seeds."""
    latest = pd.concat({place: run.latest for place, run in enumerate(group.runs)}, names=["run", None])
    ends = latest.groupby(["setting", "run"], sort=False).agg(
        {"q05": "min", "median": "median", "q95": "max"}
    )
    means = ends.groupby("setting", sort=False).mean()
    return "; ".join(f"{name} {_in_words(*row)}" for name, *row in means.itertuples()) or DASH


def _in_words(low: float, middle: float, high: float) -> str:
    return number(middle) if low == high else f"{number(middle)} ({number(low, 2)} to {number(high, 2)})"


def _settings(run: RecordedRun) -> dict[str, str]:
    """The configuration by dotted keys, in words, without what says only where and how the run was
    written."""
    config = {key: value for key, value in run.config.items() if key not in ("output", "compare")}
    return {key: _shown(value) for key, value in pd.json_normalize(config).iloc[0].items()}


def differing(groups: Sequence[Group]) -> pd.DataFrame:
    """The keys of the configuration that are not the same in all runs: a row for each, and a column for each
    group."""
    names = [group.name for group in groups for _ in group.runs]
    settings = pd.DataFrame([_settings(run) for group in groups for run in group.runs], index=names)
    settings = settings.fillna("").drop(columns="train.seed")
    varied = settings.loc[:, settings.nunique() > 1]
    return pd.DataFrame({group.name: varied.loc[[group.name]].apply(_distinct) for group in groups})


def _distinct(values: pd.Series) -> str:
    return ", ".join(values.unique())


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return number(value, 4) if isinstance(value, float) else str(value)
