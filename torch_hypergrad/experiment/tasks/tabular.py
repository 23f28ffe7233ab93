"""Tables: regression and classification."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import accuracy_score, f1_score, r2_score, root_mean_squared_error
from torch import Tensor, nn

from ..config import ConfigError
from ..options import one_line
from .base import InMemory, Metric, Split, Task, most_likely
from .splits import Sizes, add_label_noise, check_label_noise

if TYPE_CHECKING:
    import pandas
    from matplotlib.figure import Figure

MOST_LEVELS = 100  # of a column of words: more are an identifier, or a text
MOST_BARS = 40


@dataclass(frozen=True)
class Columns:
    """How a table becomes numbers: columns of numbers less their mean over their standard deviation, both of
    the training rows; of a column of words one number for each word there, 1 where it stands. A missing
    number is the mean, a missing or new word nothing.

    Args:
        numbers: mean and standard deviation by column.
        words: the words by column.
    """

    numbers: dict[str, tuple[float, float]]
    words: dict[str, list[str]]

    @classmethod
    def of(cls, table: pandas.DataFrame) -> Columns:
        """Of training rows.

        Raises:
            ConfigError: a column of too many words.
        """
        from pandas.api.types import is_bool_dtype, is_numeric_dtype

        numbers, words = {}, {}
        for name, column in table.items():
            if is_numeric_dtype(column) and not is_bool_dtype(column):
                mean, std = float(column.mean()), float(column.std(ddof=0))
                if np.isfinite([mean, std]).all():
                    numbers[str(name)] = (mean, std if std > 0 else 1.0)
                elif column.notna().any():
                    raise ConfigError(f"task.data: column {name} has infinite numbers. Mend them.")
            else:
                levels = sorted(column.dropna().astype(str).unique())
                if len(levels) > MOST_LEVELS:
                    raise ConfigError(
                        f"task.data: column {name} has {len(levels)} words in the training rows, more than "
                        f"{MOST_LEVELS}. Leave it out: task.drop: [{name}]."
                    )
                words[str(name)] = levels
        return cls(numbers, words)

    @property
    def names(self) -> list[str]:
        """Of the numbers that :meth:`encode` gives."""
        return [*self.numbers, *(f"{name}={word}" for name, levels in self.words.items() for word in levels)]

    def encode(self, table: pandas.DataFrame) -> Tensor:
        """(rows, columns) float32.

        Raises:
            ConfigError: columns that are missing, or hold words where numbers were.
        """
        missing = [name for name in (*self.numbers, *self.words) if name not in table]
        if missing:
            raise ConfigError(
                f"The table lacks {', '.join(missing[:5])}; it has {', '.join(map(str, table))}."
            )
        try:
            parts = [
                ((table[name].astype(float) - mean) / std).fillna(0.0).to_numpy()
                for name, (mean, std) in self.numbers.items()
            ]
        except (ValueError, TypeError) as error:
            raise ConfigError(f"A column of numbers holds something else: {one_line(error)}.") from error
        for name, levels in self.words.items():
            column = table[name].astype(str)
            parts += [(column == word).to_numpy() for word in levels]
        return torch.from_numpy(np.stack(parts, 1).astype(np.float32))


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
        table = _read(self.data)
        for name in (self.target, *self.drop):
            if name not in table:
                raise ConfigError(
                    f"task: {self.data} has no column {name}. It has {', '.join(map(str, table))}. Name one "
                    "of them in task.target or task.drop."
                )
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
        inputs, targets = self.columns.encode(table), self._targets(target, rows[0])
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
        """For each row of the files: file and number of the row, counted from 1, and what the network "
        "says."""
        found: list[Sequence[str]] = []
        for file in files:
            table = _read(str(file))
            cells = self._in_words(network(self.columns.encode(table)))
            found += [(f"{file}:{row}", *said) for row, said in enumerate(cells, start=1)]
        return found

    @abstractmethod
    def _in_words(self, outputs: Tensor) -> list[Sequence[str]]:
        """What outputs say, row by row."""

    def figures(self, network: nn.Module, split: Split, values: Mapping[str, Tensor]) -> Mapping[str, Figure]:
        """Tuned values by column, of each setting that has one for each weight of the first layer."""
        found = {}
        for name, value in values.items():
            if value.ndim == 2 and value.shape[1] == len(self.columns.names) and "/" in name:
                setting, _, tensor = name.partition("/")
                caption = (
                    f"Learned {setting.replace('_', ' ')} of {tensor} by column, geometric means over outputs"
                )
                found[f"{caption}; the largest first."] = _bars(setting, self.columns.names, value.cpu())
        return found


