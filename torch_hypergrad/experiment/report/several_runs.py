"""The page that compares several runs."""

from __future__ import annotations

import os
import statistics
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import yaml

from .comparison import draw_overlaid, draw_results
from .describe import duration, in_one_sentence
from .groups import (
    Group,
    differing,
    headers_of,
    mean_of,
    measured,
    row_of,
    shown_measures,
    spread,
    tuned_in_brief,
)
from .page import Page, Section, Table
from .read import RecordedRun
from .style import count_of, listing, number, quoted
from .trust import doubts, late_residual
from .words import LOSS, Measure

MAX_ROWS = 12
MAX_COLUMNS = 8


def page_of_runs(groups: Sequence[Group], out: Path) -> Page:
    """The page that compares groups of runs."""
    runs = [run for group in groups for run in group.runs]
    sections = [
        _results(groups),
        _losses(groups),
        _tuned(groups),
        _differences(groups),
        _each_run(groups, out),
    ]
    return Page(
        title=_title(groups),
        subtitle=_subtitle(groups, runs),
        numbers=_best(groups),
        facts=_facts(runs),
        sections=[section for section in sections if section],
        warnings=_warnings(groups),
        configuration=yaml.safe_dump(runs[0].config, sort_keys=False),
        commands=[
            (
                "The keys below are those of the first run; what differs is in the table above.",
                str(runs[0].folder),
            )
        ],
    )


def _title(groups: Sequence[Group]) -> str:
    """What is compared."""
    data = listing(dict.fromkeys(run.data for group in groups for run in group.runs))
    if len(groups) == 1:
        return f"{groups[0].name} on {data}, {len(groups[0].runs)} runs"
    return f"{len(groups)} ways to train on {data}"


def _subtitle(groups: Sequence[Group], runs: Sequence[RecordedRun]) -> str:
    unfinished = sum(not run.finished for run in runs)
    left_out = f"; {unfinished} not finished, and left out of all means" if unfinished else ""
    return f"{count_of(len(runs), 'run')} in {count_of(len(groups), 'row')}{left_out}."


def _best(groups: Sequence[Group]) -> list[tuple[str, str]]:
    """The row that is best on the test set, among those that saw the same targets: a row that trains on the
    validation set knows more than the others, and is named beside them."""
    found, main = [], groups[0].words.main
    for kind, among in _by_information(groups).items():
        rows = {group.name: group for group in among}
        means = {name: statistics.mean(group.numbers("test", main.name)) for name, group in rows.items()}
        best = rows[main.best(means)]
        value = measured(best, "test", main) + (" %" if main.percent else "")
        loss = "" if main == LOSS else f", with a test loss of {spread(best.numbers('test', 'loss'), 3)}"
        found.append((value, f"{kind}: {best.name}{loss}"))
    return found


def _by_information(groups: Sequence[Group]) -> dict[str, list[Group]]:
    """Rows with results by the examples whose targets they were trained on."""
    main = groups[0].words.main
    kinds = {
        "train": f"best test {main.name}",
        "train_and_val": "best with training on the validation set too",
        "val": "best with training on the validation set alone",
    }
    found: dict[str, list[Group]] = {}
    for group in groups:
        if group.numbers("test", main.name):
            found.setdefault(kinds[group.runs[0].config["train"]["part"]], []).append(group)
    return {kind: found[kind] for kind in kinds.values() if kind in found}


def _facts(runs: Sequence[RecordedRun]) -> list[tuple[str, str]]:
    data = dict.fromkeys(run.data for run in runs)
    models = dict.fromkeys(str(run.config["model"]["name"]) for run in runs)
    total = sum(run.seconds or 0.0 for run in runs)
    return [
        ("Data", listing(data)),
        ("Model", listing(models)),
        ("Duration", f"{duration(total)} for all runs together"),
    ]


def _warnings(groups: Sequence[Group]) -> list[str]:
    """How many runs of which rows raise doubts; the table of runs tells which."""
    num_runs = {group.name: len(group.runs) for group in groups}
    doubtful = {group.name: sum(bool(doubts(run)) for run in group.runs) for group in groups}
    named = [
        f"{quoted(name)} ({count} of {num_runs[name]} runs)" for name, count in doubtful.items() if count
    ]
    return [f"The hypergradient is in doubt in {listing(named)}: see the table of all runs."] if named else []


