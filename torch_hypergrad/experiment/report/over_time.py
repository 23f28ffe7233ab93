"""Pictures of the tuned values over the training steps."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ..config import setting_of
from .kinds import as_quantiles, grouped, left_out
from .read import RecordedRun
from .style import BLUE, GREY, Picture, dots, finish, panels, set_scale, shorten, step_axis

DEPTH = matplotlib.colormaps["viridis"].resampled(256)


def draw_over_time(run: RecordedRun) -> Picture | None:
    """One panel for each value or tensor; one for each kind of tensor where there are too many."""
    names = list(run.hyper[-1].get("values", {})) if run.hyper else []
    if not names:
        return None
    groups = grouped(run, names)
    figure, every = panels(len(groups), 3, 2.7)
    for axes, (title, members) in zip(every, groups.items()):
        if len(members) == 1:
            _draw_one(axes, run, members[0])
        else:
            _draw_several(axes, run, members)
        axes.set_title(shorten(title, 36))
        step_axis(axes)
    together = max(map(len, groups.values())) > 1
    if together:
        _depth_bar(figure, every)
    return finish(figure, "values_over_time", _caption(run, names, together) + left_out(names, groups))


def _caption(run: RecordedRun, names: list[str], together: bool) -> str:
    if together:
        return (
            f"The {len(names)} tuned tensors over training, grouped by kind: one line for each, the median "
            "of its values, from the first layers (dark) to the last (bright)."
        )
    if any(isinstance(value, Mapping) for value in run.hyper[-1]["values"].values()):
        return (
            "Tuned values over training: the line is the median, the dark band holds the middle half of the "
            "values, the pale one those between the 5 % and 95 % quantiles; dashed is the start."
        )
    return "Each tuned value over training; dashed is the start."


def _history(run: RecordedRun, name: str) -> tuple[list[float], dict[str, list[float]]]:
    """Training steps, and the quantiles at each."""
    lines = [line for line in run.hyper if name in line.get("values", {})]
    found = [as_quantiles(line["values"][name]) for line in lines]
    return [line["step"] for line in lines], {key: [entry[key] for entry in found] for key in found[0]}


def _draw_one(axes: Axes, run: RecordedRun, name: str) -> None:
    steps, curves = _history(run, name)
    start = _start(run, name)
    if start is not None:
        axes.axhline(start, color=GREY, lw=0.9, ls="--")
    for low, high, alpha in (("q05", "q95", 0.18), ("q25", "q75", 0.35)):
        axes.fill_between(steps, curves[low], curves[high], color=BLUE, alpha=alpha, lw=0)
    axes.plot(steps, curves["median"], color=BLUE, marker=dots(steps))
    shown = [*curves["q05"], *curves["q95"], *([] if start is None else [start])]
    set_scale(axes, "y", shown, run.tune_of(name)["log"])
    axes.set_ylabel(setting_of(name).replace("_", " "))


def _draw_several(axes: Axes, run: RecordedRun, names: list[str]) -> None:
    order = list(run.hyper[-1]["values"])
    shown: list[float] = []
    for name in names:
        steps, curves = _history(run, name)
        color = DEPTH(order.index(name) / max(len(order) - 1, 1))
        axes.plot(steps, curves["median"], color=color, lw=1, marker=dots(steps))
        shown += curves["median"]
    set_scale(axes, "y", shown, run.tune_of(names[0])["log"])
    axes.set_ylabel(f"{setting_of(names[0])}, median".replace("_", " "))


def _depth_bar(figure: Figure, every: list[Axes]) -> None:
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), DEPTH), ax=every, ticks=[0, 1], shrink=0.6, aspect=30
    )
    bar.ax.set_yticklabels(["first", "last"])
    bar.set_label("place of the layer in the network")


def _start(run: RecordedRun, name: str) -> float | None:
    start = run.tuned.get("start", {}).get(name)
    return (
        float(start.double().median()) if start is not None and start.numel() else run.tune_of(name)["init"]
    )
