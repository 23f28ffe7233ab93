"""How many examples go where."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import ConfigError


@dataclass(frozen=True)
class Sizes:
    """What a user asked for; None takes what is left, and of a test set of the data's own, all."""

    train_size: int | None
    val_size: int
    test_size: int | None

    def __post_init__(self) -> None:
        for key, size in vars(self).items():
            if size is not None and size < 1:
                raise ConfigError(f"task.{key}: got {size}, expected at least 1.")

    def counts(self, num: int, num_own: int, name: str, examples: str) -> tuple[int, int]:
        """The numbers of training and test examples, of ``num`` and of ``num_own`` in a test set of its own.

        Raises:
            ConfigError: if they do not fit.
        """
        left, train, test = num - self.val_size, self.train_size, self.test_size
        if num_own:
            train, test = left if train is None else train, test or num_own
            fits = 1 <= train <= left
        else:
            if train is None:
                test = test or max(num // 5, 1)
                train = left - test
            test = left - train if test is None else test
            fits = min(train, test) >= 1 and train + test <= left
        if not fits:
            raise ConfigError(self._do_not_fit(num, bool(num_own), name, examples))
        if num_own and test > num_own:
            raise ConfigError(f"task.test_size: got {test}, and {name} has {num_own} test {examples}.")
        return train, test

    def rows(
        self, num: int, num_own: int, generator: torch.Generator, name: str, examples: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rows for training and validation at random; rows for testing, of the data's own test set if any.

        Validation rows come from one end of a random order and test rows from the other: neither depends on
        the number of training rows.
        """
        order = torch.randperm(num, generator=generator)
        own_order = torch.randperm(num_own, generator=generator)
        train_size, test_size = self.counts(num, num_own, name, examples)
        train, val = order[self.val_size : self.val_size + train_size], order[: self.val_size]
        if not num_own:
            return train, val, order[num - test_size :]
        return train, val, own_order[:test_size].sort().values

    def _do_not_fit(self, num: int, has_test: bool, name: str, examples: str) -> str:
        names = ("train_size", "val_size") if has_test else ("train_size", "val_size", "test_size")
        sizes = {each: getattr(self, each) for each in names}
        asked = ", ".join(f"{each} {'null' if size is None else size}" for each, size in sizes.items())
        sets = "training and validation" if has_test else "training, validation and test"
        has = f"{name} has {num} {examples} for {sets}, at least one each"
        return f"task: {asked} do not fit: {has}. Lower a size."


def check_label_noise(fraction: float) -> None:
    """Raises ConfigError if it is no fraction of labels."""
    if not 0 <= fraction < 1:
        raise ConfigError(f"task.label_noise: got {fraction}, expected a fraction of at least 0 and below 1.")


def add_label_noise(
    labels: Tensor, fraction: float, num_classes: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Gives ``round(fraction * n)`` labels another class, each as likely. Returns which, too."""
    rows = torch.randperm(len(labels), generator=generator)[: round(fraction * len(labels))]
    labels, wrong = labels.clone(), torch.zeros(len(labels), dtype=torch.bool)
    shift = torch.randint(1, num_classes, rows.shape, generator=generator)
    labels[rows] = (labels[rows] + shift) % num_classes
    wrong[rows] = True
    return labels, wrong
