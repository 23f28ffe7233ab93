"""Text by bytes: any files, the next byte from the ones before."""

from __future__ import annotations

import glob
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score
from torch import Tensor, nn

from ..config import ConfigError
from ..networks import ByteMLP
from .base import Batch, Examples, Metric, Split, Task, most_likely

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONTINUATION = 80  # bytes that a prediction goes on for
MOST_OPEN = 200  # files; systems allow 256 and more
MANY = 1000  # bytes that are predicted at a time


class Files:
    """Bytes of files, one after the other, read when they are asked for: memory-mapped, so that no more of
    them is in memory than the system keeps, and so many at a time as a process may have open.

    Args:
        paths: of the files.
    Raises:
        ConfigError: a file that cannot be read.
    """

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = [path for path in paths if _size(path)]
        self.sizes = [_size(path) for path in self.paths]
        self._ends = np.cumsum(self.sizes, dtype=np.int64)
        self._mapped = lru_cache(MOST_OPEN)(self._map)

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.paths else 0

    def read(self, places: np.ndarray) -> np.ndarray:
        """(n,) uint8: the bytes at these places.

        Raises:
            ConfigError: a file that is shorter than it was.
        """
        of_file = np.searchsorted(self._ends, places, side="right")
        found = np.empty(len(places), np.uint8)
        for number in np.unique(of_file).tolist():
            chosen = of_file == number
            start = self._ends[number] - self.sizes[number]
            found[chosen] = self._content(number)[places[chosen] - start]
        return found

    def _content(self, number: int) -> np.ndarray:
        """Read past its end, a mapped file would end the process."""
        path, size = self.paths[number], self.sizes[number]
        if _size(path) < size:
            raise ConfigError(f"{path} has shrunk from {size:,} to {_size(path):,} bytes. Restore it.")
        return self._mapped(number)

    def _map(self, number: int) -> np.ndarray:
        with _readable(self.paths[number]):
            return np.memmap(self.paths[number], np.uint8, "r")


def _size(path: Path) -> int:
    with _readable(path):
        return path.stat().st_size


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error


class Stretch(Examples):
    """Each byte of a stretch, from the bytes before it.

    Args:
        files: what it is a stretch of.
        context: bytes before a byte that belong to it.
        first: the first byte of the stretch, and of the first context.
        last: the byte after its last.
        device: where batches go.
    """

    def __init__(
        self, files: Files, context: int, first: int, last: int, device: torch.device | str = "cpu"
    ) -> None:
        self._files, self._context, self._first, self._last = files, context, first, last
        self._device = device
        self._window = np.arange(context + 1)

    def __len__(self) -> int:
        return self._last - self._first - self._context

    def take(self, rows: Tensor) -> Batch:
        places = self._first + rows.cpu().numpy()[:, None] + self._window
        found = self._files.read(places.reshape(-1)).reshape(places.shape).astype(np.int64)
        windows = torch.from_numpy(found).to(self._device)
        return Batch(windows[:, :-1], windows[:, -1])

    def to(self, device: torch.device) -> Stretch:
        return Stretch(self._files, self._context, self._first, self._last, device)


class TextBytes(Task):
    r"""The next byte of files, from the bytes before it; the loss is the cross-entropy

    .. math:: -\log p(b_t \mid b_{t-c}, \dots, b_{t-1}),

    and the same in bits, :math:`-\log_2 p`, is what runs are compared by.

    The files are put one after the other. The last bytes are the test set, those before them the validation
    set, and no context reaches from one into another. Files may be larger than memory.

    Args:
        files: a file, a folder (all files in it, by name), a pattern such as docs/\*.md, or a list of them.
        context: bytes that the network sees.
        train_size: training bytes, the first ones. null takes all that are left.
        val_size: validation bytes.
        test_size: test bytes.
    """

    examples, loss = "bytes", "cross-entropy"
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
        files, context = Files(_found(self.files)), self.context
        train, val, test = self.sizes
        test_first = len(files) - test - context
        val_first = test_first - val - context
        num_train = val_first - context if train is None else train
        if num_train < 1 or num_train + context > val_first:
            raise ConfigError(
                f"task: {len(files):,} bytes in {len(files.paths)} files are too few for {train or 'some'} "
                f"training, {val} validation and {test} test bytes, with a context of {context} before each. "
                "Lower a size."
            )
        ends = ((0, num_train + context), (val_first, test_first), (test_first, len(files)))
        train_part, val_part, test_part = (Stretch(files, context, *each) for each in ends)
        return Split(train_part, val_part, test_part)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    def metrics(self) -> Mapping[str, Metric]:
        return {
            "bits per byte": Metric(_mean_bits, self.losses, higher_is_better=False),
            "next byte": Metric(accuracy_score, most_likely, percent=True),
        }

    @torch.no_grad()
    def predict(self, network: nn.Module, files: Sequence[Path]) -> list[Sequence[str]]:
        """For each file its bits per byte, and how it might go on, drawn with a fixed seed."""
        found: list[Sequence[str]] = []
        for path in files:
            file = Files([path])
            if len(file) <= self.context:
                raise ConfigError(
                    f"{path} has {len(file)} bytes, and the network looks back on {self.context}. Take a "
                    "longer one."
                )
            stretch = Stretch(file, self.context, 0, len(file))
            batches = (stretch.take(rows) for rows in torch.arange(len(stretch)).split(MANY))
            losses = torch.cat([self.losses(network(inputs), told) for inputs, told in batches])
            bits = _mean_bits(None, losses.numpy())
            said = _goes_on(network, file.read(np.arange(len(file) - self.context, len(file))))
            found.append((str(path), f"{bits:.3f} bits per byte", repr(said)))
        return found

    def figures(self, network: nn.Module, split: Split, values: Mapping[str, Tensor]) -> Mapping[str, Figure]:
        """Tuned values of the first layer of ByteMLP by how far back a byte lies."""
        found: dict[str, Figure] = {}
        if not isinstance(network, ByteMLP) or self.context == 1:
            return found
        for name, value in values.items():
            setting, _, tensor = name.partition("/")
            if tensor == "hidden.weight" and value.ndim == 2 and bool((value > 0).all()):
                setting = setting.replace("_", " ")
                logs = value.double().log().cpu().view(len(value), self.context, -1)
                caption = f"Learned {setting} of {tensor} by how many bytes back, geometric means."
                found[caption] = _by_place(setting, logs.mean((0, 2)).exp())
        return found


def _found(names: Sequence[str]) -> list[Path]:
    """Raises ConfigError."""
    files: dict[Path, Path] = {}
    for name in names:
        path = Path(name).expanduser()
        every = path.iterdir() if path.is_dir() else map(Path, glob.glob(str(path), recursive=True))
        matches = sorted(match for match in every if match.is_file())
        if not matches:
            raise ConfigError(
                f"task.files: {name} is no file, no folder with files, and no pattern that finds some."
            )
        for match in matches:
            if match.resolve() in files:  # what is trained on may not be tested on
                raise ConfigError(f"task.files: {match} is there twice. Name each file once.")
            files[match.resolve()] = match
    return list(files.values())


def _mean_bits(_: object, losses: np.ndarray) -> float:
    return float(losses.mean(dtype=np.float64)) / math.log(2)


def _goes_on(network: nn.Module, end: np.ndarray) -> str:
    """What may come next, drawn with a fixed seed."""
    generator, context = torch.Generator().manual_seed(0), torch.from_numpy(end.astype(np.int64))
    found: list[int] = []
    for _ in range(CONTINUATION):
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
