"""Pictures of the tuned values over the training steps."""

from __future__ import annotations

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from ..config import setting_of
from .kinds import grouped, left_out
from .read import RecordedRun
from .style import BLUE, GREY, Picture, dots, finish, panels, set_scale, shorten, step_axis

DEPTH = matplotlib.colormaps["viridis"].resampled(256)


def draw_over_time(run: RecordedRun) -> Picture | None:
    """One panel for each value or tensor; one for each kind of tensor where there are too many."""
    names = run.latest["name"].tolist()
    if not names:
        return None
    groups = grouped(run, names)
    depths = dict(zip(names, np.linspace(0, 1, len(names))))
    figure, every = panels(len(groups), 3, 2.7)
    for axes, (title, members) in zip(every, groups.items()):
        if len(members) == 1:
            _draw_one(axes, run, members[0])
        else:
            _draw_several(axes, run, {name: depths[name] for name in members})
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
    if run.latest["many"].any():
        return (
            "Tuned values over training: the line is the median, the dark band holds the middle half of the "
            "values, the pale one those between the 5 % and 95 % quantiles; dashed is the start."
        )
    return "Each tuned value over training; dashed is the start."


def _draw_one(axes: Axes, run: RecordedRun, name: str) -> None:
    curve = run.values[run.values["name"] == name]
    start = run.numbers([name], "start")
    if len(start):
        axes.axhline(float(np.median(start)), color=GREY, lw=0.9, ls="--")
    for low, high, alpha in (("q05", "q95", 0.18), ("q25", "q75", 0.35)):
        axes.fill_between(curve["step"], curve[low], curve[high], color=BLUE, alpha=alpha, lw=0)
    axes.plot(curve["step"], curve["median"], color=BLUE, marker=dots(curve))
    set_scale(axes, "y", [*curve["q05"], *curve["q95"], *start[:1]], run.tune_of(name)["log"])
    axes.set_ylabel(setting_of(name).replace("_", " "))


def _draw_several(axes: Axes, run: RecordedRun, depths: Mapping[str, float]) -> None:
    """The medians of tensors, by how deep in the network they are."""
    curves = run.values[run.values["name"].isin(depths)].pivot(index="step", columns="name", values="median")
    for name, depth in depths.items():
        curve = curves[name].dropna()
        axes.plot(curve, color=DEPTH(depth), lw=1, marker=dots(curve))
    name = next(iter(depths))
    set_scale(axes, "y", curves, run.tune_of(name)["log"])
    axes.set_ylabel(f"{setting_of(name)}, median".replace("_", " "))


def _depth_bar(figure: Figure, every: list[Axes]) -> None:
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), DEPTH), ax=every, ticks=[0, 1], shrink=0.6, aspect=30
    )
    bar.ax.set_yticklabels(["first", "last"])
    bar.set_label("place of the layer in the network")
