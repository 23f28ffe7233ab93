"""Pictures of where the tuned values ended: histograms, a comparison of the layers, learned schedules."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ..config import setting_of
from .kinds import by_setting, grouped, left_out
from .read import WEIGHTS, RecordedRun, part_of
from .style import (
    BLUE,
    GREY,
    VERMILION,
    Picture,
    dots,
    finish,
    is_log,
    legend_below,
    new_figure,
    panels,
    set_scale,
    shorten,
    step_axis,
)

MAX_NAMED_LAYERS = 80
MAX_HEIGHT = 14.0  # inches


def many_valued(run: RecordedRun) -> list[str]:
    """Names of tensors of more than one value."""
    return [name for name, value in run.tuned.get("values", {}).items() if value.numel() > 1]


def is_schedule(run: RecordedRun, name: str) -> bool:
    """Whether the values are one for each training step of an episode."""
    return bool(run.tune_of(name)["per"] == "step" and run.tuned["values"][name].dim() == 1)


# ---- histograms --------------------------------------------------------------------------------------------


def draw_histograms(run: RecordedRun) -> Picture | None:
    """Final values beside their start."""
    names = [name for name in many_valued(run) if not is_schedule(run, name) and name != WEIGHTS]
    if not names:
        return None
    groups = grouped(run, names)
    figure, every = panels(len(groups), 3, 2.7)
    for axes, (title, members) in zip(every, groups.items()):
        _draw_histogram(axes, run, members)
        axes.set_title(shorten(title, 36))
    legend_below(figure, *every)
    many = max(map(len, groups.values())) > 1
    caption = (
        "How the final values spread, "
        f"{'tensors of a kind together' if many else 'tensor by tensor'}, and where they began."
    )
    return finish(figure, "histograms", caption + left_out(names, groups))


def _draw_histogram(axes: Axes, run: RecordedRun, names: list[str]) -> None:
    final, start = run.numbers(names), run.numbers(names, "start")
    log = run.tune_of(names[0])["log"]
    both = np.concatenate([final, start])
    edges = bin_edges(both, log, count=int(min(40, max(8, 2 * len(final) ** 0.5))))
    axes.hist(final, edges, color=BLUE, alpha=0.75, label="final")
    if len(start) and start.min() == start.max():
        axes.axvline(start[0], color=VERMILION, ls="--", label="start")
    elif len(start):
        axes.hist(start, edges, color=VERMILION, histtype="step", ls="--", lw=1.4, label="start")
    if is_log(both, log):
        set_scale(axes, "x", both, log)
    axes.set(ylabel="number of values", xlabel=setting_of(names[0]).replace("_", " "))
    axes.locator_params(axis="y", nbins=4)


def bin_edges(values: np.ndarray, log: bool, count: int = 40) -> list[float]:
    """Bins of equal width on the scale that the values are drawn on."""
    if is_log(values, log):
        edges = np.geomspace(values.min(), values.max() * (1 + 1e-9), count + 1)
        return [values.min(), *edges[1:-1].tolist(), values.max() * (1 + 1e-9)]
    low, high = (values.min(), values.max()) if len(values) else (0.0, 1.0)
    margin = 0.0 if high > low else max(abs(high) / 2, 1e-12)
    return np.linspace(low - margin, high + margin, count + 1).tolist()


# ---- layers ------------------------------------------------------------------------------------------------


def draw_layers(run: RecordedRun) -> list[Picture]:
    """For each setting that has values in several tensors, all of them in the order of the network."""
    settings = by_setting(
        name for name in run.tuned.get("values", {}) if "/" in name and not is_schedule(run, name)
    )
    return [_draw_layers_of(run, setting, names) for setting, names in settings.items() if len(names) > 1]


def _draw_layers_of(run: RecordedRun, setting: str, names: list[str]) -> Picture:
    figure = new_figure(min(1.1 + (0.21 if len(names) > 12 else 0.32) * len(names), MAX_HEIGHT), 9.0)
    axes = figure.subplots()
    places = range(len(names))
    found = pd.DataFrame(
        {name: pd.Series(run.numbers([name])).quantile([0.05, 0.25, 0.5, 0.75, 0.95]) for name in names}
    ).T
    axes.hlines(places, found[0.05], found[0.95], color=BLUE, alpha=0.4, lw=1.6)
    axes.hlines(places, found[0.25], found[0.75], color=BLUE, alpha=0.6, lw=5)
    axes.plot(found[0.5], places, "o", color=BLUE, ms=5, mec="white", mew=0.7)
    start = run.numbers(names, "start")
    if len(start):
        axes.axvline(float(np.median(start)), color=VERMILION, ls="--", lw=1)
    shown = [*found[[0.05, 0.5, 0.95]].to_numpy().flat, *start[:1]]
    set_scale(axes, "x", shown, run.tune_of(names[0])["log"])
    _name_layers(axes, names)
    axes.set_xlabel(setting.replace("_", " "))
    bands = any(run.tuned["values"][name].numel() > 1 for name in names)
    caption = f"Final {setting.replace('_', ' ')} of each tensor, the first layers on top"
    caption += ": median (dot), middle half (thick) and 5 % to 95 % of the values (thin)" if bands else ""
    caption += "; dashed is the start." if len(start) else "."
    return finish(figure, f"layers_{setting.replace('.', '_')}", caption)


def _name_layers(axes: Axes, names: list[str]) -> None:
    """The first on top; of very many, every second or so is named."""
    every = -(-len(names) // MAX_NAMED_LAYERS)
    places = range(0, len(names), every)
    axes.set_yticks(list(places), [shorten(part_of(names[place]), 34) for place in places], fontsize=8)
    axes.set_ylim(len(names) - 0.4, -0.6)


# ---- schedules ---------------------------------------------------------------------------------------------


def draw_schedules(run: RecordedRun) -> Picture | None:
    """Values for each training step of an episode."""
    names = [name for name in many_valued(run) if is_schedule(run, name)]
    if not names:
        return None
    figure, every = panels(min(len(names), 6), 2, 3.2)
    for axes, name in zip(every, names):
        final, start = run.tuned["values"][name].double().numpy(), run.tuned.get("start", {}).get(name)
        if start is not None:
            axes.plot(range(1, len(start) + 1), start.double().numpy(), color=GREY, ls="--", label="start")
        axes.plot(range(1, len(final) + 1), final, color=BLUE, lw=1.2, marker=dots(final), label="learned")
        set_scale(axes, "y", [*final, *([] if start is None else start.tolist())], run.tune_of(name)["log"])
        step_axis(axes)
        axes.set(xlabel="training step of an episode", ylabel=setting_of(name).replace("_", " "))
        axes.set_title(shorten(name, 40))
    legend_below(figure, *every)
    more = f"; {len(names) - 6} further ones are in tuned.pt" if len(names) > 6 else ""
    return finish(
        figure,
        "schedules",
        f"The learned schedule over the training steps of an episode, and where it began{more}.",
    )
