"""Classification of images."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score
from torch import Tensor, nn
from tqdm import tqdm

from ..config import ConfigError
from ..networks import Augmenter, random_crop_flip, random_flip
from .base import Examples, InMemory, Metric, Split, Task, most_likely
from .pictures import MANY, Place, Pool, read_pictures, read_source
from .splits import Sizes, add_label_noise, check_label_noise

AUGMENT: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda images: images,
    "flip": random_flip,
    "crop_flip": random_crop_flip,
}
PART_OF_MEMORY = 0.25  # of what is free: more pictures than fill it are decoded on the way
MOST_MEASURED = 10_000  # pictures of which mean and deviation are taken, where they are not in memory
FEW = 2**20  # bytes of pictures that are measured at a time
NUM_LOWEST, NUM_AUGMENTED, NUM_DRAWS = 40, 8, 4


class ImageClassification(Task):
    """Images of some classes; the loss is the cross-entropy.

    >>> task = ImageClassification("digits", train_size=200, val_size=500, label_noise=0.1)
    >>> split = task.load(seed=0)
    >>> len(split.train), len(split.val), len(split.test), int(split.wrong.sum()), task.input_shape
    (200, 500, 1097, 20, (1, 8, 8))

    Args:
        data: digits come with scikit-learn and need no file; image_folder are pictures of one's own in one
            folder for each class: ROOT/train/CLASS/* and ROOT/test/CLASS/*, or ROOT/CLASS/*, of which a test
            set is split off.
        root: folder of the data; also where download puts it.
        download: fetch a missing dataset of torchvision into root.
        image_size: image_folder alone: pictures are resized to so many pixels a side. null takes the size of
            the first picture, which all must have.
        in_memory: image_folder alone: decode all pictures at the start, or each when it is needed; then
            mean and standard deviation are those of the first 10,000. null decodes them at the start if they
            fit into a quarter of the free memory.
        train_size: number of training images. null takes what is left.
        val_size: number of validation images, split off the training images.
        test_size: number of test images. null takes the whole test set, or where the data has none of its
            own, what is left.
        label_noise: this fraction of the training labels is replaced by wrong ones.
        augment: random changes to training images: horizontal flips, or shifts by up to 4 pixels and flips.
    """

    examples, loss = "images", "cross-entropy"

    def __init__(
        self,
        data: Literal["digits", "mnist", "fashion_mnist", "cifar10", "image_folder"] = "digits",
        root: str = "data",
        download: bool = False,
        image_size: int | None = None,
        in_memory: bool | None = None,
        train_size: int | None = None,
        val_size: int = 500,
        test_size: int | None = None,
        label_noise: float = 0.0,
        augment: Literal["none", "flip", "crop_flip"] = "none",
    ) -> None:
        check_label_noise(label_noise)
        if image_size is not None and image_size < 1:
            raise ConfigError(f"task.image_size: got {image_size}, expected at least 1.")
        for key, value in (("image_size", image_size), ("in_memory", in_memory)):
            if value is not None and data != "image_folder":
                raise ConfigError(
                    f"task.{key}={value} is for image_folder, and {data} is read as it is. Remove it."
                )
        self.data, self.label_noise, self.in_memory = data, label_noise, in_memory
        self.place, self.sizes = (
            Place(data, root, download, image_size),
            Sizes(train_size, val_size, test_size),
        )
        self._augment, self._changed = AUGMENT[augment], augment != "none"
        self.augmenter: Augmenter | None = None
        self.mean, self.std = torch.zeros(1, 1, 1), torch.ones(1, 1, 1)

    def load(self, seed: int) -> Split:
        source = read_source(self.place)
        generator = torch.Generator().manual_seed(seed)
        num_own = len(source.test.labels) if source.test else 0
        rows = self.sizes.rows(len(source.pool.labels), num_own, generator, self.data, self.examples)
        pools = (source.pool, source.pool, source.test or source.pool)
        labels = [pool.labels[chosen] for pool, chosen in zip(pools, rows)]
        labels[0], wrong = add_label_noise(labels[0], self.label_noise, len(source.classes), generator)
        at_once = self._fits(source.pool, sum(map(len, rows)))
        train, val, test = (_examples(*each, at_once) for each in zip(pools, rows, labels))
        self.classes, self.input_shape = source.classes, source.pool.shape()
        self.num_outputs = len(self.classes)
        num = len(train) if isinstance(train, InMemory) else min(len(train), MOST_MEASURED)
        measured = mean_and_std(self._some(train, num))
        self.mean, self.std = (numbers.view(-1, 1, 1) for numbers in measured)
        return Split(train, val, test, wrong if self.label_noise else None)

    def _some(self, examples: Examples, num: int) -> Iterator[Tensor]:
        """The first images, few at a time."""
        parts = torch.arange(num, device=self.mean.device).split(max(1, FEW // prod(self.input_shape)))
        for rows in tqdm(parts, "measuring pictures", disable=num < MANY, leave=False):
            yield examples.take(rows).inputs

    def _fits(self, pool: Pool, num: int) -> bool:
        channels, height, width = pool.shape()
        size = num * channels * height * width
        return (
            size <= PART_OF_MEMORY * psutil.virtual_memory().available
            if self.in_memory is None
            else self.in_memory
        )

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    def metrics(self) -> Mapping[str, Metric]:
        return {"accuracy": Metric(accuracy_score, most_likely, percent=True)}

    def inputs(self, inputs: Tensor) -> Tensor:
        """Pixels from 0 to 1, less their mean over the training images, over the standard deviation there."""
        return self._standardized(pixels(inputs))

    def train_inputs(self, inputs: Tensor) -> Tensor:
        """The same, after random changes and the tuned augmentation."""
        images = self._augment(pixels(inputs))
        return self._standardized(images if self.augmenter is None else self.augmenter(images))

    @property
    def random(self) -> bool:
        return self._changed or self.augmenter is not None

    def loss_tensor(self, name: str) -> nn.Module | None:
        """``augmentation``: a network that changes training images."""
        if name != "augmentation":
            return None
        self.augmenter = Augmenter(self.input_shape[0]).to(self.mean.device)
        return self.augmenter

    def to(self, device: torch.device) -> None:
        self.mean, self.std = self.mean.to(device), self.std.to(device)

    def _standardized(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std

    # ---- what is kept of a run -----------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        numbers = {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        return {**super().state(), "classes": list(self.classes), **numbers}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.classes = tuple(state["classes"])
        self.mean, self.std = (torch.tensor(state[key]).view(-1, 1, 1) for key in ("mean", "std"))

    @torch.no_grad()
    def predict(self, network: nn.Module, files: Sequence[Path]) -> list[Sequence[str]]:
        """The class of each picture and its probability, as the network has it.

        Pictures are turned upright, made grey where the network takes one channel, and resized to the images
        that it was trained on.
        """
        channels, height, width = self.input_shape
        images = read_pictures([str(file) for file in files], width, height).float()
        if channels == 1:  # as Pillow does: ITU-R 601
            images = (images * torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        best = network(self._standardized(images / 255)).softmax(1).max(1)
        found = zip(files, best.indices.tolist(), best.values.tolist())
        return [(str(file), self.classes[place], f"{share:.3f}") for file, place, share in found]

    @torch.no_grad()
    def keepsakes(self, split: Split, weights: Tensor | None) -> dict[str, Any]:
        """The mean image, the images of least weight, and what the augmentation makes of some."""
        num, device = min(len(split.train), MOST_MEASURED), self.mean.device
        total: Any = sum(part.sum(0, dtype=torch.int64) for part in self._some(split.train, num))
        found: dict[str, Any] = {
            "mean_image": (total.double() / num / 255).float().cpu(),
            "classes": list(self.classes),
        }
        if weights is not None:
            lowest = weights.argsort(stable=True)[:NUM_LOWEST].cpu()
            images, labels = split.train.take(lowest.to(device))
            wrong = torch.zeros(len(weights), dtype=torch.bool) if split.wrong is None else split.wrong.cpu()
            found["lowest"] = {
                "images": images.cpu(),
                "labels": labels.cpu(),
                "weights": weights[lowest.to(weights.device)].cpu(),
                "wrong": wrong[lowest],
            }
        if self.augmenter is not None:
            some = torch.arange(min(len(split.train), NUM_AUGMENTED), device=device)
            before = pixels(split.train.take(some).inputs)
            after = torch.stack([self.augmenter(before) for _ in range(NUM_DRAWS)])
            found["augmented"] = {"before": before.cpu(), "after": after.clamp(0, 1).cpu()}
        return found


def _examples(pool: Pool, rows: Tensor, labels: Tensor, at_once: bool) -> Examples:
    return InMemory(pool.read(rows), labels) if at_once else pool.on_the_way(rows, labels)


def pixels(images: Tensor) -> Tensor:
    """Bytes as numbers from 0 to 1; other numbers as they are."""
    return images.to(torch.get_default_dtype()) / 255 if images.dtype == torch.uint8 else images


def mean_and_std(parts: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Of each channel, with pixels from 0 to 1; a standard deviation of 1 for a channel that is constant.

    By counting the 256 values of a pixel, some images at a time: exact, with none of them in float.
    """
    counts: Any = sum(torch.stack([_count(channel) for channel in part.unbind(1)]) for part in parts)
    shares, values = counts / counts.sum(1, keepdim=True).double(), torch.arange(256).double() / 255
    mean = shares @ values
    std = (shares * (values - mean[:, None]).square()).sum(1).sqrt()
    return mean.float(), torch.where(std > 0, std, 1.0).float()


def _count(channel: Tensor) -> Tensor:
    return torch.bincount(channel.flatten(), minlength=256)
