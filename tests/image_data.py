"""The images of a task, as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from torch_hypergrad.experiment.tasks import Examples, ImageClassification


@dataclass(frozen=True)
class Images:
    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


class Data(NamedTuple):
    train: Images
    val: Images
    test: Images
    wrong: Tensor
    classes: tuple[str, ...]
    mean: Tensor
    std: Tensor


def images_of(examples: Examples) -> Images:
    return Images(*examples.take(torch.arange(len(examples))))


def load_images(seed: int = 0, part: str = "train", **options: Any) -> Data:
    """What a configuration with these keys under task, and this train.part, trains and tests on."""
    options.pop("name", None)
    task = ImageClassification(**options)
    split = task.load(seed).part(part)
    wrong = torch.zeros(len(split.train), dtype=torch.bool) if split.wrong is None else split.wrong
    parts = (images_of(examples) for examples in (split.train, split.val, split.test))
    return Data(*parts, wrong, task.classes, task.mean.flatten(), task.std.flatten())
