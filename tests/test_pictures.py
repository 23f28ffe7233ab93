"""On pictures of many panels all words can be told apart, as matplotlib measures them at their size."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from synthetic_runs import PER_ELEMENT, decays, make_run
from torch_hypergrad.experiment.report.curves import draw_health
from torch_hypergrad.experiment.report.final_values import draw_histograms
from torch_hypergrad.experiment.report.over_time import draw_over_time
from torch_hypergrad.experiment.report.read import RecordedRun, read_run
from torch_hypergrad.experiment.report.style import Picture, report_style

POINTS = 10.0  # between a label and the title under it; less, and the label reads as a part of that title
HEALTH = {
    "residual": 0.1,
    "hypergradient_norm": 0.3,
    "num_matvecs": [4, 5, 6],
    "adjoint_growth": 3.0,
    "product_error": 1e-3,
}
NAMES = (  # of tensors, in turn
    "encoder.layers.{}.self_attention.out_projection.weight",
    "ENCODER.LAYERS.{}.SELF_ATTENTION.OUT_PROJECTION_MW.WEIGHT",
    "layer{}.bias",
    "ENCODER.LAYERS.{}.SELF_ATTENTION.QUERY_KEY_WWWW.WEIGHT",
)


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that become pictures, laid out as they are, without the time for a PNG."""
    figures: list[Figure] = []

    def draw(canvas: FigureCanvasAgg, *args: Any, **options: Any) -> None:
        canvas.draw()
        figures.append(canvas.figure)

    monkeypatch.setattr(FigureCanvasAgg, "print_png", draw)
    return figures


def run_of(folder: Path, count: int) -> RecordedRun:
    """A run with so many tuned tensors, and health of as many kinds as there are at most."""
    shapes = {NAMES[place % len(NAMES)].format(place): (3, 4) for place in range(count)}
    health = dict(list(HEALTH.items())[:count])
    without = dict.fromkeys(list(HEALTH)[count:])
    hyper = {**health, **without, "warnings": {"slow": "slow"}}
    return read_run(make_run(folder, *decays(shapes), tune=PER_ELEMENT, num_hyper=3, hyper=hyper))


def labels_of(axes: Axes) -> list[Text]:
    """Those of both axes and their ticks, without the ticks beyond the ends, which are not drawn."""
    words = [axes.xaxis.label, axes.yaxis.label]
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        words += [tick.label1 for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
    return [word for word in words if word.get_visible() and word.get_text()]


def distance(one: Bbox, other: Bbox) -> float:
    """Between two boxes, sideways or in height, whichever is more; negative where they overlap."""
    sideways = max(one.x0 - other.x1, other.x0 - one.x1)
    return max(sideways, one.y0 - other.y1, other.y0 - one.y1)


def check(figure: Figure) -> None:
    """No word of a panel comes near another panel's title, and no title leaves the picture."""
    titled = [axes for axes in figure.axes if axes.get_title()]
    for axes, other in itertools.permutations(titled, 2):
        title = axes.title.get_window_extent()
        assert distance(title, other.title.get_window_extent()) > 0, "two titles overlap"
        for label in labels_of(other):
            away = 72 * distance(title, label.get_window_extent()) / figure.dpi
            below = label.get_window_extent().y0 > title.y1
            assert away > (POINTS if below else 0), f"{label.get_text()!r}: {away:.1f} pt from another title"
    for axes in titled:
        title = axes.title.get_window_extent()
        assert figure.bbox.x0 <= title.x0
        assert title.x1 <= figure.bbox.x1, "a title is cut off"


@pytest.mark.parametrize(
    ("draw", "count"),
    [(draw_over_time, count) for count in (1, 2, 3, 4, 6, 9, 12)]
    + [(draw_histograms, count) for count in (4, 12)],  # laid out as those above
)
def test_no_label_is_near_the_title_of_another_panel(
    tmp_path: Path, drawn: list[Figure], draw: Callable[[RecordedRun], Picture | None], count: int
) -> None:
    with report_style():
        draw(run_of(tmp_path / "run", count))
    (figure,) = drawn
    assert sum(bool(axes.get_title()) for axes in figure.axes) == count
    check(figure)


@pytest.mark.parametrize("count", range(1, len(HEALTH) + 1))
def test_no_label_is_near_the_title_of_another_panel_of_health(
    tmp_path: Path, drawn: list[Figure], count: int
) -> None:
    with report_style():
        draw_health(run_of(tmp_path / "run", count))
    (figure,) = drawn
    assert sum(bool(axes.get_title()) for axes in figure.axes) == count
    check(figure)
