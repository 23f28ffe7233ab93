"""Where images come from: labels and classes at once, images by row."""

from __future__ import annotations

import os
import warnings
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from torch import Tensor
from tqdm import tqdm

from ..config import ConfigError
from ..messages import one_line
from .base import Batch, Examples, InMemory

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10, MNIST  # slow to import, and not needed for digits

MANY = 2000  # pictures of which decoding shows a progress bar
MOST_KEPT = 2**27  # bytes of pictures that stay decoded; the last batch always does


@dataclass(frozen=True)
class Place:
    """Which images, and where they are."""

    data: str
    root: str = "data"
    download: bool = False
    image_size: int | None = None


class Pool(ABC):
    """Labelled images of which rows are chosen before they are read."""

    labels: Tensor

    @abstractmethod
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width."""

    @abstractmethod
    def read(self, rows: Tensor) -> Tensor:
        """(len(rows), channels, height, width) uint8."""

    @abstractmethod
    def on_the_way(self, rows: Tensor, labels: Tensor) -> Examples:
        """These rows, with these labels, read whenever they are taken."""


class Decoded(Pool):
    """Images in memory."""

    def __init__(self, images: Any, labels: Any) -> None:
        self.images = torch.as_tensor(images)
        self.labels = torch.as_tensor(labels, dtype=torch.int64)

    def shape(self) -> tuple[int, int, int]:
        return tuple(self.images.shape[1:])  # type: ignore[return-value]

    def read(self, rows: Tensor) -> Tensor:
        return self.images[rows].contiguous()

    def on_the_way(self, rows: Tensor, labels: Tensor) -> Examples:
        return InMemory(self.read(rows), labels)


class Files(Pool):
    """Pictures in files.

    Args:
        samples: paths and labels.
        size: width and height of all pictures, and whether they may be resized to that.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], size: tuple[int, int, bool]) -> None:
        self.paths = [path for path, _ in samples]
        self.labels = torch.tensor([label for _, label in samples])
        self.size = size

    def shape(self) -> tuple[int, int, int]:
        return 3, self.size[1], self.size[0]

    def read(self, rows: Tensor) -> Tensor:
        return _decode_all([self.paths[row] for row in rows.tolist()], *self.size)

    def on_the_way(self, rows: Tensor, labels: Tensor) -> Examples:
        return DecodedOnTheWay(self, rows, labels)


