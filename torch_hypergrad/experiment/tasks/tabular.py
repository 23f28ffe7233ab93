"""Tables: regression and classification."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score, r2_score, root_mean_squared_error
from torch import Tensor, nn

from ..config import ConfigError
from ..messages import one_line
from .base import InMemory, Metric, Split, Task, most_likely
from .splits import Sizes, add_label_noise, check_label_noise
from .tables import MOST_LEVELS, Columns, as_number, listed, read_table

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

MOST_CLASSES = 10 * MOST_LEVELS
MOST_BARS = 40


class Table(Task):
    """Rows of a table, of which one column is to be told by the others.

    Args:
        data: a file of CSV or Parquet, or one of scikit-learn's tables: diabetes (regression); iris, wine and
            breast_cancer (classification).
        target: the column to be told. null takes target, as scikit-learn's tables call it.
        drop: columns to leave out, such as identifiers.
        train_size: number of training rows. null takes what is left.
        val_size: number of validation rows.
        test_size: number of test rows. null takes a fifth of all rows.
    """

    examples = "rows"

    def __init__(
        self,
        data: str,
        target: str | None = None,
        drop: Sequence[str] = (),
        train_size: int | None = None,
        val_size: int = 100,
        test_size: int | None = None,
    ) -> None:
        self.data, self.target, self.drop = data, target or "target", tuple(drop)
        self.sizes = Sizes(train_size, val_size, test_size)
        self.columns = Columns({}, {})

    def load(self, seed: int) -> Split:
        source = f"task.data: {self.data}"
        table = read_table(self.data, source)
        for key, name in (("target", self.target), *(("drop", name) for name in self.drop)):
            if name not in table:
                raise ConfigError(f"task.{key}: {self.data} has no column {name}. It has {listed(table)}.")
        target, table = table[self.target], table.drop(columns=[self.target, *self.drop])
        if target.isna().any():
            raise ConfigError(
                f"task.target: {int(target.isna().sum())} of {len(target)} values of {self.target} are "
                "missing. Remove these rows."
            )
        generator = torch.Generator().manual_seed(seed)
        rows = self.sizes.rows(len(table), 0, generator, self.data, self.examples)
        self.columns = Columns.of(table.iloc[rows[0].numpy()])
        if not self.columns.names:
            raise ConfigError(f"task.data: {self.data} has no column beside {self.target} to learn from.")
        inputs, targets = self.columns.encode(table, source), self._targets(target, rows[0])
        self.input_shape = (inputs.shape[1],)
        train, val, test = (InMemory(inputs[part], targets[part]) for part in rows)
        noisy, wrong = self._noisy(train.targets, generator)
        return Split(InMemory(train.inputs, noisy), val, test, wrong)

    @abstractmethod
    def _targets(self, target: pandas.Series, train_rows: Tensor) -> Tensor:
        """The column as the loss takes it; sets ``num_outputs``."""

    def _noisy(self, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        return targets, None

    def state(self) -> dict[str, Any]:
        return {**super().state(), "columns": asdict(self.columns)}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        numbers = {name: (mean, std) for name, (mean, std) in state["columns"]["numbers"].items()}
        self.columns = Columns(numbers, state["columns"]["words"])

    @torch.no_grad()
    def predict(self, network: nn.Module, files: Sequence[Path]) -> list[Sequence[str]]:
        """For each row of the files: file and number of the row, from 1, and what the network says."""
        found: list[Sequence[str]] = []
        for file in files:
            table = read_table(str(file), str(file), self.columns.words)
            cells = self._in_words(network(self.columns.encode(table, str(file))))
            found += [(f"{file}:{row}", *said) for row, said in enumerate(cells, start=1)]
        return found

    @abstractmethod
    def _in_words(self, outputs: Tensor) -> list[Sequence[str]]:
        """What outputs say, row by row."""

    def figures(self, network: nn.Module, split: Split, values: Mapping[str, Tensor]) -> Mapping[str, Figure]:
        """Tuned values by column, of each setting that has one for each weight of the first layer."""
        matrices = [name for name, param in network.named_parameters() if param.ndim == 2]
        found = {}
        for name, value in values.items():
            setting, _, tensor = name.partition("/")
            if matrices[:1] == [tensor] and value.shape[1:] == self.input_shape:
                caption = f"Learned {setting.replace('_', ' ')} of {tensor} by column, the largest first"
                found[f"{caption}{_mean_over(value)}."] = _bars(setting, self.columns.names, value.cpu())
        return found


class TabularRegression(Table):
    """Tells a number; the loss is the squared error in units of the target's variance over the training rows.
    Arguments as of :class:`Table`."""

    loss = "squared error, standardized"

    def _targets(self, target: pandas.Series, train_rows: Tensor) -> Tensor:
        try:
            numbers = torch.from_numpy(target.astype(float).to_numpy(copy=True))
        except (ValueError, TypeError) as error:
            raise ConfigError(
                f"task.target: {self.target} does not hold numbers ({one_line(error)}). Take "
                "TabularClassification, or another column."
            ) from error
        if not numbers.isfinite().all():
            raise ConfigError(f"task.target: {self.target} has infinite numbers. Mend them.")
        self.num_outputs = 1
        train = numbers[train_rows]
        self.mean, self.std = train.mean().item(), train.std(unbiased=False).item() or 1.0
        return ((numbers - self.mean) / self.std).float()

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs.flatten() - targets).square()

    def metrics(self) -> Mapping[str, Metric]:
        return {
            "R2": Metric(_r2, _flat),
            "RMSE": Metric(self._rmse, _flat, higher_is_better=False),
        }

    def _rmse(self, true: np.ndarray, told: np.ndarray) -> float:
        return self.std * float(root_mean_squared_error(true, told))

    def state(self) -> dict[str, Any]:
        return {**super().state(), "mean": self.mean, "std": self.std}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.mean, self.std = state["mean"], state["std"]

    def _in_words(self, outputs: Tensor) -> list[Sequence[str]]:
        return [(f"{self.mean + self.std * output:.6g}",) for output in outputs.flatten().tolist()]

    @torch.no_grad()
    def figures(self, network: nn.Module, split: Split, values: Mapping[str, Tensor]) -> Mapping[str, Figure]:
        """And what is told beside what is true, on the test rows."""
        inputs, targets = split.test.take(
            torch.arange(len(split.test), device=next(network.parameters()).device)
        )
        told, true = (self.mean + self.std * each.flatten().cpu() for each in (network(inputs), targets))
        caption = f"What the network tells of {self.target} on the test rows, beside what is true."
        return {caption: _scatter(self.target, told, true), **super().figures(network, split, values)}


def _flat(outputs: Tensor, targets: Tensor) -> Tensor:
    return outputs.flatten()


def _r2(true: np.ndarray, told: np.ndarray) -> float:
    """Of one row there is none, as it has no variance."""
    return float(r2_score(true, told)) if len(true) > 1 else math.nan


class TabularClassification(Table):
    """Tells a class; the loss is the cross-entropy. Arguments as of :class:`Table`, and

    Args:
        label_noise: this fraction of the training labels is replaced by wrong ones.
    """

    loss = "cross-entropy"

    def __init__(self, data: str, *, label_noise: float = 0.0, **table: Any) -> None:
        super().__init__(data, **table)
        check_label_noise(label_noise)
        self.label_noise = label_noise

    def _targets(self, target: pandas.Series, train_rows: Tensor) -> Tensor:
        words = target.astype(str)
        self.classes = tuple(sorted(words.unique(), key=as_number))
        if not 2 <= len(self.classes) <= MOST_CLASSES:
            raise ConfigError(
                f"task.target: {self.target} has {len(self.classes)} different values, and classes are at "
                f"least 2 and at most {MOST_CLASSES}. Take another column, or TabularRegression for "
                "numbers."
            )
        self.num_outputs = len(self.classes)
        place = {name: label for label, name in enumerate(self.classes)}
        return torch.tensor([place[word] for word in words])

    def _noisy(self, targets: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor | None]:
        noisy, wrong = add_label_noise(targets, self.label_noise, len(self.classes), generator)
        return noisy, wrong if self.label_noise else None

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs, targets, reduction="none")

    def metrics(self) -> Mapping[str, Metric]:
        return {
            "accuracy": Metric(accuracy_score, most_likely, percent=True),
            "macro F1": Metric(partial(f1_score, average="macro"), most_likely),
        }

    def state(self) -> dict[str, Any]:
        return {**super().state(), "classes": list(self.classes)}

    def restore(self, state: Mapping[str, Any]) -> None:
        super().restore(state)
        self.classes = tuple(state["classes"])

    def _in_words(self, outputs: Tensor) -> list[Sequence[str]]:
        best = outputs.softmax(1).max(1)
        pairs = zip(best.indices.tolist(), best.values.tolist())
        return [(self.classes[place], f"{share:.3f}") for place, share in pairs]


# ---- pictures ----------------------------------------------------------------------------------------------


def _mean_over(value: Tensor) -> str:
    """How :func:`_bars` puts together what a column has for each output."""
    if len(value) == 1:
        return ""
    return f"; {'geometric ' if bool((value > 0).all()) else ''}means over {len(value)} units"


def _bars(setting: str, names: Sequence[str], value: Tensor) -> Figure:
    from matplotlib.figure import Figure

    positive = bool((value > 0).all())
    means = (value.double().log().mean(0).exp() if positive else value.double().mean(0)).numpy()
    order = np.argsort(-means)[:MOST_BARS]
    figure = Figure(figsize=(7.0, 1.0 + 0.26 * len(order)), layout="constrained")
    axes = figure.subplots()
    axes.barh([names[place] for place in order], means[order], color="#0072B2")
    axes.invert_yaxis()
    axes.set_xlabel(setting.replace("_", " "))
    if positive and means.max() > 3 * means.min():
        axes.set_xscale("log")
    return figure


def _scatter(name: str, told: Tensor, true: Tensor) -> Figure:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.0, 4.6), layout="constrained")
    axes = figure.subplots()
    ends = [float(min(told.min(), true.min())), float(max(told.max(), true.max()))]
    axes.plot(ends, ends, color="#777777", lw=1, ls="--")
    axes.plot(true, told, "o", color="#0072B2", ms=4, alpha=0.6, mec="none")
    axes.set(xlabel=f"{name}, true", ylabel=f"{name}, told", aspect="equal")
    return figure
