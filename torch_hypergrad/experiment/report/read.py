"""Reads the folder of a run, also of one that is still training or was cut off."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import yaml

from ..config import NAMED, Config, ConfigError, Tune, setting_of
from ..old import today
from .words import Words, words_of

Record = dict[str, Any]
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the one in C is ten times as fast
KINDS = ("task", "train", "eval", "hyper", "skipped", "edited")
WEIGHTS = "example_weights"  # tuned as logits, and read as the weights that they stand for


@dataclass(frozen=True)
class RecordedRun:
    """What the folder of a run holds.

    Args:
        folder: the folder as it was given.
        config: the complete configuration, as nested dicts.
        records: the lines of metrics.jsonl by kind, each kind in the order of its training steps.
        unreadable: how many lines of metrics.jsonl were left out because they could not be read.
        summary: the contents of summary.json, None of a run that has not finished.
    """

    folder: Path
    config: dict[str, Any]
    records: dict[str, list[Record]]
    unreadable: int
    summary: Record | None

    @property
    def name(self) -> str:
        """The name of the folder; of one seed among several, with the name of its row."""
        path = self.folder.resolve()
        return f"{path.parent.name}, {path.name}" if path.name.startswith("seed-") else path.name

    @property
    def evals(self) -> list[Record]:
        """Losses and metrics on the training and validation sets."""
        return self.records["eval"]

    @cached_property
    def words(self) -> Words:
        """What things are called."""
        return words_of((self.summary or {}).get("words") or next(iter(self.records["task"]), None))

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
    def hyper(self) -> list[Record]:
        """Hyper steps that were taken."""
        return self.records["hyper"]

    @property
    def skipped(self) -> list[Record]:
        """Hyper steps that failed and changed nothing."""
        return self.records["skipped"]

    @property
    def finished(self) -> bool:
        return self.summary is not None

    @property
    def steps(self) -> int:
        """Training steps so far."""
        last = [int(lines[-1]["step"]) for lines in self.records.values() if lines]
        return int((self.summary or {}).get("steps", max(last, default=0)))

    @property
    def seconds(self) -> float | None:
        """Duration, so far."""
        return (self.summary or (self.evals[-1] if self.evals else {})).get("seconds")

    @property
    def seed(self) -> Any:
        return self.config["train"]["seed"]

    @cached_property
    def baseline(self) -> Record | None:
        """The results of the same training with values fixed at their start, if it was done."""
        return _read_summary(self.folder / "baseline" / "summary.json")

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

    def tune_of(self, name: str) -> Record:
        """How the value of this name is tuned: the entry of the section tune."""
        return self.config["tune"].get(setting_of(name), asdict(Tune()))


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
    records, unreadable = _read_metrics(folder / "metrics.jsonl")
    summary = _read_summary(folder / "summary.json")
    trained = (summary or {}).get("config", {})  # as it was trained, whatever the file says by now
    config |= {section: value for section, value in _complete(trained).items() if section in today(trained)}
    return RecordedRun(folder, config, records, unreadable, summary)


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


def _read_metrics(path: Path) -> tuple[dict[str, list[Record]], int]:
    """The records by kind, and the number of lines that are none. Of a step logged twice the last counts."""
    by_step: dict[str, dict[float, Record]] = {kind: {} for kind in KINDS}
    text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else ""
    unreadable = 0
    for line in text.splitlines():
        try:
            record = _with_weights(json.loads(line))
            by_step.setdefault(record["kind"], {})[float(record["step"])] = record
        except (ValueError, KeyError, TypeError, AttributeError):
            unreadable += bool(line.strip())
    return {kind: [found[step] for step in sorted(found)] for kind, found in by_step.items()}, unreadable


def _with_weights(record: Record) -> Record:
    logits = record.get("values", {}).get(WEIGHTS)
    if logits is None:
        return record
    weights = {key: (1 + math.tanh(logit / 2)) / 2 for key, logit in logits.items() if key != "mean"}
    return {**record, "values": {**record["values"], WEIGHTS: weights}}


def _read_summary(path: Path) -> Record | None:
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return summary if isinstance(summary, dict) else None
