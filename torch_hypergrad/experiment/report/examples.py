"""Pictures of training images: their weights, the least of them, and what augmentation makes of them."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from sklearn.metrics import roc_auc_score, roc_curve

from .final_values import bin_edges
from .pixels import draw_image
from .read import WEIGHTS, RecordedRun
from .style import BLUE, GREEN, GREY, VERMILION, Picture, finish, legend_below, new_figure, percent, shorten

MAX_LOWEST = 24
MAX_COLUMNS, MAX_DRAWS = 10, 4


# ---- learned weights of training images --------------------------------------------------------------------


def has_weights(run: RecordedRun) -> bool:
    """Whether the run has tuned weights of its training images."""
    return WEIGHTS in run.tuned


def weights_of(run: RecordedRun) -> tuple[np.ndarray, np.ndarray]:
    """The weight of each training image, and whether its label was replaced by a wrong one."""
    weights = run.tuned[WEIGHTS].double().numpy().reshape(-1)
    wrong = run.tuned.get("wrong")
    return weights, np.zeros(len(weights), bool) if wrong is None else wrong.numpy().astype(bool)


def area_under_curve(run: RecordedRun) -> float | None:
    """How well low weights tell wrong labels from right ones: 1 is perfect, 0.5 chance. None without both."""
    weights, wrong = weights_of(run)
    return float(roc_auc_score(wrong, -weights)) if wrong.any() and not wrong.all() else None


def weights_sentences(run: RecordedRun) -> list[str]:
    """Counts labels below a weight of one half."""
    weights, wrong = weights_of(run)
    low, area = weights < 0.5, area_under_curve(run)
    if not wrong.any():
        return [
            f"Of {len(weights):,} training {run.words.examples}, {low.sum():,} have "
            "a weight under 0.5. Which labels are wrong is not known."
        ]
    told = (
        ""
        if area is None
        else f" A right label outweighs a wrong one with a probability of {percent(area)} (AUC {area:.3f})."
    )
    return [
        f"Of {wrong.sum():,} wrong labels, {(low & wrong).sum():,} have a weight under 0.5; "
        f"of {(~wrong).sum():,} right labels, {(low & ~wrong).sum():,} have.{told}"
    ]


def draw_weights(run: RecordedRun) -> Picture:
    """Histograms of the weights of right and wrong labels, and the curve of what a threshold would find."""
    weights, wrong = weights_of(run)
    area = area_under_curve(run)
    figure = new_figure(3.7, 9.5 if area is not None else 6.5)
    left, *right = figure.subplots(1, 2 if area is not None else 1, squeeze=False)[0]
    edges = bin_edges(np.clip([*weights, 0.0, 1.0], 0, 1), log=False)
    if wrong.any():
        left.hist(weights[~wrong], edges, color=BLUE, alpha=0.75, label="right labels")
        left.hist(
            weights[wrong],
            edges,
            color=VERMILION,
            alpha=0.75,
            hatch="///",
            ec="white",
            lw=0.4,
            label="wrong labels",
        )
        legend_below(figure, left)
    else:
        left.hist(weights, edges, color=BLUE, alpha=0.75)
    left.set(xlabel="learned weight", ylabel=f"number of training {run.words.examples}")
    left.axvline(0.5, color=GREY, ls=":", lw=1)
    caption = f"The learned weights of the training {run.words.examples}"
    if area is not None:
        _draw_roc(right[0], weights, wrong, area)
        caption += ", and how many wrong labels a threshold on them finds at the price of how many right ones"
    return finish(figure, "example_weights", caption + ".")


def _draw_roc(axes: Axes, weights: np.ndarray, wrong: np.ndarray, area: float) -> None:
    false_alarms, found, _ = roc_curve(wrong, -weights)
    axes.plot([0, 100], [0, 100], color=GREY, lw=1, ls="--", label="chance")
    axes.plot(100 * false_alarms, 100 * found, color=BLUE, label=f"AUC {area:.3f}")
    axes.set(xlabel="right labels thrown out (%)", ylabel="wrong labels found (%)", aspect="equal")
    axes.legend(loc="lower right")


def draw_lowest(run: RecordedRun) -> Picture | None:
    """The training images of the least weights, with their labels."""
    lowest = run.tuned.get("lowest")
    count = 0 if lowest is None else min(len(lowest["labels"]), MAX_LOWEST)
    if lowest is None or not count:
        return None
    columns, known = min(8, count), bool(weights_of(run)[1].any())
    rows = -(-count // columns)
    figure = new_figure(1.62 * rows, 1.25 * columns if columns > 3 else 5.0)
    classes = run.tuned.get("classes", [])
    for place, axes in enumerate(figure.subplots(rows, columns, squeeze=False).flat):
        if place >= count:
            axes.remove()
            continue
        label = int(lowest["labels"][place])
        name = classes[label] if label < len(classes) else str(label)
        draw_image(axes, lowest["images"][place].double().numpy(), high=255.0)
        wrong = bool(lowest["wrong"][place])
        words, color = (("wrong", VERMILION) if wrong else ("right", GREEN)) if known else ("label", GREY)
        axes.set_title(f"{words}: {shorten(name, 11)}", fontsize=8.5)
        axes.set_xlabel(f"weight {float(lowest['weights'][place]):.3f}", fontsize=8)
        axes.spines[:].set(
            visible=True, color=color, linewidth=2.5, linestyle="--" if known and not wrong else "-"
        )
    frames = "; labels that are wrong have a solid frame, right ones a dashed one" if known else ""
    return finish(
        figure, "lowest_weights", f"The {count} training images of least weight, with their labels{frames}."
    )


# ---- augmentation ------------------------------------------------------------------------------------------


def draw_augmented(run: RecordedRun) -> Picture | None:
    """Training images in the first row, and what the learned augmentation makes of them in those below."""
    augmented = run.tuned.get("augmented")
    if augmented is None or not len(augmented["before"]):
        return None
    before, after = augmented["before"].double().numpy(), augmented["after"].double().numpy()
    draws = after[None] if after.ndim == 4 else after
    rows = [before[:MAX_COLUMNS], *(draw[:MAX_COLUMNS] for draw in draws[:MAX_DRAWS])]
    columns = len(rows[0])
    figure = new_figure(1.0 * len(rows) + 0.1, max(1.0 * columns, 3.0))
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for number, (images, line) in enumerate(zip(rows, grid)):
        for image, axes in zip(images, line):
            draw_image(axes, image)
            axes.spines[:].set_visible(False)
        line[0].set_ylabel("original" if number == 0 else f"draw {number}", fontsize=9)
    caption = (
        "Training images (first row) and what the learned augmentation makes of them, each row drawn anew."
    )
    return finish(figure, "augmentation", caption)