class DecodedOnTheWay(Examples):
    """Pictures that are decoded each time they are taken, by threads; the next batch ahead of its time, and
    the last few are kept, as a hyper step takes them again."""

    def __init__(
        self, files: Files, rows: Tensor, labels: Tensor, device: torch.device | str = "cpu"
    ) -> None:
        self._files, self._rows, self._labels, self._device = files, rows, labels, device
        self._ahead = ThreadPoolExecutor(1)
        self._recent: OrderedDict[tuple[int, ...], Future[Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def take(self, rows: Tensor) -> Batch:
        rows = rows.cpu()
        return Batch(self._begun(rows).result().to(self._device), self._labels[rows].to(self._device))

    def prepare(self, rows: Tensor) -> None:
        self._begun(rows.cpu())

    def to(self, device: torch.device) -> DecodedOnTheWay:
        return DecodedOnTheWay(self._files, self._rows, self._labels, device)

    def _begun(self, rows: Tensor) -> Future[Tensor]:
        key = tuple(rows.tolist())
        if key not in self._recent:
            self._recent[key] = self._ahead.submit(self._files.read, self._rows[rows])
            size = prod(self._files.shape())
            while len(self._recent) > 1 and size * sum(map(len, self._recent)) > MOST_KEPT:
                self._recent.popitem(last=False)
        return self._recent[key]


@dataclass(frozen=True)
class Source:
    """A dataset; its own test set, if it has one."""

    pool: Pool
    test: Pool | None
    classes: tuple[str, ...]


def read_source(place: Place) -> Source:
    """Finds, checks or downloads the dataset of the configuration. Raises ConfigError."""
    return _SOURCES[place.data](place)


def _digits(place: Place) -> Source:
    digits = load_digits()
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]
    return Source(Decoded(images, digits.target), None, tuple(str(name) for name in digits.target_names))


# ---- torchvision -------------------------------------------------------------------------------------------


def _torchvision(place: Place) -> Source:
    from torchvision import datasets

    root, dataset = Path(place.root).expanduser(), getattr(datasets, _TORCHVISION[place.data])
    missing = [file for file in _files_of(dataset) if not (root / file).is_file()]
    if missing and not place.download:
        raise ConfigError(
            f"task.root: {place.data} is not in {root}, where {', '.join(missing)} should be. Put the files "
            "there, or set task.download: true."
        )
    try:
        with warnings.catch_warnings():  # NumPy's, on how old the format of CIFAR's pickles is
            warnings.simplefilter("ignore")
            train, test = (dataset(root, train=part, download=place.download) for part in (True, False))
        classes = tuple(name.split(" - ")[0] for name in train.classes)  # MNIST's are "0 - zero"
        return Source(_pool_of(train, classes), _pool_of(test, classes), classes)
    except Exception as error:  # damaged files fail in many ways
        raise ConfigError(_what_failed(place, root, _files_of(dataset), error)) from error


def _what_failed(place: Place, root: Path, files: Sequence[str], error: Exception) -> str:
    reason = one_line(f"{type(error).__name__}: {error}")
    missing = [file for file in files if not (root / file).is_file()]
    if place.download and (missing or isinstance(error, OSError)):
        return (
            f"task.download: {place.data} could not be fetched into {root} ({reason}). Is there a network? "
            f"Without one, put there {', '.join(missing or files)}."
        )
    remedy = f"Delete {', '.join(files)} there and set task.download: true."
    return f"task.root: {place.data} in {root} is damaged ({reason}). {remedy}"


def _files_of(dataset: type[MNIST | CIFAR10]) -> list[str]:
    """What torchvision reads, relative to the root."""
    from torchvision.datasets import CIFAR10

    if issubclass(dataset, CIFAR10):
        names = [name for name, _ in dataset.train_list + dataset.test_list] + [dataset.meta["filename"]]
        return [f"{dataset.base_folder}/{name}" for name in names]
    return [f"{dataset.__name__}/raw/{name.removesuffix('.gz')}" for name, _ in dataset.resources]


def _pool_of(dataset: MNIST | CIFAR10, classes: Sequence[str]) -> Decoded:
    images = torch.as_tensor(dataset.data)
    pool = Decoded(images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2), dataset.targets)
    if (
        len(images) != len(pool.labels)
        or not len(images)
        or not 0 <= pool.labels.min() <= pool.labels.max() < len(classes)
    ):
        raise ValueError(
            f"{len(images)} images and {len(pool.labels)} labels of {len(classes)} classes do not fit"
        )
    return pool


# ---- folders of pictures -----------------------------------------------------------------------------------


def _image_folder(place: Place) -> Source:
    root = Path(place.root).expanduser()
    if not root.is_dir():
        raise ConfigError(
            f"task.root: {root} is no folder. image_folder needs "
            "one, with a folder of pictures for each class."
        )
    train, test = root / "train", root / "test"
    split = [part for part in (train, test) if part.is_dir() and _class_folders(part)]
    if len(split) == 1:
        raise ConfigError(
            f"task.root: {root} has folders of classes in {split[0].name}, and needs them in train and in "
            f"test. Or set task.root: {split[0]}, and a test set is split off."
        )
    if not split:
        samples, classes = _samples(root)
        return Source(Files(samples, _first_size(place, samples)), None, classes)
    (samples, classes), (test_samples, test_classes) = _samples(train), _samples(test)
    if classes != test_classes:
        differ = ", ".join(sorted(set(classes) ^ set(test_classes)))
        raise ConfigError(
            f"task.root: the classes in {train} and {test} differ: only one of them has {differ}."
        )
    size = _first_size(place, samples)
    return Source(Files(samples, size), Files(test_samples, size), classes)


def _class_folders(folder: Path) -> list[str]:
    return sorted(
        entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith(".")
    )


