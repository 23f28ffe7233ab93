"""Time and memory as the problem grows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from .models import make_model
from .results import Table


def num_weights(table: Table) -> int:
    return sum(p.numel() for p in make_model(table.case.model, torch.float32).parameters())


def size(table: Table) -> int:
    return table.case.size


AXES: dict[str, tuple[str, Callable[[Table], int]]] = {
    "steps": ("T, training steps", size),
    "weights": ("weights", num_weights),
    "terms": ("K, terms", size),
}


def draw(tables: list[Table], page: Path) -> list[str]:
    """One picture beside the page for each axis along which at least three cases differ;
    Markdown that shows them."""
    shown = []
    for name, (label, position) in AXES.items():
        chosen = series(tables, name)
        if len(chosen) >= 3:
            path = page.with_name(f"{page.stem}_{name}.png")
            _picture(chosen, label, position, path)
            shown.append(f"![Time and memory against {label}]({path.name})\n")
    return shown


def series(tables: list[Table], axis: str) -> list[Table]:
    """The largest set of tables that differ along the axis alone."""
    task = "implicit" if axis == "terms" else "unrolled"
    along = "model" if axis == "weights" else "size"
    groups: dict[object, list[Table]] = {}
    for table in tables:
        if table.case.task == task and (axis != "weights" or table.case.model.startswith("mlp")):
            rest = replace(table.case, only=None, **{along: "" if along == "model" else 0})  # type: ignore[arg-type]
            groups.setdefault(rest, []).append(table)
    return max(groups.values(), key=len, default=[])


def _picture(tables: list[Table], label: str, position: Callable[[Table], int], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    panels = figure.subplots(1, 2)
    names = dict.fromkeys(name for table in tables for name in table.rows)
    for panel, quantity, unit, scale in zip(
        panels, ("time", "memory"), ("seconds", "MB of growth"), (1.0, 1e6)
    ):
        for name in names:
            rows = [(position(t), t.rows[name]) for t in tables if name in t.rows and t.rows[name].measured]
            points = sorted(
                (x, max(row.value(quantity) / scale, 0.1 if quantity == "memory" else 0)) for x, row in rows
            )
            if points:
                panel.plot(*zip(*points), marker="o", label=name)
        panel.set(xscale="log", yscale="log", xlabel=label, ylabel=unit)
        panel.grid(alpha=0.3)
    panels[1].legend(fontsize="small")
    figure.savefig(path, dpi=120)
