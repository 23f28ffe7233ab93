"""Pictures that compare several runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from .groups import Group, shown_measures
from .style import (
    BLACK,
    COLORS,
    LINES,
    MARKERS,
    Picture,
    dots,
    finish,
    legend_below,
    listing,
    new_figure,
    quoted,
    set_scale,
    step_axis,
    wrapped,
)

MAX_LINES = 16  # groups on one picture of curves


def _look(place: int) -> tuple[str, str]:
    """Colour and line style of a group."""
    return COLORS[place % len(COLORS)], LINES[(place // len(COLORS)) % len(LINES)]


def draw_results(groups: Sequence[Group]) -> Picture | None:
    """The first metric and the loss on the test set: a dot for each seed, a bar from mean - std to mean +
    std."""
    if not any(group.finished for group in groups):
        return None
    measures = shown_measures(groups[0].words)
    figure = new_figure(min(1.3 + 0.42 * len(groups), 16.0))
    every = figure.subplots(1, len(measures), sharey=True, squeeze=False)[0]
    for axes, measure in zip(every, measures):
        _draw_dots(axes, [group.measured("test", measure) for group in groups])
        axes.set(xlabel=f"test {measure.header}")
    every[0].set_yticks(range(len(groups)), [wrapped(group.name) for group in groups])
    every[0].set_ylim(len(groups) - 0.4, -0.6)
    losses = [value for group in groups for value in group.numbers("test.loss")]
    set_scale(every[-1], "x", losses, log=0 < 20 * min(losses) < max(losses))
    many = max(len(group.finished) for group in groups) > 1
    caption = f"The {listing(f'test {measure.name}' for measure in measures)} of each row"
    caption += (
        ": a dot for each seed, the black line their mean and the bar one standard deviation either way."
        if many
        else "."
    )
    return finish(figure, "results", caption)


def _draw_dots(axes: Axes, columns: Sequence[pd.Series]) -> None:
    for place, values in enumerate(columns):
        color, width = _look(place)[0], 0.0
        if len(values) > 1:
            mean, std = values.mean(), values.std()
            axes.barh(place, 2 * std, left=mean - std, height=0.55, color=color, alpha=0.22)
            axes.plot([mean, mean], [place - 0.28, place + 0.28], color=BLACK, lw=1.4)
            width = 0.16
        places = place + np.linspace(-width, width, len(values))
        axes.plot(values, places, "o", color=color, ms=5, mec="white", mew=0.6)
    axes.use_sticky_edges = False  # or a bar would touch the frame
    axes.locator_params(axis="x", nbins=6)


def draw_overlaid(groups: Sequence[Group]) -> Picture | None:
    """Losses on the training and validation sets: thin lines for seeds, a thick one for their mean."""
    shown = [group for group in groups if any(len(run.evals) for run in group.runs)][:MAX_LINES]
    if not shown:
        return None
    places = {group.name: place for place, group in enumerate(groups)}
    figure = new_figure(4.2 + 0.24 * (-(-len(shown) // 4)))
    training, validation = figure.subplots(1, 2)
    leave_out = [
        group for group in shown if any(run.config["train"]["part"] != "train" for run in group.runs)
    ]
    kept = [group for group in shown if group not in leave_out]
    for axes, part, drawn in ((training, "train", shown), (validation, "val", kept)):
        curves = {group.name: _curves(group, part) for group in drawn}
        for name, of_seeds in curves.items():
            _draw_group(axes, name, of_seeds, places[name])
        step_axis(axes)
        set_scale(axes, "y", [loss for each in curves.values() for loss in each.to_numpy().flat], log=True)
    losses = dict.fromkeys(group.words.loss for group in shown)
    training.set(ylabel=f"loss ({' or '.join(losses)})", title="training set")
    validation.set(title="validation set")
    legend_below(figure, training)
    return finish(figure, "losses", _caption(groups, shown, leave_out))


def _caption(groups: Sequence[Group], shown: Sequence[Group], left_out: Sequence[Group]) -> str:
    several = any(len(group.runs) > 1 for group in groups)
    caption = "The loss over training steps"
    caption += ": thin lines are seeds, thick ones their mean." if several else "."
    if left_out:
        names = listing(quoted(group.name) for group in left_out)
        caption += f" {names} trained on the validation set, so only the left panel has them."
    if len(shown) < len(groups):
        caption += f" The first {len(shown)} of {len(groups)} rows."
    return caption


def _curves(group: Group, part: str) -> pd.DataFrame:
    """Losses over training steps, a column for each run."""
    runs = [run.evals.set_index("step")[f"{part}.loss"] for run in group.runs if len(run.evals)]
    return pd.concat(runs, axis=1, keys=range(len(runs)))


def _draw_group(axes: Axes, name: str, curves: pd.DataFrame, place: int) -> None:
    color, style = _look(place)
    if curves.shape[1] > 1:
        for _, curve in curves.items():
            known = curve.dropna()
            axes.plot(known, color=color, ls=style, lw=0.7, alpha=0.4, marker=dots(known))
    mean = curves.dropna().mean(axis=1)
    if len(mean):
        label, marker, every = wrapped(name, 30), MARKERS[place % len(MARKERS)], max(1, len(mean) // 6)
        axes.plot(mean, color=color, ls=style, lw=1.9, marker=marker, ms=5, markevery=every, label=label)