class TabularRegression(Table):
    """Tells a number; the loss is the squared error in units of the target's variance over the training rows.
    Arguments as of :class:`Table`."""

    loss = "squared error (of the target's variance)"

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
            "R2": Metric(r2_score, torch.flatten),
            "RMSE": Metric(self._rmse, torch.flatten, higher_is_better=False),
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


class TabularClassification(Table):
    """Tells a class; the loss is the cross-entropy. Arguments as of :class:`Table`, and

    Args:
        label_noise: this fraction of the training labels is replaced by wrong ones.
    """

    loss = "cross-entropy"

    def __init__(
        self,
        data: str,
        target: str | None = None,
        drop: Sequence[str] = (),
        train_size: int | None = None,
        val_size: int = 100,
        test_size: int | None = None,
        label_noise: float = 0.0,
    ) -> None:
        super().__init__(data, target, drop, train_size, val_size, test_size)
        check_label_noise(label_noise)
        self.label_noise = label_noise

    def _targets(self, target: pandas.Series, train_rows: Tensor) -> Tensor:
        words = target.astype(str)
        self.classes = tuple(sorted(words.unique(), key=_as_number))
        if not 2 <= len(self.classes) <= MOST_LEVELS * 10:
            raise ConfigError(
                f"task.target: {self.target} has {len(self.classes)} different values, and classes are at "
                f"least 2 and at most {MOST_LEVELS * 10}. Take another column, or TabularRegression for "
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


# ---- reading -----------------------------------------------------------------------------------------------


def _read(data: str) -> pandas.DataFrame:
    """Raises ConfigError."""
    if data in _EMBEDDED:
        return _EMBEDDED[data]()
    import pandas as pd  # slow to import

    file = Path(data).expanduser()
    readers: dict[str, Callable[[Path], pandas.DataFrame]] = {
        ".csv": pd.read_csv, ".tsv": lambda path: pd.read_csv(path, sep="\t"), ".parquet": pd.read_parquet,
    }  # fmt: skip
    kind = file.with_suffix("").suffix if file.suffix in (".gz", ".xz", ".zip", ".bz2") else file.suffix
    if kind not in readers:
        raise ConfigError(
            f"task.data: got {data}, expected a file that ends in {', '.join(readers)}, or one of "
            f"scikit-learn's tables: {', '.join(_EMBEDDED)}."
        )
    if not file.is_file():
        raise ConfigError(f"task.data: {file} is no file.")
    try:
        return readers[kind](file).rename(columns=str)
    except Exception as error:  # damaged files fail in many ways
        raise ConfigError(f"task.data: {file} cannot be read ({one_line(error)}).") from error


def _embedded(name: str, **options: Any) -> Callable[[], pandas.DataFrame]:
    def load() -> pandas.DataFrame:
        from sklearn import datasets  # slow to import

        bunch = getattr(datasets, f"load_{name}")(as_frame=True, **options)
        table = bunch.frame
        if "target_names" in bunch:
            table = table.assign(target=[str(bunch.target_names[label]) for label in bunch.target])
        return table

    return load


_EMBEDDED = {
    "diabetes": _embedded("diabetes", scaled=False),
    "iris": _embedded("iris"),
    "wine": _embedded("wine"),
    "breast_cancer": _embedded("breast_cancer"),
}


def _as_number(word: str) -> tuple[float, str]:
    """Classes that are numbers in their order, before words."""
    try:
        return float(word), word
    except ValueError:
        return float("inf"), word


# ---- pictures ----------------------------------------------------------------------------------------------


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
