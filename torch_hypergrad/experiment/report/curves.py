"""What happened over the training steps: losses, metrics, and the health of the hypergradient."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes

from .read import RecordedRun
from .style import (
    BLACK,
    BLUE,
    ORANGE,
    SKY,
    VERMILION,
    Picture,
    dots,
    finish,
    legend_below,
    listing,
    panels,
    set_scale,
    step_axis,
)


def draw_curves(run: RecordedRun) -> Picture | None:
    """The loss and each metric on the training and validation sets."""
    if run.evals.empty and run.tables["train"].empty:
        return None
    metrics = run.words.metrics
    figure, every = panels(1 + len(metrics), 2, 3.4)
    _draw_losses(every[0], run)
    for axes, metric in zip(every[1:], metrics):
        for part, (color, label) in PARTS.items():
            _plot(axes, run.evals, f"{part}.{metric.name}", metric.factor, color=color, label=label)
        axes.set(ylabel=metric.header)
    for axes in every:
        step_axis(axes)
        mark_first_hyper_step(axes, run)
    legend_below(figure, *every)
    restarts = run.config["train"]["episodes"] or 1
    names = listing(["The loss", *(metric.name for metric in metrics)])
    caption = f"{names} on the training and the validation {run.words.examples}"
    caption += ", with a dotted line at the first hyper step" if len(run.hyper) else ""
    caption += f"; the loss jumps up where each of the {restarts} trainings begins" if restarts > 1 else ""
    return finish(figure, "curves", caption + ".")


PARTS = {"train": (BLUE, "training set"), "val": (VERMILION, "validation set")}


def _draw_losses(axes: Axes, run: RecordedRun) -> None:
    batches, evals = run.tables["train"], run.evals
    _plot(axes, batches, "loss", color=SKY, lw=0.7, alpha=0.7, label="training batches")
    for part, (color, label) in PARTS.items():
        _plot(axes, evals, f"{part}.loss", color=color, label=label)
    axes.set(ylabel=f"loss ({run.words.loss})")
    shown = pd.concat([batches["loss"], evals.get("train.loss"), evals.get("val.loss")])
    set_scale(axes, "y", shown, log=True)


def _plot(axes: Axes, table: pd.DataFrame, column: str, factor: float = 1.0, **look: Any) -> None:
    """A column over training steps."""
    if column in table:
        axes.plot(table["step"], factor * table[column], marker=dots(table), **look)


def mark_first_hyper_step(axes: Axes, run: RecordedRun) -> None:
    """A dotted line where warm-up ends."""
    if len(run.hyper):
        axes.axvline(run.hyper["step"].iloc[0], color=BLACK, lw=0.9, ls=":", label="first hyper step")


def draw_health(run: RecordedRun) -> Picture | None:
    """What tells whether each hypergradient can be trusted, at each hyper step."""
    hyper = run.hyper
    shown = {key: label for key, label in HEALTH.items() if hyper[key].notna().any()}
    if hyper["num_matvecs"].nunique(dropna=False) == 1:
        shown.pop("num_matvecs", None)  # the same each time: the head of the page says how many
    if not shown:
        return None
    warned = hyper["warnings"].map(bool, na_action="ignore").eq(True)
    figure, every = panels(len(shown), 3, 2.9)
    for axes, (key, label) in zip(every, shown.items()):
        points = hyper.dropna(subset=key)
        size = 4 if len(points) < 60 else 2
        axes.plot(points["step"], points[key], color=BLUE, marker="o", ms=size, lw=0.9)
        axes.set_title(label)
        set_scale(axes, "y", points[key], log=key != "num_matvecs")
        step_axis(axes)
        if len(marked := points[warned[points.index]]):
            axes.plot(marked["step"], marked[key], "o", color=ORANGE, ms=5, label="hyper step with a warning")
        for number, step in enumerate(run.skipped["step"]):
            label = "" if number else "skipped hyper step"
            axes.axvline(step, color=VERMILION, lw=0.8, alpha=0.6, label=label)
    legend_below(figure, *every)
    caption = "How each hyper step went"
    caption += "; those with a warning are orange" if warned.any() else ""
    caption += "; the vertical lines are skipped hyper steps" if len(run.skipped) else ""
    return finish(figure, "health", caption + ".", f"Over training steps: {', '.join(shown.values())}.")


HEALTH = {
    "residual": "relative residual of the solver",
    "hypergradient_norm": "norm of the hypergradient",
    "num_matvecs": "products with the Hessian",
    "adjoint_growth": "growth of adjoints over the sweep",
    "product_error": "estimated error of products",
}
