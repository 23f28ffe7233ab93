"""Reads the folder of a run, also of one that is still training or was cut off."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import yaml

from ..config import NAMED, Config, ConfigError, Tune, setting_of
from ..old import today
from .style import finite
from .words import Words, words_of

Record = dict[str, Any]
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times as fast
COLUMNS: dict[str, list[str]] = {
    "task": [],
    "train": ["step", "loss"],
    "eval": ["step", "seconds"],
    "hyper": [
        *("step", "hypergradient_norm", "residual", "num_matvecs", "adjoint_growth", "product_error"),
        *("clipped", "warnings", "values"),
    ],
    "skipped": ["step", "reason"],
    "edited": ["step", "changes"],
}
RESULTS = ("train", "val", "test", "cost", "seconds", "num_values", "num_trials")  # of a summary
QUANTILES = ("min", "q05", "q25", "median", "q75", "q95", "max")  # of many tuned values
WEIGHTS = "example_weights"  # tuned as logits, and read as the weights that they stand for


@dataclass(frozen=True)
class RecordedRun:
    """What the folder of a run holds.

    Args:
        folder: the folder as it was given.
        config: the complete configuration, as nested dicts.
        tables: the rows of metrics.jsonl by kind, in the order of training steps. Columns of dicts are there
            by their paths, such as val.loss; those in COLUMNS that no row has hold nothing.
        unreadable: how many lines of metrics.jsonl were left out because they could not be read.
        summary: the contents of summary.json, None of a run that has not finished.
    """

    folder: Path
    config: dict[str, Any]
    tables: dict[str, pd.DataFrame]
    unreadable: int
    summary: Record | None

    @property
    def name(self) -> str:
        """The name of the folder; of one seed among several, with the name of its row."""
        path = self.folder.resolve()
        return f"{path.parent.name}, {path.name}" if path.name.startswith("seed-") else path.name

    @property
    def evals(self) -> pd.DataFrame:
        """Losses and metrics on the training and validation sets."""
        return self.tables["eval"]

    @cached_property
    def words(self) -> Words:
        """What things are called."""
        return words_of(
            (self.summary or {}).get("words") or next(iter(self.tables["task"].to_dict("records")), None)
        )

    @property
    def method(self) -> str | None:
        """The name of the method; None of a run without tuning."""
        method = self.config["method"]
        return None if method is None else str(method["name"])

    @property
    def data(self) -> str:
        """What the data are called."""
        task = self.config["task"]
        return self.words.data or str(task.get("data", task["name"]))

    @property
    def hyper(self) -> pd.DataFrame:
        """Hyper steps that were taken."""
        return self.tables["hyper"]

    @property
    def skipped(self) -> pd.DataFrame:
        """Hyper steps that failed and changed nothing."""
        return self.tables["skipped"]

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @cached_property
    def results(self) -> dict[str, Any]:
        """Numbers by their paths, such as test.loss; so far, of a run that has not finished."""
        if self.summary is None:
            return dict(self.evals.iloc[-1]) if len(self.evals) else {}
        return _results(self.summary)

    @property
    def steps(self) -> int:
        """Training steps so far."""
        last = [int(table["step"].iloc[-1]) for table in self.tables.values() if len(table)]
        return int((self.summary or {}).get("steps", max(last, default=0)))

    @property
    def seconds(self) -> float | None:
        """Duration, so far."""
        return self.results.get("seconds")

    @property
    def seed(self) -> Any:
        return self.config["train"]["seed"]

    @cached_property
    def baseline(self) -> dict[str, Any]:
        """The results of the same training with values fixed at their start, if it was done."""
        return _results(_read_summary(self.folder / "baseline" / "summary.json") or {})

    @property
    def pictures(self) -> list[Record]:
        """Files and captions of the task's own."""
        return (self.summary or {}).get("pictures", [])

    @cached_property
    def tuned(self) -> Record:
        """The contents of tuned.pt; empty where there is none yet, or one that was cut off."""
        try:
            tuned = torch.load(self.folder / "tuned.pt", map_location="cpu", weights_only=True)
        except (OSError, EOFError, RuntimeError, ValueError, pickle.UnpicklingError):
            return {}
        for values in (tuned.get("start", {}), tuned.get("values", {})):
            if WEIGHTS in values:
                values[WEIGHTS] = values[WEIGHTS].sigmoid()
        return tuned

    def numbers(self, names: Iterable[str], kind: str = "values") -> np.ndarray:
        """All the finite values of these tensors at the end, or with ``kind="start"`` the first, in one
        vector. Before they are saved, the start is what the configuration says."""
        saved = self.tuned.get(kind, {})
        found = [saved[name].double().numpy().reshape(-1) for name in names if name in saved]
        if not saved and kind == "start":
            known = [self.tune_of(name)["init"] for name in names]
            found = [np.array([init], dtype=float) for init in known if isinstance(init, (int, float))]
        return finite(np.concatenate([np.zeros(0), *found]))

    @cached_property
    def values(self) -> pd.DataFrame:
        """A row for each tuned name at each hyper step: step, name, setting, quantiles (QUANTILES), and
        whether they are ``many`` numbers; of one all are the same."""
        rows = [
            (step, name, setting_of(name), isinstance(value, dict), *_quantiles(value))
            for step, values in self.hyper[["step", "values"]].dropna().itertuples(index=False)
            for name, value in values.items()
        ]
        return pd.DataFrame(rows, columns=["step", "name", "setting", "many", *QUANTILES])

    @property
    def latest(self) -> pd.DataFrame:
        """The values after the last hyper step."""
        return self.values[self.values["step"] == self.hyper["step"].max()]

    @property
    def clipped(self) -> dict[str, int]:
        """How many values of each setting would have left their bounds at the last hyper step."""
        last = self.hyper["clipped"].iloc[-1] if len(self.hyper) else None
        counts = pd.Series(last if isinstance(last, dict) else {}, dtype=int)
        return counts.groupby(setting_of, sort=False).sum().to_dict()

    def tune_of(self, name: str) -> Record:
        """How the value of this name is tuned: the entry of the section tune."""
        return self.config["tune"].get(setting_of(name), asdict(Tune()))


