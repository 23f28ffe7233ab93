"""The training and validation losses of a run, on batches of row numbers.

Recorded batches are row numbers of examples that stay where they are, so that no trajectory holds data.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from .stopping import TrainingError
from .tasks.base import Batch, Examples, InMemory, Split, Task
from .tasks.checked import blamed, check_losses

EVALUATION_BATCH = 500
MOST_PREPARED = 2**28  # numbers of training inputs that are prepared once: 1 GiB in float32


class Objective:
    """Losses of a task's examples chosen by row numbers.

    Args:
        task: what is learned.
        split: its examples, on the device.
        device: of the network.
        bf16: whether the network runs under bf16 autocast.
        example_logits: one logit for each training example, whose sigmoid weighs its loss; or None.
    """

    def __init__(
        self,
        task: Task,
        split: Split,
        device: torch.device,
        bf16: bool,
        example_logits: Tensor | None = None,
    ) -> None:
        self.task, self.split, self.device, self.bf16 = task, split, device, bf16
        self.example_logits = example_logits
        train = split.train
        self._train: Examples | None = None
        if isinstance(train, InMemory) and not task.random and train.inputs.numel() <= MOST_PREPARED:
            self._train = InMemory(task.inputs(train.inputs), train.targets)

    @torch.no_grad()
    def check(self, model: nn.Module) -> None:
        """Tries the network and the losses on two examples.

        Raises:
            ConfigError: if they do not go together.
        """
        stored, targets = self.split.val.take(torch.arange(min(len(self.split.val), 2), device=self.device))
        name = type(self.task).__name__
        with evaluating(model), self._precision():
            with blamed(f"model: the network, on inputs of {name},"):
                outputs = model(self.task.inputs(stored))
            with blamed(f"task: {name}.losses"):
                losses = self.task.losses(outputs, targets)
        check_losses(self.task, losses, len(targets))

    def train_loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Mean loss of the training examples ``rows``, weighted where examples have weights."""
        inputs, targets = self._train_batch(rows)
        with self._precision():
            losses = self.task.losses(model(inputs), targets)
        if self.example_logits is not None:
            losses = losses * self.example_logits[rows].sigmoid()
        return losses.mean()

    def val_loss(self, model: nn.Module, rows: Tensor) -> Tensor:
        """Mean loss of the validation examples ``rows``, with dropout and batch statistics off."""
        stored, targets = self.split.val.take(rows)
        with evaluating(model), self._precision():
            return self.task.losses(model(self.task.inputs(stored)), targets).mean()

    @torch.no_grad()
    def evaluate(self, model: nn.Module, examples: Examples, most: int | None = None) -> dict[str, float]:
        """Loss and metrics on a set, or on ``most`` of it, without noise, weights or augmentation; these are
        spread evenly over it, and always the same."""
        num = min(most or len(examples), len(examples))
        chosen = torch.arange(num, device=self.device) * len(examples) // num
        metrics = self.task.metrics()
        loss = torch.zeros((), dtype=torch.float64, device=self.device)
        true: list[Tensor] = []
        told: dict[str, list[Tensor]] = {name: [] for name in metrics}
        with evaluating(model), self._precision():
            for rows in chosen.split(EVALUATION_BATCH):
                stored, targets = examples.take(rows)
                outputs = model(self.task.inputs(stored))
                loss = loss + self.task.losses(outputs, targets).sum()
                true.append(targets)
                for name, metric in metrics.items():
                    with self._blamed(name):
                        told[name].append(metric.told(outputs.float(), targets))
        found = {}
        for name, metric in metrics.items():
            with self._blamed(name):
                found[name] = float(metric.function(_array(true), _array(told[name])))
        return {"loss": loss.item() / num, **found}

    def in_float32(self) -> Objective:
        """The same without autocast."""
        other = copy.copy(self)
        other.bf16 = False
        return other

    def prepare(self, rows: Tensor) -> None:
        """A hint that the next training step takes these rows."""
        self.split.train.prepare(rows)

    def _train_batch(self, rows: Tensor) -> Batch:
        if self._train is not None:
            return self._train.take(rows)
        stored, targets = self.split.train.take(rows)
        with self._precision():
            return Batch(self.task.train_inputs(stored), targets)

    def _blamed(self, metric: str) -> AbstractContextManager[None]:
        return blamed(f"Training stopped: the metric {metric} of {type(self.task).__name__}", TrainingError)

    def _precision(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.bf16)


def _array(parts: list[Tensor]) -> np.ndarray:
    return torch.cat(parts).cpu().numpy()


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
