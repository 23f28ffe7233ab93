"""Text by bytes: any files, the next byte from the ones before."""

from __future__ import annotations

import glob
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score
from torch import Tensor, nn

from ..config import ConfigError
from .base import Batch, Examples, Metric, Split, Task, most_likely

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTINUATION = 80  # bytes that a prediction goes on for


class Stretch(Examples):
    """Places in the bytes of memory-mapped files: no more of them is in memory than the system keeps.

    Args:
        files: arrays of bytes, one after the other.
        context: bytes before a place that belong to it.
        first: the first byte of the stretch.
        last: the byte after its last.
        device: where batches go.
    """

    def __init__(
        self,
        files: Sequence[np.ndarray],
        context: int,
        first: int,
        last: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._files, self._context, self._first, self._last, self._device = (
            files,
            context,
            first,
            last,
            device,
        )
        self._ends = np.cumsum([len(file) for file in files])
        self._window = np.arange(context + 1)

    def __len__(self) -> int:
        return self._last - self._first - self._context

    def take(self, rows: Tensor) -> Batch:
        places = self._first + rows.cpu().numpy()[:, None] + self._window
        found = torch.from_numpy(self._bytes(places.reshape(-1)).reshape(places.shape).astype(np.int64))
        found = found.to(self._device)
        return Batch(found[:, :-1], found[:, -1])

    def to(self, device: torch.device) -> Stretch:
        return Stretch(self._files, self._context, self._first, self._last, device)

    def _bytes(self, places: np.ndarray) -> np.ndarray:
        of_file = np.searchsorted(self._ends, places, side="right")
        found = np.empty(len(places), np.uint8)
        for number in np.unique(of_file):
            chosen = of_file == number
            start = self._ends[number] - len(self._files[number])
            found[chosen] = self._files[number][places[chosen] - start]
        return found


class TextBytes(Task):
    r"""The next byte of files; the loss is the cross-entropy in bits,

    .. math:: -\log_2 p(b_t \mid b_{t-c}, \dots, b_{t-1}).

    The files are put one after the other. The last bytes are the test set, those before them the validation
    set, and no context reaches from one into another. Files may be larger than memory.

    Args:
        files: a file, a folder (all files in it, by name), a pattern such as docs/\*.md, or a list of them.
        context: bytes that the network sees.
        train_size: training bytes, the first ones. null takes all that are left.
        val_size: validation bytes.
        test_size: test bytes.
    """

    examples, loss = "bytes", "bits per byte"
    input_dtype = torch.int64

    def __init__(
        self,
        files: str | list[str],
        context: int = 16,
        train_size: int | None = None,
        val_size: int = 10_000,
        test_size: int = 10_000,
    ) -> None:
        for key, number in (("context", context), ("val_size", val_size), ("test_size", test_size)):
            if number < 1:
                raise ConfigError(f"task.{key}: got {number}, expected at least 1.")
        if train_size is not None and train_size < 1:
            raise ConfigError(f"task.train_size: got {train_size}, expected at least 1.")
        self.files = [files] if isinstance(files, str) else list(files)
        self.data = ", ".join(self.files)
        self.context, self.sizes = context, (train_size, val_size, test_size)
        self.input_shape, self.num_outputs = (context,), 256

    def load(self, seed: int) -> Split:
        mapped = [np.memmap(file, np.uint8, "r") for file in _found(self.files) if file.stat().st_size]
        total, context = sum(map(len, mapped)), self.context
        train, val, test = self.sizes
        test_first = total - test - context
        val_first = test_first - val - context
        num_train = val_first - context if train is None else train
        if num_train < 1 or num_train + context > val_first:
            raise ConfigError(
                f"task: {len(mapped)} files of {total:,} bytes are too few for {train or 'some'} training, "
                f"{val} validation and {test} test bytes, with a context of {context} before each. Lower a "
                "size."
            )
        ends = ((0, num_train + context), (val_first, test_first), (test_first, total))
        train_part, val_part, test_part = (Stretch(mapped, context, *each) for each in ends)
        return Split(train_part, val_part, test_part)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none") / math.log(2)

    def metrics(self) -> Mapping[str, Metric]:
        return {"next byte": Metric(accuracy_score, most_likely, percent=True)}

    @torch.no_grad()
    def predict(self, network: nn.Module, files: Sequence[Path]) -> list[Sequence[str]]:
        """For each file its bits per byte, and how it might go on, drawn with a fixed seed."""
        found: list[Sequence[str]] = []
        for file in files:
            content = _content(file)
            if len(content) <= self.context:
                raise ConfigError(
                    f"{file} has {len(content)} bytes, and the network looks back on {self.context}."
                )
            windows = torch.from_numpy(content.astype(np.int64)).unfold(0, self.context + 1, 1)
            losses = [self.losses(network(part[:, :-1]), part[:, -1]) for part in windows.split(1000)]
            said = _goes_on(network, windows[-1][1:], CONTINUATION)
            found.append((str(file), f"{float(torch.cat(losses).mean()):.3f} bits per byte", repr(said)))
        return found

    def figures(self, network: nn.Module, split: Split, values: Mapping[str, Tensor]) -> Mapping[str, Figure]:
        """Tuned values of the first layer by how far back a byte lies."""
        found = {}
        for name, value in values.items():
            if value.ndim == 2 and "/" in name and value.shape[1] % self.context == 0 and self.context > 1:
                setting = name.partition("/")[0].replace("_", " ")
                by_place = value.double().cpu().view(len(value), self.context, -1)
                if bool((value > 0).all()):
                    tensor = name.partition("/")[2]
                    caption = f"Learned {setting} of {tensor} by how many bytes back, geometric means."
                    found[caption] = _by_place(setting, by_place.log().mean((0, 2)).exp())
        return found


def _found(names: Sequence[str]) -> list[Path]:
    """Raises ConfigError."""
    files: list[Path] = []
    for name in names:
        path = Path(name).expanduser()
        matches = (
            sorted(path.iterdir())
            if path.is_dir()
            else sorted(map(Path, glob.glob(str(path), recursive=True)))
        )
        matches = [match for match in matches if match.is_file()]
        if not matches:
            raise ConfigError(
                f"task.files: {name} is no file, no folder with files, and no pattern that finds some."
            )
        files += matches
    return files


def _content(file: Path) -> np.ndarray:
    try:
        return np.fromfile(file, np.uint8)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror}.") from error


def _goes_on(network: nn.Module, context: Tensor, num: int) -> str:
    generator, found = torch.Generator().manual_seed(0), []
    for _ in range(num):
        shares = network(context[None])[0].softmax(0)
        found.append(int(torch.multinomial(shares, 1, generator=generator)))
        context = torch.cat([context[1:], torch.tensor(found[-1:])])
    return bytes(found).decode("utf-8", errors="replace")


def _by_place(setting: str, means: Tensor) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.0, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(len(means), 0, -1), means, "o-", color="#0072B2", ms=4)
    axes.set(xlabel="bytes back", ylabel=setting, yscale="log")
    return figure
