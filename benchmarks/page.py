"""The page of results, in Markdown."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
import platform
import re
from pathlib import Path

from tabulate import tabulate

from .measure import Limits, Outcome
from .profiling import NAMES, PHASES
from .results import Row, Table
from .suites import TARGETS, Target

PACKAGES = ("torch", "higher", "torchopt", "numpy")


def header(command: str, threads: int) -> str:
    """What was measured, when and where."""
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} absent")
    return (
        "# Time and memory beside peers\n\n"
        f"`{command}`, {datetime.date.today()}: {processor()}, {os.cpu_count()} cores, {threads} threads; "
        f"{', '.join(versions)}.\n"
    )


def how_to_read(repeats: int, limits: Limits) -> str:
    """What the columns of :func:`section` are."""
    return (
        "Every measurement is a process of its own, after a warm-up; contestants take turns. "
        f"`s` is the median of {repeats}, each of the second window in its process, as in training with "
        "many hyper steps; `MB` is by how much peak memory grew in the first, a median too. "
        "Ratios are against the faster peer's time and the leaner peer's memory. "
        "`off by` is the largest difference found from the other answers and from a reference in float64, "
        "as a part of the norm. "
        f"A measurement may take {limits.seconds:.0f} s and {limits.gigabytes:.0f} GB.\n"
    )


def processor() -> str:
    """The model name, without the machine's."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    return found[1] if found else platform.processor() or platform.machine()


def section(table: Table) -> str:
    """One case."""
    body = tabulate(
        [_cells(table, row) for row in table.rows.values()],
        ["", "s", "fastest", "slowest", "/ peer", "MB", "/ peer", "off by"],
        tablefmt="github",
        disable_numparse=True,
        colalign=("left", *["right"] * 7),
    )
    return f"## {table.case.title}\n\n{body}\n"


def _cells(table: Table, row: Row) -> list[str]:
    name = row.contestant.name
    if not row.measured:
        return [name, short(row.mark), *[""] * 6]
    seconds, memory = row.median("time"), row.median("memory")
    return [
        name,
        f"{seconds:.3f}",
        *(f"{extreme(o.seconds for o in row.outcomes):.3f}" for extreme in (min, max)),
        ratio(seconds, table.best_peer("time")),
        f"{memory / 1e6:.1f}",
        ratio(memory, table.best_peer("memory")),
        "" if math.isnan(row.error) else f"{row.error:.0e}",
    ]


def short(mark: str) -> str:
    """The mark itself, or what stands for an error."""
    return "cannot" if ":" in mark else mark


def ratio(value: float, other: float | None) -> str:
    return "" if not other else f"{value / other:.2f}"


# ---- targets -----------------------------------------------------------------------------------------------


def targets(tables: list[Table]) -> str:
    """Every target whose case was measured, with what came of it."""
    by_case = {table.case: table for table in tables}
    rows = [_verdict(target, by_case) for target in TARGETS if target.case in by_case]
    if not rows:
        return ""
    body = tabulate(
        rows,
        ["case", "contestant", "", "against", "target", "measured", "reached"],
        tablefmt="github",
        disable_numparse=True,
        colalign=("left", "left", "left", "left", "right", "right", "left"),
    )
    return f"## Targets\n\n{body}\n"


def _verdict(target: Target, tables: dict) -> list[str]:
    found, row = measured(target, tables), tables[target.case].rows.get(target.contestant)
    against = target.against or {"memory": "in MB", "error": "in parts of the norm"}[target.quantity]
    cells = [target.case.title, target.contestant, target.quantity, against, f"{target.limit:g}"]
    if found is None:
        ran = row is not None and row.measured
        return [
            *cells,
            "no peer" if ran else "not run" if row is None else short(row.mark) or "not run",
            "no",
        ]
    return [
        *cells,
        f"{found:.2g}" if found < 0.1 else f"{found:.2f}",
        "yes" if found <= target.limit else "no",
    ]


def measured(target: Target, tables: dict) -> float | None:
    """What the target bounds, or None where a part of it was not measured."""
    table: Table = tables[target.case]
    row = table.rows.get(target.contestant)
    if row is None or not row.measured:
        return None
    if target.quantity == "error":
        return row.error
    value = row.median(target.quantity)
    if target.against is None:
        return value / 1e6
    other = _other(target, table, tables)
    return value / other if other else None


def _other(target: Target, table: Table, tables: dict) -> float | None:
    name = target.against
    if name == "best peer":
        return table.best_peer(target.quantity)
    if name == "per group":
        matches = [
            t for case, t in tables.items() if case.per == "group" and case.title == _per_group(target)
        ]
        if not matches:
            return None
        table, name = matches[0], target.contestant
    row = table.rows.get(name or "")
    return row.median(target.quantity) if row is not None and row.measured else None


def _per_group(target: Target) -> str:
    return target.case.title.replace("per element", "per group")


# ---- the rest ----------------------------------------------------------------------------------------------


def legend(tables: list[Table]) -> str:
    """Who is who, and what each could not do."""
    who = {(t.case.task, r.contestant.name): r.contestant.what for t in tables for r in t.rows.values()}
    lines = [f"- **{name}** ({task}): {what}" for (task, name), what in who.items()]
    cannot = {(r.contestant.name, t.case.per, r.mark): t for t in tables for r in t.rows.values() if r.mark}
    if cannot:
        lines += ["", "What could not be measured, with the error that came of trying:", ""]
        lines += [f"- {t.case.title}: **{name}**: {mark}" for (name, _, mark), t in cannot.items()]
    return "## Contestants\n\n" + "\n".join(lines) + "\n"


def profile(title: str, outcomes: dict[str, Outcome]) -> str:
    """Seconds by part, of the training steps and of the hyper step."""
    rows = []
    for name, outcome in outcomes.items():
        if outcome.mark:
            rows.append([name, outcome.mark])
            continue
        for phase in PHASES.values():
            seconds = [outcome.parts.get((phase, part), 0.0) for part in NAMES]
            if (total := sum(seconds)) > 0:
                rows.append([name, phase, f"{total:.3f}", *(f"{s:.3f} ({s / total:.0%})" for s in seconds)])
    body = tabulate(rows, ["", "", "s", *NAMES], tablefmt="github", disable_numparse=True)
    return f"## Where the time goes: {title}\n\n{body}\n"