def _samples(folder: Path) -> tuple[list[tuple[str, int]], tuple[str, ...]]:
    """Paths of pictures with their labels, and the classes."""
    classes = _class_folders(folder)
    if len(classes) < 2:
        raise ConfigError(
            f"task.root: {folder} holds {len(classes)} folders, and classes are at least two. Expected "
            "ROOT/train/CLASS/* and ROOT/test/CLASS/*, or ROOT/CLASS/*."
        )
    from torchvision.datasets.folder import IMG_EXTENSIONS, make_dataset

    samples = make_dataset(
        folder, {name: label for label, name in enumerate(classes)}, IMG_EXTENSIONS, allow_empty=True
    )
    empty = sorted(set(range(len(classes))) - {label for _, label in samples})
    if empty:
        names = ", ".join(classes[label] for label in empty)
        raise ConfigError(
            f"task.root: no pictures in {folder} for {names}. Looked for {', '.join(IMG_EXTENSIONS)}."
        )
    _check_files([Path(path) for path, _ in samples], folder)
    return samples, tuple(classes)


def _check_files(paths: Sequence[Path], root: Path) -> None:
    """Refuses what is no plain file of its class: a pipe or a device, and links to what lies elsewhere."""
    homes = {name: (root / name).resolve() for name in _class_folders(root)}
    real_folder = cache(Path.resolve)
    for path in paths:
        home = homes[path.relative_to(root).parts[0]]
        if not path.is_file():
            raise ConfigError(f"task.root: {path} is no file (a pipe, a device or a broken link). Remove it.")
        real = path.resolve() if path.is_symlink() else real_folder(path.parent)
        if not real.is_relative_to(home):
            raise ConfigError(
                f"task.root: {path} leads out of its class, to {real}. Put the picture itself there."
            )


def read_pictures(paths: Sequence[str], width: int, height: int) -> Tensor:
    """Pictures of any size as (n, 3, height, width) uint8. Raises ConfigError."""
    return _decode_all(paths, width, height, resize=True)


def _first_size(place: Place, samples: Sequence[tuple[str, int]]) -> tuple[int, int, bool]:
    """Width and height of all pictures, and whether they may be resized to that."""
    if place.image_size is not None:
        return place.image_size, place.image_size, True
    return *_open(samples[0][0]).size, False


def _decode_all(paths: Sequence[str], width: int, height: int, resize: bool) -> Tensor:
    images = torch.empty(len(paths), 3, height, width, dtype=torch.uint8)
    decode = partial(_decode, width=width, height=height, resize=resize)
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        decoded = tqdm(
            pool.map(decode, paths), "reading pictures", len(paths), disable=len(paths) < MANY, leave=False
        )
        for image, pixels in zip(images, decoded):
            image.copy_(torch.from_numpy(pixels).permute(2, 0, 1))
    return images


def _decode(path: str, width: int, height: int, resize: bool) -> np.ndarray:
    picture = _open(path)
    if picture.size != (width, height):
        if not resize:
            sizes = f"{picture.width}x{picture.height} pixels, and the first picture {width}x{height}"
            raise ConfigError(f"task.root: {path} has {sizes}. Set task.image_size.")
        picture = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.array(picture)


def _open(path: str) -> Image.Image:
    """The picture in RGB, the right way up."""
    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):
                raise ValueError("its pixels have more than 8 bits")
            upright = ImageOps.exif_transpose(picture)
            if "transparency" in upright.info:  # of a palette, which Pillow drops only with a warning
                upright = upright.convert("RGBA")
            return upright.convert("RGB")
    except Exception as error:  # damaged files fail in many ways
        raise ConfigError(
            f"task.root: {path} is no readable picture ({one_line(error)}). Repair or remove it."
        ) from error


_TORCHVISION = {"mnist": "MNIST", "fashion_mnist": "FashionMNIST", "cifar10": "CIFAR10"}
_SOURCES: dict[str, Callable[[Place], Source]] = {
    "digits": _digits,
    "image_folder": _image_folder,
    **dict.fromkeys(_TORCHVISION, _torchvision),
}
