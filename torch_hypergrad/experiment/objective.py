"""The training and validation losses of a run, on batches of row numbers.

Recorded batches are row numbers of images that stay where they are, so that no trajectory holds pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .data import Data, Images, pixels
from .models import random_crop_flip, random_flip

EVALUATION_BATCH = 1000
MOST_STANDARDIZED = 2**28  # numbers of training images that are standardized once: 1 GiB in float32
AUGMENT: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda images: images,
    "flip": random_flip,
    "crop_flip": random_crop_flip,
}


class Objective:
    """Cross-entropy of images chosen by row numbers.

    Args:
        data: the images.
        augment: random changes to training images: ``"none"``, ``"flip"`` or ``"crop_flip"``.
        bf16: whether the network runs under bf16 autocast.
        example_logits: one logit for each training image, whose sigmoid weighs its loss; or None.
        augmenter: a network that changes training images; or None.
    """

    def __init__(
        self,
        data: Data,
        augment: str,
        bf16: bool,
        example_logits: Tensor | None = None,
        augmenter: nn.Module | None = None,
    ) -> None:
        self.data, self.bf16 = data, bf16
        self.example_logits, self.augmenter = example_logits, augmenter
        self._augment = AUGMENT[augment]
        unchanged = augment == "none" and augmenter is None
        small = data.train.images.numel() <= MOST_STANDARDIZED
        self._standardized = data.standardized if unchanged and small else None

    def train_loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Mean loss of the training images ``rows``, weighted where examples have weights."""
        with self._precision():
            logits = model(self._train_images(rows))
            losses = F.cross_entropy(logits, self.data.train.labels[rows], reduction="none")
        if self.example_logits is not None:
            losses = losses * self.example_logits[rows].sigmoid()
        return losses.mean()

    def val_loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Mean loss of the validation images ``rows``, with dropout and batch statistics off."""
        val = self.data.val
        with evaluating(model), self._precision():
            return F.cross_entropy(model(self.data.standardize(pixels(val.images[rows]))), val.labels[rows])

    @torch.no_grad()
    def evaluate(self, model: nn.Module, images: Images) -> dict[str, float]:
        """Loss and accuracy (0 to 1) on a whole set, without noise, weights or augmentation."""
        loss = correct = torch.zeros((), dtype=torch.float64, device=images.labels.device)
        with evaluating(model), self._precision():
            for start in range(0, len(images), EVALUATION_BATCH):
                part = images[slice(start, start + EVALUATION_BATCH)]
                logits = model(self.data.standardize(pixels(part.images)))
                loss = loss + F.cross_entropy(logits, part.labels, reduction="sum")
                correct = correct + (logits.argmax(1) == part.labels).sum()
        return {"loss": loss.item() / len(images), "accuracy": correct.item() / len(images)}

    def _train_images(self, rows: Tensor) -> Tensor:
        if self._standardized is not None:
            return self._standardized[rows]
        images = self._augment(pixels(self.data.train.images[rows]))
        return self.data.standardize(images if self.augmenter is None else self.augmenter(images))

    def _precision(self) -> AbstractContextManager[None]:
        return torch.autocast(self.data.train.images.device.type, dtype=torch.bfloat16, enabled=self.bf16)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards each module is in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
