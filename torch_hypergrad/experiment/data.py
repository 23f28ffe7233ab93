"""Images from scikit-learn, torchvision or a folder, split into three sets that never overlap."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .config import ConfigError, DataConfig
from .datasets import Pool, Source, read_source


@dataclass(frozen=True)
class Images:
    """Labelled images in memory.

    Args:
        images: (n, channels, height, width) uint8
        labels: (n,) int64
    """

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, rows: Tensor | slice) -> Images:
        return Images(self.images[rows], self.labels[rows])

    def to(self, device: torch.device | str) -> Images:
        return Images(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Data:
    """What one run trains, tunes and tests on.

    Args:
        train: the training images, with labels that may be wrong
        val: the validation images, with clean labels
        test: the test images, with clean labels
        wrong: (len(train),) bool, which training labels were replaced by wrong ones
        classes: names, in the order of the labels
        mean: (channels,) float, of the training images with pixels from 0 to 1
        std: likewise; 1 for a channel that is constant
    """

    train: Images
    val: Images
    test: Images
    wrong: Tensor
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor

    def standardize(self, images: Tensor) -> Tensor:
        """Pixels from 0 to 1, less their mean over the training images, over the standard deviation there."""
        return (images - self.mean.view(-1, 1, 1)) / self.std.view(-1, 1, 1)

    @cached_property
    def standardized(self) -> Tensor:
        """All training images, standardized once."""
        return self.standardize(pixels(self.train.images))

    def to(self, device: torch.device | str) -> Data:
        train, val, test = (part.to(device) for part in (self.train, self.val, self.test))
        return Data(
            train, val, test, self.wrong.to(device), self.classes, self.mean.to(device), self.std.to(device)
        )


def pixels(images: Tensor) -> Tensor:
    """Bytes as numbers from 0 to 1."""
    return images.to(torch.get_default_dtype()) / 255


def load_data(config: DataConfig, seed: int) -> Data:
    """Reads, splits and relabels. A seed always gives the same data; the split is the same with label noise.

    >>> data = load_data(DataConfig(name="digits", train_size=200, val_size=500, label_noise=0.1), seed=0)
    >>> len(data.train), len(data.val), len(data.test), int(data.wrong.sum())
    (200, 500, 1097, 20)
    >>> tuple(data.train.images.shape)
    (200, 1, 8, 8)

    Raises:
        ConfigError: data that is missing or damaged, or sizes that do not fit. One line.
    """
    _check(config)
    source = read_source(config)
    generator = torch.Generator().manual_seed(seed)
    train_rows, val_rows, test_rows = _split(config, source, generator)
    val, test = _take(source.pool, val_rows), _take(source.test or source.pool, test_rows)
    train, wrong = val, torch.zeros(len(val), dtype=torch.bool)
    if config.train_on != "val":
        clean = _take(source.pool, train_rows)
        train, wrong = _add_label_noise(clean, config.label_noise, len(source.classes), generator)
    if config.train_on == "train_and_val":
        train, wrong = _join(train, val), torch.cat([wrong, torch.zeros(len(val), dtype=torch.bool)])
    return Data(train, val, test, wrong, source.classes, *_mean_and_std(train.images))


def _check(config: DataConfig) -> None:
    if not 0 <= config.label_noise < 1:
        raise ConfigError(
            f"data.label_noise: got {config.label_noise}, expected a fraction of at least 0 and below 1."
        )
    for key in ("train_size", "val_size", "test_size", "image_size"):
        size = getattr(config, key)
        if size is not None and size < 1:
            raise ConfigError(f"data.{key}: got {size}, expected at least 1.")
    if config.image_size is not None and config.name != "image_folder":
        raise ConfigError(
            f"data.image_size: {config.name} has a size of its own. Remove image_size, or take image_folder."
        )


def _take(pool: Pool, rows: Tensor) -> Images:
    return Images(pool.read(rows), pool.labels[rows])


def _join(first: Images, second: Images) -> Images:
    return Images(torch.cat([first.images, second.images]), torch.cat([first.labels, second.labels]))


# ---- splitting ---------------------------------------------------------------------------------------------


def _split(config: DataConfig, source: Source, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of the pool for training and validation; rows for testing, of the dataset's own test set if any.

    Validation rows come from one end of a random order and test rows from the other: neither depends on
    train_size.
    """
    num, num_own = len(source.pool.labels), len(source.test.labels) if source.test else 0
    order, own_order = torch.randperm(num, generator=generator), torch.randperm(num_own, generator=generator)
    train_size, test_size = _sizes(config, num, num_own)
    train, val = order[config.val_size : config.val_size + train_size], order[: config.val_size]
    if not num_own:
        return train, val, order[num - test_size :]
    return train, val, own_order[:test_size].sort().values


def _sizes(config: DataConfig, num: int, num_own: int) -> tuple[int, int]:
    """The numbers of training and test images, of ``num`` and of ``num_own`` in a test set of its own."""
    left, train_size, test_size = num - config.val_size, config.train_size, config.test_size
    if num_own:
        train_size, test_size = left if train_size is None else train_size, test_size or num_own
        fits = 1 <= train_size <= left
    else:
        if train_size is None:
            test_size = test_size or max(num // 5, 1)
            train_size = left - test_size
        test_size = left - train_size if test_size is None else test_size
        fits = min(train_size, test_size) >= 1 and train_size + test_size <= left
    if not fits:
        raise ConfigError(_does_not_fit(config, num, bool(num_own)))
    if num_own and test_size > num_own:
        raise ConfigError(f"data.test_size: got {test_size}, and {config.name} has {num_own} test images.")
    return train_size, test_size


def _does_not_fit(config: DataConfig, num: int, has_test: bool) -> str:
    names = ("train_size", "val_size") if has_test else ("train_size", "val_size", "test_size")
    sizes = {name: getattr(config, name) for name in names}
    asked = ", ".join(f"{name} {'null' if size is None else size}" for name, size in sizes.items())
    sets = "training and validation" if has_test else "training, validation and test"
    return (
        f"data: {asked} do not fit: {config.name} has {num} "
        f"images for {sets}, at least one each. Lower a size."
    )


def _add_label_noise(
    images: Images, fraction: float, num_classes: int, generator: torch.Generator
) -> tuple[Images, Tensor]:
    """Gives ``round(fraction * n)`` images another class, each as likely. Returns which, too."""
    rows = torch.randperm(len(images), generator=generator)[: round(fraction * len(images))]
    labels, wrong = images.labels.clone(), torch.zeros(len(images), dtype=torch.bool)
    shift = torch.randint(1, num_classes, rows.shape, generator=generator)
    labels[rows] = (labels[rows] + shift) % num_classes
    wrong[rows] = True
    return Images(images.images, labels), wrong


def _count(pixels: Tensor) -> Tensor:
    return torch.bincount(pixels.flatten(), minlength=256)


def _mean_and_std(images: Tensor) -> tuple[Tensor, Tensor]:
    """By counting the 256 values of a pixel, some images at a time: exact, with few of them in float."""
    parts = images.split(1024)
    counts = (
        torch.stack([torch.stack([_count(channel) for channel in part.unbind(1)]) for part in parts])
        .sum(0)
        .double()
    )
    shares, values = counts / counts.sum(1, keepdim=True), torch.arange(256).double() / 255
    mean = shares @ values
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    return mean.float(), torch.where(std > 0, std, 1.0).float()
