"""What happened over the training steps: losses, metrics, and the health of the hypergradient."""

from __future__ import annotations

from matplotlib.axes import Axes

from .read import Record, RecordedRun
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
    if not run.evals and not run.records["train"]:
        return None
    metrics = run.words.metrics
    figure, every = panels(1 + len(metrics), 2, 3.4)
    _draw_losses(every[0], run)
    for axes, metric in zip(every[1:], metrics):
        for part, color in (("train", BLUE), ("val", VERMILION)):
            values = [metric.factor * value for value in _column(run.evals, part, metric.name)]
            axes.plot(_steps(run.evals), values, color=color, marker=dots(values), label=_LONG[part])
        axes.set(ylabel=metric.header)
    for axes in every:
        step_axis(axes)
        mark_first_hyper_step(axes, run)
    legend_below(figure, *every)
    restarts = run.config["train"]["episodes"] or 1
    names = listing(["The loss", *(metric.name for metric in metrics)])
    caption = f"{names} on the training and the validation {run.words.examples}"
    caption += ", with a dotted line at the first hyper step" if run.hyper else ""
    caption += f"; the loss jumps up where each of the {restarts} trainings begins" if restarts > 1 else ""
    return finish(figure, "curves", caption + ".")


_LONG = {"train": "training set", "val": "validation set"}


def _draw_losses(axes: Axes, run: RecordedRun) -> None:
    lines = run.records["train"]
    of_batches = [line["loss"] for line in lines]
    axes.plot(
        _steps(lines), of_batches, color=SKY, lw=0.7, alpha=0.7, marker=dots(lines), label="training batches"
    )
    shown = list(of_batches)
    for part, color in (("train", BLUE), ("val", VERMILION)):
        losses = _column(run.evals, part, "loss")
        axes.plot(_steps(run.evals), losses, color=color, marker=dots(losses), label=_LONG[part])
        shown += losses
    axes.set(ylabel=f"loss ({run.words.loss})")
    set_scale(axes, "y", shown, log=True)


def mark_first_hyper_step(axes: Axes, run: RecordedRun) -> None:
    """A dotted line where warm-up ends."""
    if run.hyper:
        axes.axvline(run.hyper[0]["step"], color=BLACK, lw=0.9, ls=":", label="first hyper step")


def draw_health(run: RecordedRun) -> Picture | None:
    """What tells whether each hypergradient can be trusted, at each hyper step."""
    if not run.hyper:
        return None
    wanted = {
        "residual": "relative residual of the solver",
        "hypergradient_norm": "norm of the hypergradient",
        "num_matvecs": "products with the Hessian",
        "adjoint_growth": "growth of adjoints over the sweep",
        "product_error": "estimated error of products",
    }
    shown = {
        key: label for key, label in wanted.items() if any(line.get(key) is not None for line in run.hyper)
    }
    if len({line.get("num_matvecs") for line in run.hyper}) == 1:
        shown.pop("num_matvecs", None)  # the same each time: the head of the page says how many
    if not shown:
        return None
    figure, every = panels(len(shown), 3, 2.9)
    for axes, (key, label) in zip(every, shown.items()):
        lines = [line for line in run.hyper if line.get(key) is not None]
        values = [line[key] for line in lines]
        axes.plot(_steps(lines), values, color=BLUE, marker="o", ms=4 if len(values) < 60 else 2, lw=0.9)
        axes.set_title(label)
        set_scale(axes, "y", values, log=key != "num_matvecs")
        step_axis(axes)
        if warned := [line for line in lines if line.get("warnings")]:
            label = "hyper step with a warning"
            axes.plot(_steps(warned), [line[key] for line in warned], "o", color=ORANGE, ms=5, label=label)
        for number, line in enumerate(run.skipped):
            axes.axvline(
                line["step"], color=VERMILION, lw=0.8, alpha=0.6, label="" if number else "skipped hyper step"
            )
    legend_below(figure, *every)
    caption = "How each hyper step went"
    caption += "; those with a warning are orange" if any(line.get("warnings") for line in run.hyper) else ""
    caption += "; the vertical lines are skipped hyper steps" if run.skipped else ""
    return finish(figure, "health", caption + ".", f"Over training steps: {', '.join(shown.values())}.")


def _steps(lines: list[Record]) -> list[float]:
    return [line["step"] for line in lines]


def _column(lines: list[Record], part: str, key: str) -> list[float]:
    return [line[part][key] for line in lines]
