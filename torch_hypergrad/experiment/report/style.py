"""How pictures and numbers look: colours for the colour-blind too, scales, and finished pictures."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Iterable, Iterator, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import (
    Formatter,
    FuncFormatter,
    LogLocator,
    NullLocator,
    ScalarFormatter,
    SymmetricalLogLocator,
)

# Okabe and Ito, Color universal design, 2008
BLACK, ORANGE, SKY, GREEN, BLUE, VERMILION, PURPLE, GREY = (
    "#000000", "#E69F00", "#56B4E9", "#009E73", "#0072B2", "#D55E00", "#CC79A7", "#777777",
)  # fmt: skip
COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, BLACK, GREY)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", ":", "-.")

DASH = "\N{EN DASH}"  # for what is not known
WIDTH = 10.0  # inches; the page shows them at 96 pixels each
DPI = 130
GAP = 0.22  # inches between rows of panels, so that the label of an axis is not read as the next title's
PANEL = 0.7  # of the width that is there for it; the rest is for the axis on its left
LOG_FROM = 3.0  # a log scale of less than this ratio would have hardly a tick

STYLE: Any = {
    "font.size": 9.5,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "figure.facecolor": "white",
    "figure.constrained_layout.h_pad": GAP / 2,
    "savefig.facecolor": "white",
}


@dataclass(frozen=True)
class Picture:
    """A finished picture: the stem of its file, its caption, and words for whoever cannot see it."""

    name: str
    caption: str
    alt: str
    png: bytes
    width: int  # on the page, in CSS pixels: letters are of the same size on all pictures
    height: int

    @classmethod
    def of(cls, name: str, caption: str, png: bytes) -> Picture:
        """One that was drawn elsewhere, of the size that the header of its PNG says."""
        width, height = (round(96 / DPI * int.from_bytes(png[i : i + 4], "big")) for i in (16, 20))
        return cls(name, caption, caption, png, width, height)


@contextmanager
def report_style() -> Iterator[None]:
    """Draw inside of it. Letters that the font lacks are drawn as boxes, without a warning for each."""
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def new_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, sizes in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def panels(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """``count`` panels in rows."""
    columns = 2 if count == 4 else min(columns, count)
    rows = math.ceil(count / columns)
    figure = new_figure(rows * (height + GAP), WIDTH if columns > 2 else {1: 6.5, 2: 9.0}[columns])
    every = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in every[count:]:
        spare.remove()
    return figure, every[:count]


def finish(figure: Figure, name: str, caption: str, alt: str | None = None) -> Picture:
    """The figure as a PNG, with its caption and alternative text."""
    buffer = io.BytesIO()
    figure.set_dpi(DPI)
    _fit_titles(figure)
    FigureCanvasAgg(figure).print_png(buffer, metadata={"Software": None})
    width, height = (round(96 * inches) for inches in figure.get_size_inches())
    return Picture(name, caption, alt or caption, buffer.getvalue(), width, height)


def _fit_titles(figure: Figure) -> None:
    """Smaller letters for titles that are wider than their panel and would run into the next one."""
    for axes in figure.axes:
        place = axes.get_subplotspec()
        if place is not None and axes.get_title():
            room = PANEL * figure.bbox.width / place.get_gridspec().ncols
            fits = min(room / axes.title.get_window_extent().width, 1.0)
            axes.title.set_fontsize(float(axes.title.get_fontsize()) * fits)


def without_math(text: str) -> str:
    """For texts of the user's, in which a dollar sign is just that."""
    return text.replace("$", r"\$")


def shorten(text: str, length: int = 30) -> str:
    """Long names keep their end, which tells tensors apart."""
    return without_math(text if len(text) <= length else "…" + text[-length + 1 :])


def wrapped(text: str, length: int = 32) -> str:
    """Names of rows, over several lines."""
    return without_math("\n".join(textwrap.wrap(text, length, max_lines=3, placeholder=" …")))


def finite(values: Any) -> np.ndarray:
    """The finite ones, as a vector."""
    array = np.asarray(values, dtype=float).reshape(-1)
    return array[np.isfinite(array)]


def number(value: float | None, digits: int = 3) -> str:
    """With so many significant digits: 0.0123, 1.5e-5; a dash for none."""
    if value is None or not math.isfinite(value):
        return DASH
    if float(value).is_integer() and abs(value) < 1e6:
        return f"{int(value):,}"
    mantissa, e, exponent = f"{value:.{digits}g}".partition("e")
    return mantissa + (f"e{int(exponent)}" if e else "")


def fixed(value: float | None, digits: int) -> str:
    """With so many digits after the point; of a loss that has run away, the power of ten."""
    if value is None or not math.isfinite(value):
        return DASH
    return f"{value:,.{digits}f}" if abs(value) < 1e6 else number(value)


def percent(fraction: float | None, digits: int = 1) -> str:
    """A fraction in percent; a dash for none."""
    return DASH if fraction is None or not math.isfinite(fraction) else f"{100 * fraction:.{digits}f} %"


def count_of(count: int, word: str) -> str:
    """1 line, 2 lines."""
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def quoted(name: str) -> str:
    """In quotation marks."""
    return f"\N{LEFT DOUBLE QUOTATION MARK}{name}\N{RIGHT DOUBLE QUOTATION MARK}"


def listing(words: Iterable[str]) -> str:
    """One, two and three."""
    *first, last = list(words) or [""]
    return f"{', '.join(first)} and {last}" if first else last


def is_log(values: Any, log: bool) -> bool:
    """Whether a pure log scale can show the values, and is worth it."""
    found = finite(values)
    return bool(log and len(found) and found.min() > 0 and found.max() >= LOG_FROM * found.min())


def set_scale(axes: Axes, which: Literal["x", "y"], values: Any, log: bool) -> None:
    """A log scale if asked for and possible: linear around zero where some are zero, else linear."""
    found, axis = finite(values), axes.xaxis if which == "x" else axes.yaxis
    formatter: Formatter = FuncFormatter(lambda value, _: number(value))
    if is_log(found, log):
        axes.set(**{f"{which}scale": "log"})
        few = found.max() < (30 if which == "x" else 300) * found.min()
        axis.set(major_locator=LogLocator(subs=(1, 2, 5) if few else (1,)), minor_locator=NullLocator())
    elif log and len(found) and found.min() == 0 and found.max() > 0:
        least = max(found[found > 0].min(), found.max() * 1e-6)
        (axes.set_xscale if which == "x" else axes.set_yscale)("symlog", linthresh=least)
        locator = SymmetricalLogLocator(base=10, linthresh=least)
        locator.set_params(numticks=5)
        axes.set(**{f"{which}lim": (-least / 2, found.max() * 1.5)})
        axis.set(major_locator=locator, minor_locator=NullLocator())
    else:
        axes.locator_params(axis=which, nbins=5)
        formatter = ScalarFormatter(useOffset=False)
    axis.set_major_formatter(formatter)


def step_axis(axes: Axes) -> None:
    """The axis of training steps."""
    axes.set_xlabel("training step")
    axes.locator_params(axis="x", nbins=5, integer=True)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))


def legend_below(figure: Figure, *every: Axes) -> None:
    """One legend for all of these panels, where it hides nothing."""
    entries = {label: handle for axes in every for handle, label in zip(*axes.get_legend_handles_labels())}
    if entries:
        figure.legend(
            list(entries.values()), list(entries), loc="outside lower center", ncols=min(len(entries), 4)
        )


def dots(points: Sized) -> str:
    """A marker where a line of so few points could not be seen."""
    return "o" if len(points) < 3 else ""
