"""Maps of tuned values over the pixels that the first layer of the network looks at."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from ..config import setting_of
from .read import RecordedRun, part_of
from .style import Picture, finish, new_figure, number, shorten


def draw_pixel_maps(run: RecordedRun) -> list[Picture]:
    """For each setting tuned per element: the first layer's values over pixels, or filter positions."""
    image = run.tuned.get("mean_image")
    if image is None:
        return []
    first: dict[str, Picture] = {}
    for name, value in run.tuned.get("values", {}).items():
        setting = setting_of(name)
        if setting in first or "/" not in name or not value.isfinite().all():
            continue
        if value.dim() == 2 and value.shape[1] == image.numel():
            first[setting] = _draw_pixels(run, name)
        elif value.dim() == 4 and value.shape[1] == image.shape[0] and value.shape[-1] > 1:
            first[setting] = _draw_filter(run, name)
    return list(first.values())


def _draw_pixels(run: RecordedRun, name: str) -> Picture:
    image = run.tuned["mean_image"]
    figure = new_figure(4.2, 9.5)
    left, right = figure.subplots(1, 2)
    brightness = draw_image(left, image.double().numpy())
    left.set_title("mean training image")
    if len(image) == 1:
        figure.colorbar(brightness, ax=left, label="brightness")
    log = run.tune_of(name)["log"]
    values = run.tuned["values"][name].double().numpy().reshape(-1, *image.shape)
    _draw_map(figure, right, average(values, (0, 1), log), run, name)
    how = "geometric mean" if log and values.min() > 0 else "mean"
    colors = " and colour channels" if len(image) > 1 else ""
    caption = (
        f"Learned {setting_of(name).replace('_', ' ')} of {part_of(name)} over the pixels of the image "
        f"({how} over {len(values)} units{colors}), beside the mean image; white is where it began."
    )
    return finish(figure, f"pixels_{setting_of(name).replace('.', '_')}", caption)


def _draw_filter(run: RecordedRun, name: str) -> Picture:
    figure = new_figure(4.0, 5.5)
    axes = figure.subplots()
    log = run.tune_of(name)["log"]
    values = run.tuned["values"][name].double().numpy()
    mean = average(values, (0, 1), log)
    _draw_map(figure, axes, mean, run, name)
    if mean.size <= 49:
        for (row, column), value in np.ndenumerate(mean):
            paper = {"facecolor": "white", "alpha": 0.75, "lw": 0, "pad": 1.5}
            axes.text(column, row, number(float(value)), ha="center", va="center", fontsize=8, bbox=paper)
    how = "geometric mean" if log and values.min() > 0 else "mean"
    caption = (
        f"Learned {setting_of(name).replace('_', ' ')} of {part_of(name)} at "
        f"each position of its filters ({how} over {values.shape[0]} filters "
        f"and {values.shape[1]} input channels); white is where it began."
    )
    return finish(figure, f"filter_{setting_of(name).replace('.', '_')}", caption)


def average(values: np.ndarray, axis: tuple[int, ...], log: bool) -> np.ndarray:
    """The geometric mean on a log scale where no value is zero, else the mean."""
    if log and values.min() > 0:
        return np.exp(np.log(values).mean(axis))
    return values.mean(axis)


def _draw_map(figure: Figure, axes: Axes, mean: np.ndarray, run: RecordedRun, name: str) -> None:
    start = run.tuned.get("start", {}).get(name)
    log = bool(run.tune_of(name)["log"])
    center = (
        float(average(start.double().numpy().reshape(-1), (0,), log))
        if start is not None
        else float(np.median(mean))
    )
    reach = _reach(center, mean, log)
    norm = LogNorm(center / reach, center * reach) if reach else _linear(center, mean)
    shown = axes.imshow(mean, cmap="PuOr_r", norm=norm)
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    axes.set_title(shorten(f"learned {setting_of(name).replace('_', ' ')}, {part_of(name)}", 44))
    bar = figure.colorbar(shown, ax=axes)
    if reach:
        narrow = reach < 10
        bar.ax.yaxis.set(
            major_locator=LogLocator(subs=(1, 2, 5) if narrow else (1,)), minor_locator=NullLocator()
        )
    bar.ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: number(value)))


def _reach(center: float, values: np.ndarray, log: bool) -> float | None:
    """The greatest factor between the start and a value, at least 2; None if no log scale can show them."""
    if not log or center <= 0 or values.min() <= 0:
        return None
    return max(float(np.exp(np.abs(np.log(values / center)).max())), 2.0)


def _linear(center: float, values: np.ndarray) -> Normalize:
    """As wide below the start as above it, and never of no width."""
    reach = float(np.abs(values - center).max()) or abs(center) or 1.0
    return Normalize(center - reach, center + reach)


def draw_image(axes: Axes, image: np.ndarray, high: float = 1.0) -> AxesImage:
    """An image of shape (channels, height, width): grey, or in colour where it has three channels."""
    axes.set(xticks=[], yticks=[])
    axes.grid(False)
    image = np.clip(np.nan_to_num(image / high), 0, 1)
    if len(image) == 3:
        return axes.imshow(image.transpose(1, 2, 0))
    return axes.imshow(image.mean(0), cmap="gray", vmin=0, vmax=1)