def _results(groups: Sequence[Group]) -> Section:
    words = groups[0].words
    name, values, *measures, cost, seconds = headers_of(words)
    headers = [name, values, "runs", *measures, "validation loss", cost, seconds]
    rows = []
    for group in groups:
        name, values, *measures, cost, seconds = row_of(group, words)
        finished = (
            f"{len(group.finished)} of {len(group.runs)}"
            if len(group.finished) < len(group.runs)
            else str(len(group.runs))
        )
        rows.append(
            [name, values, finished, *measures, spread(group.numbers("val", "loss"), 3), cost, seconds]
        )
    several = any(len(group.finished) > 1 for group in groups)
    sentences = (
        ["Means over the seeds ± sample standard deviation; cost and seconds are means."] if several else []
    )
    picture = draw_results(groups)
    return Section("Results", sentences, [picture] if picture else [], [Table(headers, rows)])


def _losses(groups: Sequence[Group]) -> Section | None:
    picture = draw_overlaid(groups)
    return Section("Training", (), [picture]) if picture else None


def _tuned(groups: Sequence[Group]) -> Section:
    rows = [[group.name, _methods(group), tuned_in_brief(group)] for group in groups]
    sentence = (
        "At the end: the value, or the median of many with the range from their 5 % to their 95 % quantile."
    )
    return Section("What was tuned", [sentence], (), [Table(("row", "how", "values"), rows, num_words=3)])


def _methods(group: Group) -> str:
    return " ".join(dict.fromkeys(in_one_sentence(run) for run in group.runs))


def _differences(groups: Sequence[Group]) -> Section | None:
    found = differing(groups)
    if not found:
        return None
    if len(groups) <= MAX_COLUMNS:
        rows = [[key, *cells] for key, cells in found.items()]
        table = Table(("key", *(group.name for group in groups)), rows)
    else:
        rows = [[group.name, *cells] for group, cells in zip(groups, zip(*found.values()))]
        table = Table(("row", *found), rows)
    return Section("What differs in the configuration", (), (), [table])


def _each_run(groups: Sequence[Group], out: Path) -> Section:
    measures = shown_measures(groups[0].words)
    headers = (
        "run",
        "in doubt",
        "seed",
        *(f"test {measure.name}" for measure in measures),
        "steps",
        "hyper steps",
        "skipped",
        "residual",
        "seconds",
    )
    runs = [run for group in groups for run in group.runs]
    rows = [_run_row(run, measures) for run in runs]
    folded = f"All {len(rows)} runs" if len(rows) > MAX_ROWS else ""
    links = [_link(run, out) for run in runs]
    doubted: dict[str, list[str]] = {}
    for run in runs:
        for sentence in doubts(run):
            doubted.setdefault(sentence, []).append(quoted(run.name))
    sentences = [f"{_few(names)}: {sentence}" for sentence, names in list(doubted.items())[:MAX_ROWS]]
    return Section("Each run", sentences, (), [Table(headers, rows, num_words=2, folded=folded, links=links)])


def _few(names: Sequence[str]) -> str:
    return listing(names) if len(names) < 5 else listing([*names[:3], f"{len(names) - 3} others"])


def _run_row(run: RecordedRun, measures: Sequence[Measure]) -> list[str]:
    test = (run.summary or {}).get("test") or {}
    unfinished = "" if run.finished else " (not finished)"
    cells = [
        *(measure.shown(test.get(measure.name)) for measure in measures),
        f"{run.steps:,}",
        str(len(run.hyper)),
        str(len(run.skipped)),
    ]
    doubted = "yes" if doubts(run) else ""
    return [
        run.name + unfinished,
        doubted,
        str(run.seed),
        *cells,
        number(late_residual(run), 2),
        mean_of([run.seconds or 0], 1),
    ]


def _link(run: RecordedRun, out: Path) -> str:
    """To the run's own report, if there is one."""
    report = run.folder / "report" / "report.html"
    return quote(Path(os.path.relpath(report, out)).as_posix()) if report.is_file() else ""
