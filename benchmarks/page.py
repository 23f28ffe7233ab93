"""The page of results, in Markdown."""

from __future__ import annotations

import datetime
import importlib.metadata
import math
import os
import platform
import re
from dataclasses import replace
from pathlib import Path

import torch
from tabulate import tabulate

from .cases import Case
from .measure import Limits, Outcome
from .results import Quantity, Row, Table
from .suites import TARGETS, Target
from .work import LONG, NUM_LATER

PACKAGES = ("torch", "higher", "torchopt", "numpy")
ALLOCATORS = {
    "kept": "every process, peers' included, keeps memory that it freed (`keep_freed_memory()`)",
    "default": "every process has the allocator's default settings",
}
NUM_FUNCTIONS = 20


def header(command: str, limits: Limits) -> str:
    """What was measured, when, where and with which settings."""
    versions = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} absent")
    return (
        "# Time and memory beside peers\n\n"
        f"`{command}`, {datetime.date.today()}: {processor()}, {os.cpu_count()} cores, "
        f"{limits.threads or torch.get_num_threads()} threads; {', '.join(versions)}; "
        f"{ALLOCATORS[limits.allocator]}.\n"
    )


def how_to_read(repeats: int, limits: Limits) -> str:
    """What the columns of :func:`section` are."""
    return (
        "Every measurement is a process of its own, after a warm-up of two steps; contestants take turns. "
        "`s` are later windows in a process, in memory that it had before, as in training with many hyper "
        f"steps: the median of {repeats} processes with {NUM_LATER} windows each, the fastest and the "
        f"slowest; from {LONG:,} steps on there is one of each. `first s` is the first window, a median, and "
        "`MB` is by how much peak memory grew in it, a median too. `/ peer` is the ratio to the peer that is "
        "best in later windows, in the first and in memory; it may be another one each time. "
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
        ["", "s", "fastest", "slowest", "/ peer", "first s", "/ peer", "MB", "/ peer", "off by"],
        tablefmt="github",
        disable_numparse=True,
        colalign=("left", *["right"] * 9),
    )
    return f"## {table.case.title}\n\n{body}\n"


def _cells(table: Table, row: Row) -> list[str]:
    if not row.measured:
        return [row.contestant.name, short(row.mark), *[""] * 8]

    def against_peer(quantity: Quantity) -> str:
        other = table.best_peer(quantity)
        return f"{row.value(quantity) / other:.2f}" if other else ""

    return [
        row.contestant.name,
        *(f"{seconds:.3f}" for seconds in (row.value("time"), min(row.later), max(row.later))),
        against_peer("time"),
        f"{row.value('first time'):.3f}",
        against_peer("first time"),
        f"{row.value('memory') / 1e6:.1f}",
        against_peer("memory"),
        "" if math.isnan(row.error) else f"{row.error:.0e}",
    ]


def short(mark: str) -> str:
    """The mark itself, or what stands for an error."""
    return "cannot" if ":" in mark else mark


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


def _verdict(target: Target, tables: dict[Case, Table]) -> list[str]:
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


def measured(target: Target, tables: dict[Case, Table]) -> float | None:
    """What the target bounds, or None where a part of it was not measured."""
    table = tables[target.case]
    row = table.rows.get(target.contestant)
    if row is None or not row.measured:
        return None
    value = row.value(target.quantity)
    if target.against is None:
        return value / 1e6 if target.quantity == "memory" else value
    other = _other(target, table, tables)
    return value / other if other else None


def _other(target: Target, table: Table, tables: dict[Case, Table]) -> float | None:
    if target.against == "best peer":
        return table.best_peer(target.quantity)
    if target.against == "per group":
        group = tables.get(replace(target.case, per="group"))
        row = group.rows.get(target.contestant) if group else None
    else:
        row = table.rows.get(target.against or "")
    return row.value(target.quantity) if row is not None and row.measured else None


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
    """The functions in which each contestant spends most of its time."""
    parts = [f"## Where the time goes: {title}\n"]
    for name, outcome in outcomes.items():
        functions = outcome.functions[:NUM_FUNCTIONS]
        rows = [[where, calls, f"{own:.3f}", f"{total:.3f}"] for where, calls, own, total in functions]
        body = tabulate(rows, [name, "calls", "s, own", "s, all"], "github", disable_numparse=True)
        parts.append(f"{outcome.mark or body}\n")
    return "\n".join(parts)
