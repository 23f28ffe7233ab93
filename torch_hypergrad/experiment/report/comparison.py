"""Pictures that compare several runs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes

from .groups import Group, shown_measures
from .read import RecordedRun
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
        columns = [
            [measure.factor * value for value in group.numbers("test", measure.name)] for group in groups
        ]
        _draw_dots(axes, columns)
        axes.set(xlabel=f"test {measure.header}")
    every[0].set_yticks(range(len(groups)), [wrapped(group.name) for group in groups])
    every[0].set_ylim(len(groups) - 0.4, -0.6)
    losses = [value for group in groups for value in group.numbers("test", "loss")]
    set_scale(every[-1], "x", losses, log=0 < 20 * min(losses) < max(losses))
    many = max(len(group.finished) for group in groups) > 1
    caption = f"{listing(f'Test {measure.name}' for measure in measures)} of each row"
    caption += (
        ": a dot for each seed, the black line their mean and the bar one standard deviation either way."
        if many
        else "."
    )
    return finish(figure, "results", caption)


def _draw_dots(axes: Axes, columns: Sequence[Sequence[float]]) -> None:
    for place, values in enumerate(columns):
        color = _look(place)[0]
        shifts = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else [0.0]
        if len(values) > 1:
            mean, std = float(np.mean(values)), float(np.std(values, ddof=1))
            axes.barh(place, 2 * std, left=mean - std, height=0.55, color=color, alpha=0.22)
            axes.plot([mean, mean], [place - 0.28, place + 0.28], color=BLACK, lw=1.4)
        axes.plot(
            values,
            [place + shift for shift in shifts[: len(values)]],
            "o",
            color=color,
            ms=5,
            mec="white",
            mew=0.6,
        )
    axes.use_sticky_edges = False  # or a bar would touch the frame
    axes.locator_params(axis="x", nbins=6)


def draw_overlaid(groups: Sequence[Group]) -> Picture | None:
    """Losses on the training and validation sets: thin lines for seeds, a thick one for their mean."""
    shown = [group for group in groups if any(run.evals for run in group.runs)][:MAX_LINES]
    if not shown:
        return None
    places = {group.name: place for place, group in enumerate(groups)}
    figure = new_figure(4.2 + 0.24 * (-(-len(shown) // 4)))
    training, validation = figure.subplots(1, 2)
    leave_out = [
        group for group in shown if any(run.config["train"]["part"] != "train" for run in group.runs)
    ]
    for axes, part, drawn in (
        (training, "train", shown),
        (validation, "val", [group for group in shown if group not in leave_out]),
    ):
        for group in drawn:
            _draw_group(
                axes, group, part, *_look(places[group.name]), MARKERS[places[group.name] % len(MARKERS)]
            )
        step_axis(axes)
        losses = [line[part]["loss"] for group in drawn for run in group.runs for line in run.evals]
        set_scale(axes, "y", losses, log=True)
    training.set(ylabel=f"loss ({groups[0].words.loss})", title="training set")
    validation.set(title="validation set")
    legend_below(figure, training)
    return finish(figure, "losses", _caption(groups, shown, leave_out))


def _caption(groups: Sequence[Group], shown: Sequence[Group], left_out: Sequence[Group]) -> str:
    several = any(len(group.runs) > 1 for group in groups)
    caption = "Loss over training" + (": thin lines are seeds, thick ones their mean." if several else ".")
    if left_out:
        names = listing(quoted(group.name) for group in left_out)
        caption += f" {names} trained on the validation set, so only the left panel has them."
    if len(shown) < len(groups):
        caption += f" The first {len(shown)} of {len(groups)} rows."
    return caption


def _draw_group(axes: Axes, group: Group, part: str, color: str, style: str, marker: str) -> None:
    curves = [_curve(run, part) for run in group.runs if run.evals]
    common = sorted(set.intersection(*(set(curve) for curve in curves)))
    if len(curves) > 1:
        for curve in curves:
            axes.plot(
                list(curve),
                list(curve.values()),
                color=color,
                ls=style,
                lw=0.7,
                alpha=0.4,
                marker=dots(curve),
            )
    if common:
        mean = [float(np.mean([curve[step] for curve in curves])) for step in common]
        every = max(1, len(common) // 6)
        axes.plot(
            common,
            mean,
            color=color,
            ls=style,
            lw=1.9,
            marker=marker,
            ms=5,
            markevery=every,
            label=wrapped(group.name, 30),
        )


def _curve(run: RecordedRun, part: str) -> dict[float, float]:
    return {line["step"]: line[part]["loss"] for line in run.evals}
