"""Puts runs of several seeds together, and makes the tables that compare them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate

from ..config import ConfigError
from .kinds import by_setting
from .read import Record, RecordedRun, read_run
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

    def numbers(self, *path: str) -> list[float]:
        """One number of the summary, such as ``"test", "loss"``, of each finished run."""
        return [value for run in self.finished if (value := _dig(run.summary, path)) is not None]


def _dig(record: Any, path: Sequence[str]) -> Any:
    for key in path:
        record = record.get(key) if isinstance(record, Mapping) else None
    return record


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
    names = [_name(runs[0]) for runs in found.values()]
    return [Group(_unique(name, runs[0], names), runs) for name, runs in zip(names, found.values())]


def _in_row(run: RecordedRun) -> bool:
    return run.folder.resolve().name.startswith("seed-")


def _key(run: RecordedRun) -> str:
    """The same for runs of one group."""
    if _in_row(run):
        return str(run.folder.resolve().parent)
    return yaml.safe_dump(
        {section: value for section, value in _settings(run).items() if section != "train.seed"}
    )


def _name(run: RecordedRun) -> str:
    path = run.folder.resolve()
    return path.parent.name if _in_row(run) else path.name


def _unique(name: str, run: RecordedRun, names: Sequence[str]) -> str:
    """Rows of the same name get that of the folder above."""
    path = run.folder.resolve()
    above = path.parent.parent if _in_row(run) else path.parent
    return f"{above.name}/{name}" if names.count(name) > 1 else name


# ---- numbers -----------------------------------------------------------------------------------------------


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± sample standard deviation; a dash for no values."""
    if not values:
        return DASH
    mean = fixed(statistics.mean(values), digits)
    return f"{mean} ± {fixed(statistics.stdev(values), digits)}" if len(values) > 1 else mean


def mean_of(values: Sequence[float], digits: int = 0) -> str:
    """The mean with so many decimals; a dash for no values."""
    return f"{statistics.mean(values):,.{digits}f}" if values else DASH


def measured(group: Group, part: str, measure: Measure) -> str:
    """A measure on one part of the data, mean and spread over the seeds, in the unit of its header."""
    return spread([measure.factor * value for value in group.numbers(part, measure.name)], measure.digits)


def headers_of(words: Words) -> list[str]:
    """Of the table of the command line."""
    measures = [f"test {measure.header}" for measure in shown_measures(words)]
    return ["row", "values tuned", *measures, "cost (training steps)", "seconds"]


def shown_measures(words: Words) -> list[Measure]:
    """What tables of several runs show: the first metric, and the loss."""
    return [*words.metrics[:1], LOSS]


def row_of(group: Group, words: Words) -> list[str]:
    """A row of the table of the command line."""
    return [
        group.name,
        _num_values(group),
        *(measured(group, "test", measure) for measure in shown_measures(words)),
        mean_of(group.numbers("cost")),
        mean_of(group.numbers("seconds"), 1),
    ]


def _num_values(group: Group) -> str:
    """How many were tuned; a search has one, and some trials for it."""
    trials = group.numbers("num_trials")
    return f"1, by {mean_of(trials)} trials" if trials else mean_of(group.numbers("num_values"))


def table_of(run_folders: Sequence[Path]) -> str:
    """For the terminal: one run's losses and metrics, or of several runs a row for each group of seeds.

    Raises:
        ConfigError: no folder, or one that holds no run.
    """
    groups = read_groups(run_folders)
    words = groups[0].words
    if len(run_folders) > 1:
        return github_table(headers_of(words), [row_of(group, words) for group in groups])
    return github_table(headers_of_run(words), rows_of_run(groups[0].runs[0]))


def github_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown: names to the left, numbers to the right."""
    align = ("left", *["right"] * (len(headers) - 1))
    return tabulate(rows, headers, tablefmt="github", disable_numparse=True, colalign=align)


def rows_of_run(run: RecordedRun) -> list[list[str]]:
    """Metrics and loss at the end on each set of examples; so far, of a run that has not finished."""
    last: Record = run.summary or (run.evals[-1] if run.evals else {})
    sources = [("test", "test", last), ("validation", "val", last), ("training", "train", last)]
    if run.baseline is not None:
        sources.append(("test, without tuning", "test", run.baseline))
    measures = run.words.measures
    rows = []
    for name, part, source in sources:
        found = [_dig(source, (part, measure.name)) for measure in measures]
        cells = [
            DASH if value is None else fixed(measure.factor * value, measure.digits)
            for measure, value in zip(measures, found)
        ]
        if found[-1] is not None:
            rows.append([name, *cells])
    return rows or [["test", *[DASH] * len(measures)]]


def headers_of_run(words: Words) -> list[str]:
    """Of the table of one run."""
    return [words.examples, *(measure.header for measure in words.measures)]


# ---- what was tuned, what differs --------------------------------------------------------------------------


def tuned_in_brief(group: Group) -> str:
    """The last values of each setting: a number, or median and 5 % to 95 % quantiles; means over seeds."""
    brief: dict[str, list[tuple[float, ...]]] = {}
    for run in group.runs:
        values: Mapping[str, Any] = run.hyper[-1].get("values", {}) if run.hyper else {}
        for setting, names in by_setting(values).items():
            brief.setdefault(setting, []).append(_middle([values[name] for name in names]))
    return "; ".join(f"{setting} {_in_words(found)}" for setting, found in brief.items()) or DASH


def _middle(values: Sequence[Any]) -> tuple[float, ...]:
    """Low, median, high of all the tensors of a setting; the ends are those of the outermost tensor."""
    if all(isinstance(value, Mapping) for value in values):
        middle = statistics.median(value["median"] for value in values)
        return min(value["q05"] for value in values), middle, max(value["q95"] for value in values)
    numbers = [value["median"] if isinstance(value, Mapping) else value for value in values]
    return min(numbers), statistics.median(numbers), max(numbers)


def _in_words(found: Sequence[tuple[float, ...]]) -> str:
    low, middle, high = (statistics.mean(column) for column in zip(*found))
    return number(middle) if low == high else f"{number(middle)} ({number(low, 2)} to {number(high, 2)})"


def _settings(run: RecordedRun) -> dict[str, Any]:
    """The configuration by dotted keys, without what says only where and how the run was written."""
    flat = _flatten(run.config)
    return {key: value for key, value in flat.items() if not key.startswith(("output.", "compare."))}


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping) and value:
            flat |= _flatten(value, f"{prefix}{key}.")
        elif value != {}:
            flat[f"{prefix}{key}"] = value
    return flat


def differing(groups: Sequence[Group]) -> dict[str, list[str]]:
    """The keys of the configuration that are not the same in all runs, with their values in each group."""
    flats = [[_settings(run) for run in group.runs] for group in groups]
    keys = dict.fromkeys(key for group in flats for flat in group for key in flat if key != "train.seed")
    found = {}
    for key in keys:
        shown = [", ".join(dict.fromkeys(_shown(flat.get(key, "")) for flat in group)) for group in flats]
        if len(set(shown)) > 1 or len({_shown(flat.get(key, "")) for group in flats for flat in group}) > 1:
            found[key] = shown
    return found


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    return number(value, 4) if isinstance(value, float) else str(value)