def _quantiles(value: float | Record) -> list[float | None]:
    """As they were logged; of a single number all are the same."""
    return [value.get(key) for key in QUANTILES] if isinstance(value, dict) else [value] * len(QUANTILES)


def part_of(name: str) -> str:
    """The rest of the name, such as layers.0.weight."""
    return name.removeprefix(setting_of(name)).lstrip("/.") or name


def read_run(folder: Path) -> RecordedRun:
    """Reads a folder.

    Raises:
        ConfigError: it holds no run.
    """
    folder = Path(folder)
    config = _read_config(folder)
    tables, unreadable = _read_metrics(folder / "metrics.jsonl")
    summary = _read_summary(folder / "summary.json")
    trained = (summary or {}).get("config", {})  # as it was trained, whatever the file says by now
    config |= {section: value for section, value in _complete(trained).items() if section in today(trained)}
    return RecordedRun(folder, config, tables, unreadable, summary)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.yaml"
    remedy = "Pass the folder of a run, one that holds config.yaml and metrics.jsonl."
    if not path.is_file():
        found = (
            ", ".join(sorted(entry.name for entry in folder.iterdir())[:5])
            if folder.is_dir()
            else "no such folder"
        )
        raise ConfigError(
            f"{folder}: expected the folder of a run with a "
            f"config.yaml, got {found or 'an empty one'}. {remedy}"
        )
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), Loader=LOADER)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{path}: expected YAML, got something else ({reason}). {remedy}") from error
    if not isinstance(given, dict):
        raise ConfigError(f"{path}: expected keys and values, got {type(given).__name__}. {remedy}")
    return _complete(given)


def _complete(given: dict[str, Any]) -> dict[str, Any]:
    """The configuration with the defaults of keys that an older version did not have."""
    complete = asdict(Config())
    for section, value in today(given).items():
        default = complete.get(section)
        whole = section in NAMED or not isinstance(default, dict)
        complete[section] = value if whole else {**(default or {}), **(value or {})}
    complete["tune"] = {name: {**asdict(Tune()), **(entry or {})} for name, entry in complete["tune"].items()}
    return complete


def _read_metrics(path: Path) -> tuple[dict[str, pd.DataFrame], int]:
    """The rows by kind, and the number of lines that are none. Of a step logged twice the last counts."""
    rows: dict[str, dict[float, Record]] = {kind: {} for kind in COLUMNS}
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    unreadable = 0
    for line in text.splitlines():
        try:
            row = _with_weights(json.loads(line))
            rows.setdefault(row["kind"], {})[float(row["step"])] = row
        except (ValueError, KeyError, TypeError, AttributeError):
            unreadable += bool(line.strip())
    return {kind: _table(kind, list(found.values())) for kind, found in rows.items()}, unreadable


def _table(kind: str, rows: list[Record]) -> pd.DataFrame:
    table = pd.json_normalize(rows) if kind == "eval" else pd.DataFrame(rows)
    columns = dict.fromkeys([*COLUMNS.get(kind, ()), *table.columns])
    table = table.reindex(columns=list(columns))
    return table.sort_values("step", ignore_index=True) if rows else table


def _with_weights(record: Record) -> Record:
    logits = record.get("values", {}).get(WEIGHTS)
    if logits is None:
        return record
    weights = {key: (1 + math.tanh(logit / 2)) / 2 for key, logit in logits.items() if key != "mean"}
    return {**record, "values": {**record["values"], WEIGHTS: weights}}


def _results(summary: Record) -> dict[str, Any]:
    found = pd.json_normalize({key: summary[key] for key in RESULTS if key in summary})
    return dict(found.iloc[0]) if len(found) else {}


def _read_summary(path: Path) -> Record | None:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None
