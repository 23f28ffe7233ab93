"""The report of one run, or of several side by side: one page of HTML, and its pictures beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from .groups import read_groups, table_of
from .one_run import page_of_run
from .page import write_page
from .read import read_run
from .several_runs import page_of_runs
from .style import report_style
from .trust import logged_warnings

__all__ = ["table_of", "warnings_of", "write_report"]


def write_report(run_folders: Sequence[Path], out: Path | None = None) -> Path:
    """Writes the report of one run, or the comparison of several.

    Args:
        run_folders: folders of runs, finished or not. Runs that share all but the seed are put together, and
            so are those in folders seed-0, seed-1, ... of one folder, which gives the row its name.
        out: where to write report.html and its pictures. None takes ``report/`` in the folder of the run, and
            of several ``report/`` beside the first.

    Returns:
        The path of report.html.

    Raises:
        ConfigError: no folder, or one that holds no run.
    """
    groups = read_groups([Path(folder) for folder in run_folders])
    first = groups[0].runs[0]
    if len(run_folders) == 1:
        out = first.folder / "report" if out is None else Path(out)
    else:
        out = first.folder.resolve().parent / "report" if out is None else Path(out)
    with report_style():
        page = page_of_run(first) if len(run_folders) == 1 else page_of_runs(groups, out)
        return write_page(page, out)


def warnings_of(run_folders: Sequence[Path]) -> list[str]:
    """What hyper steps warned of, and how many of them; with the name of the run where there are several."""
    runs = [read_run(folder) for folder in run_folders]
    names = [f"{run.name}: " if len(runs) > 1 else "" for run in runs]
    return [name + warning for name, run in zip(names, runs) for warning in logged_warnings(run)]
