"""The page that compares several runs."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import pandas as pd
import yaml

from .comparison import draw_overlaid, draw_results
from .describe import duration, in_one_sentence
from .groups import Group, differing, shown_measures, spread, table_of_groups, tasks_of, tuned_in_brief
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
        numbers=_best(groups) if len(tasks_of(groups)) == 1 else [],
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
        best = rows[main.best({name: group.measured("test", main).mean() for name, group in rows.items()})]
        value = spread(best.measured("test", main), main.digits) + (" %" if main.percent else "")
        loss = "" if main == LOSS else f", with a test loss of {spread(best.measured('test', LOSS), 3)}"
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
        if len(group.measured("test", main)):
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
    """Whether the rows compare, and how many runs of which raise doubts; the table of runs tells which."""
    num_runs = {group.name: len(group.runs) for group in groups}
    doubtful = {group.name: sum(bool(doubts(run)) for run in group.runs) for group in groups}
    named = [
        f"{quoted(name)} ({count} of {num_runs[name]} runs)" for name, count in doubtful.items() if count
    ]
    found, tasks = [], tasks_of(groups)
    if len(tasks) > 1:
        found.append(f"Numbers of different tasks do not compare. Here are runs on {listing(tasks)}.")
    if named:
        found.append(f"The hypergradient is in doubt in {listing(named)}: see the table of all runs.")
    return found


def _results(groups: Sequence[Group]) -> Section:
    table = table_of_groups(groups)
    table.insert(2, "runs", [_num_runs(group) for group in groups])
    losses = [spread(group.measured("val", LOSS), LOSS.digits) for group in groups]
    table.insert(table.columns.get_loc("cost (training steps)"), "validation loss", losses)
    several = any(len(group.finished) > 1 for group in groups)
    sentences = (
        ["Means over the seeds ± sample standard deviation; cost and seconds are means."] if several else []
    )
    picture = draw_results(groups)
    return Section("Results", sentences, [picture] if picture else [], [Table(table)])


def _num_runs(group: Group) -> str:
    finished, every = len(group.finished), len(group.runs)
    return f"{finished} of {every}" if finished < every else str(every)


def _losses(groups: Sequence[Group]) -> Section | None:
    picture = draw_overlaid(groups)
    return Section("Training", (), [picture]) if picture else None


def _tuned(groups: Sequence[Group]) -> Section:
    rows = [(group.name, _methods(group), tuned_in_brief(group)) for group in groups]
    sentence = (
        "At the end: the value, or the median of many with the range from their 5 % to their 95 % quantile."
    )
    table = pd.DataFrame(rows, columns=["row", "how", "values"])
    return Section("What was tuned", [sentence], (), [Table(table, num_words=3)])


def _methods(group: Group) -> str:
    return " ".join(dict.fromkeys(in_one_sentence(run) for run in group.runs))


def _differences(groups: Sequence[Group]) -> Section | None:
    found = differing(groups)
    if found.empty:
        return None
    table = found.rename_axis("key") if len(groups) <= MAX_COLUMNS else found.T.rename_axis("row")
    return Section("What differs in the configuration", (), (), [Table(table.reset_index())])


def _each_run(groups: Sequence[Group], out: Path) -> Section:
    measures = shown_measures(groups[0].words)
    runs = [run for group in groups for run in group.runs]
    table = pd.DataFrame(_run_row(run, measures) for run in runs)
    folded = f"All {len(runs)} runs" if len(runs) > MAX_ROWS else ""
    doubted: dict[str, list[str]] = {}
    for run in runs:
        for sentence in doubts(run):
            doubted.setdefault(sentence, []).append(quoted(run.name))
    sentences = [f"{_few(names)}: {sentence}" for sentence, names in list(doubted.items())[:MAX_ROWS]]
    links = [_link(run, out) for run in runs]
    return Section("Each run", sentences, (), [Table(table, num_words=2, folded=folded, links=links)])


def _few(names: Sequence[str]) -> str:
    return listing(names) if len(names) < 5 else listing([*names[:3], f"{len(names) - 3} others"])


def _run_row(run: RecordedRun, measures: Sequence[Measure]) -> dict[str, str]:
    results = run.results if run.finished else {}
    return {
        "run": run.name + ("" if run.finished else " (not finished)"),
        "in doubt": "yes" if doubts(run) else "",
        "seed": str(run.seed),
        **{f"test {each.name}": each.shown(results.get(f"test.{each.name}")) for each in measures},
        "steps": f"{run.steps:,}",
        "hyper steps": str(len(run.hyper)),
        "skipped": str(len(run.skipped)),
        "residual": number(late_residual(run), 2),
        "seconds": f"{run.seconds or 0:,.1f}",
    }


def _link(run: RecordedRun, out: Path) -> str:
    """To the run's own report, if there is one."""
    report = run.folder / "report" / "report.html"
    return quote(Path(os.path.relpath(report, out)).as_posix()) if report.is_file() else ""
