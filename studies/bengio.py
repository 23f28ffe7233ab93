"""Draws what two examples find, a decay for each feature and weights of the past (Bengio 2000).

    PYTHONPATH=examples python -m studies.bengio --out docs/results

It takes a minute on one core.
"""

from __future__ import annotations

from pathlib import Path

import jsonargparse
import numpy as np
import torch
from arch.data import frenchdata
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter

import bengio_ridge
import time_weights

STYLES = {
    "none": ("o", "#999999"),
    "one, best of a grid": ("s", "#0072B2"),
    "one for each feature": ("D", "#D55E00"),
}


def draw_errors(axes: Axes, seeds: int) -> None:
    """A point for each split and kind of decay."""
    found = [bengio_ridge.compare(seed, start=1.0, evals=200) for seed in range(seeds)]
    for name, (marker, color) in STYLES.items():
        val, test = np.array([one[name][-2:] for one in found]).T
        label = f"{name}: {val.mean():.3f}, {test.mean():.3f}"
        axes.plot(val, test, marker, color=color, label=label)
    axes.set(
        title=f"diabetes, 65 features, {seeds} splits", xlabel="validation error", ylabel="test error",
        xscale="log", yscale="log",
    )  # fmt: skip
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_locator(FixedLocator([0.4, 0.6, 0.8, 1.0, 1.5, 2.0]))
        axis.set_major_formatter("{x:g}")
    axes.legend(title="weight decay: mean validation, test", frameon=False)


def draw_weights(axes: Axes) -> None:
    """A curve for each number of last values."""
    months = frenchdata.load()["Mkt-RF"].to_numpy()
    squares, age = (torch.tensor(months).square() + 1).log(), np.linspace(0, 60, 400)
    for num_lags, color in zip((0, 1, 2, 12), ("#009E73", "#D55E00", "#0072B2", "#999999")):
        series = time_weights.Series(squares, num_lags)
        _, (c, s) = min(series.tuned(start, evals=60) for start in time_weights.STARTS)
        weights = torch.tensor((c - age) / s).sigmoid()
        label = f"{num_lags} last value{'s' * (num_lags != 1)}"
        axes.plot(age, weights / weights[0], color=color, label=label)
    axes.set(
        title="tuned weights of the market's past", xlabel="age of the month (years)",
        ylabel="weight, over that of the present",
    )  # fmt: skip
    axes.legend(frameon=False)


def main() -> None:
    """Runs and draws."""
    parser = jsonargparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/results"), help="folder of the picture")
    options = parser.parse_args()
    torch.set_num_threads(1)
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    draw_errors(left, options.seeds)
    draw_weights(right)
    figure.savefig(options.out / "literature_bengio.png", dpi=80)


if __name__ == "__main__":
    main()
