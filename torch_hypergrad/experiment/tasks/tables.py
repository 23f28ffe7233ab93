"""Tables: how they are read, and how their columns become numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..config import ConfigError
from ..messages import one_line

if TYPE_CHECKING:
    import pandas

MOST_LEVELS = 100  # of a column of words: more are an identifier, or a text
PACKED = (".gz", ".bz2", ".xz", ".zip")


@dataclass(frozen=True)
class Columns:
    """How a table becomes numbers.

    Columns of numbers, less their mean, over their standard deviation, both of the training rows (false is 0,
    true is 1); of a column of words one number for each word of the training rows, 1 where it stands. A
    missing number is the mean; of a missing word, or one that the training rows lack, all numbers are 0.

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
            ConfigError: a column with infinite numbers, or of too many words.
        """
        numbers, words = {}, {}
        for name, column in table.items():
            known = column.dropna()
            if len(known) and _hold_numbers(str(name), known):
                numbers[str(name)] = _mean_and_std(str(name), known.to_numpy(float))
            elif len(known):
                words[str(name)] = _levels(str(name), known)
        return cls(numbers, words)

    @property
    def names(self) -> list[str]:
        """Of the numbers that :meth:`encode` gives."""
        return [*self.numbers, *(f"{name}={word}" for name, levels in self.words.items() for word in levels)]

    def encode(self, table: pandas.DataFrame, source: str) -> Tensor:
        """(rows, columns) float32.

        Args:
            table: with these columns, and perhaps others.
            source: what the table is called in messages.
        Raises:
            ConfigError: columns that are missing, hold words where numbers were, or infinite numbers.
        """
        missing = [name for name in (*self.numbers, *self.words) if name not in table]
        if missing:
            raise ConfigError(f"{source} has no column {listed(missing)}. It has {listed(table)}.")
        parts = [part for name in self.numbers for part in self._number(name, table[name], source)]
        parts += [part for name in self.words for part in self._flags(name, table[name])]
        return torch.from_numpy(np.stack(parts, 1).astype(np.float32))

    def _number(self, name: str, column: pandas.Series, source: str) -> Iterator[np.ndarray]:
        mean, std = self.numbers[name]
        try:
            numbers = (column.astype(float).to_numpy() - mean) / std
        except (ValueError, TypeError) as error:
            reason = f"column {name} does not hold numbers, as it did in training ({one_line(error)})"
            raise ConfigError(f"{source}: {reason}. Mend it.") from error
        if (np.abs(numbers) > np.finfo(np.float32).max).any():
            raise ConfigError(f"{source}: column {name} has infinite or far too large numbers. Mend them.")
        yield np.nan_to_num(numbers)

    def _flags(self, name: str, column: pandas.Series) -> Iterator[np.ndarray]:
        found, known = column.astype(str).to_numpy(), column.notna().to_numpy()
        for word in self.words[name]:
            yield (found == word) & known


def _hold_numbers(name: str, known: pandas.Series) -> bool:
    """Whether these are numbers, or true and false; otherwise they are words, or refused."""
    from pandas.api.types import infer_dtype, is_numeric_dtype

    inside = infer_dtype(known.astype(object))
    if is_numeric_dtype(known) or inside in ("boolean", "decimal"):
        return True
    if inside != "string":
        raise ConfigError(
            f"task.data: column {name} holds neither numbers nor words, but {inside}. Leave it out: "
            f"task.drop: [{name}]."
        )
    return False


def _mean_and_std(name: str, numbers: np.ndarray) -> tuple[float, float]:
    with np.errstate(over="ignore", invalid="ignore"):
        mean, std = float(numbers.mean()), float(numbers.std())
    if not np.isfinite([mean, std]).all():
        raise ConfigError(f"task.data: column {name} has infinite or far too large numbers. Mend them.")
    constant = numbers.min() == numbers.max()  # of which rounding leaves a tiny deviation
    return (float(numbers[0]), 1.0) if constant else (mean, std)


def _levels(name: str, known: pandas.Series) -> list[str]:
    levels = sorted(known.astype(str).unique())
    if len(levels) > MOST_LEVELS:
        raise ConfigError(
            f"task.data: column {name} has {len(levels)} words in the training rows, more than "
            f"{MOST_LEVELS}. Leave it out: task.drop: [{name}]."
        )
    return levels


# ---- reading -----------------------------------------------------------------------------------------------


def read_table(data: str, source: str, words: Iterable[str] = ()) -> pandas.DataFrame:
    """A file, or one of scikit-learn's tables.

    Args:
        data: its path or name.
        source: what it is called in messages.
        words: columns of which each cell is read as the word that it is, also where all look like numbers.
    Raises:
        ConfigError: a file that is missing, of another kind, or damaged.
    """
    if data in EMBEDDED:
        return EMBEDDED[data]()
    file = Path(data).expanduser()
    reader = _reader(file, dict.fromkeys(words, str))
    if reader is None:
        raise ConfigError(
            f"{source} is no table: expected a file that ends in .csv, .tsv (also packed, as in .csv.gz) or "
            f".parquet, or one of scikit-learn's: {', '.join(EMBEDDED)}."
        )
    if not file.is_file():
        raise ConfigError(f"{source} is no file.")
    try:
        table = reader(file).rename(columns=str)
    except ImportError as error:
        raise ConfigError(f"{source}: Parquet needs pyarrow. Install it: pip install pyarrow") from error
    except Exception as error:  # damaged files fail in many ways
        raise ConfigError(f"{source} cannot be read ({one_line(error)}). Mend it.") from error
    twice = table.columns[table.columns.duplicated()]
    if len(twice):
        raise ConfigError(f"{source} has two columns called {twice[0]}. Rename one.")
    return table


def _reader(file: Path, words: dict[str, type]) -> Callable[[Path], pandas.DataFrame] | None:
    endings = [ending.lower() for ending in file.suffixes[-2:]]
    kind = endings[0] if endings[-1:] and endings[-1] in PACKED else "".join(endings[-1:])
    if kind == ".parquet":
        return _read_parquet
    separators = {".csv": ",", ".tsv": "\t"}
    return (lambda path: _read_text(path, separators[kind], words)) if kind in separators else None


def _read_parquet(file: Path) -> pandas.DataFrame:
    import pandas as pd  # slow to import

    return pd.read_parquet(file)


def _read_text(file: Path, separator: str, words: dict[str, type]) -> pandas.DataFrame:
    import pandas as pd  # slow to import

    header = pd.read_csv(file, sep=separator, header=None, nrows=1, dtype=str).iloc[0]
    if header.duplicated().any():  # which pandas would rename without a word, a copy of the target perhaps
        raise ValueError(f"two columns are called {header[header.duplicated()].iloc[0]}")
    table = pd.read_csv(file, sep=separator, dtype=words, low_memory=False)
    if not isinstance(table.index, pd.RangeIndex):  # where it takes the first cells for names of rows
        raise ValueError(f"the rows have more cells than the header, which has {len(header)}")
    return table


def _embedded(name: str, **options: Any) -> Callable[[], pandas.DataFrame]:
    def load() -> pandas.DataFrame:
        from sklearn import datasets  # slow to import

        bunch = getattr(datasets, f"load_{name}")(as_frame=True, **options)
        table = bunch.frame
        if "target_names" in bunch:
            table = table.assign(target=[str(bunch.target_names[label]) for label in bunch.target])
        return table

    return load


EMBEDDED = {
    "diabetes": _embedded("diabetes", scaled=False),
    "iris": _embedded("iris"),
    "wine": _embedded("wine"),
    "breast_cancer": _embedded("breast_cancer"),
}

MOST_LISTED = 20


def listed(names: Iterable[object]) -> str:
    """With commas, the first ones of many."""
    every: Sequence[str] = [str(name) for name in names]
    more = f" and {len(every) - MOST_LISTED} more" if len(every) > MOST_LISTED else ""
    return ", ".join(every[:MOST_LISTED]) + more


def as_number(word: str) -> tuple[float, str]:
    """Sorts classes that are numbers by their size, before words."""
    try:
        number = float(word)
    except ValueError:
        number = math.inf
    return (math.inf if math.isnan(number) else number), word
