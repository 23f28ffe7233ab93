"""The files of a run, written so that whatever is killed whenever leaves a run that can go on."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from .config import Config, ConfigError

CHECKPOINT = re.compile(r"step-(\d{8,})-([0-9a-f]{16})\.pt")


class RunFolder:
    """``config.yaml``, ``metrics.jsonl``, ``checkpoints/``; once finished also ``model.pt``, ``tuned.pt`` and
    ``summary.json``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics_file = path / "metrics.jsonl"
        self.summary_file = path / "summary.json"
        self.tuned_file = path / "tuned.pt"
        self.model_file = path / "model.pt"
        self.checkpoints = path / "checkpoints"

    def create(self, config: Config) -> None:
        """Makes the folder, with the complete configuration, if it is not there.

        Raises:
            ConfigError: if it cannot be made.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            if not self.config_file.exists():
                write_atomically(self.config_file, _as_yaml(config).encode())
        except (OSError, ValueError) as error:
            raise ConfigError(f"The folder {self.path} (output.folder) cannot be made: {error}.") from error

    def check_same(self, config: Config) -> None:
        """Refuses another configuration than that of the run which is there; only what it writes may differ.

        Raises:
            ConfigError: with the first key that differs.
        """
        if not self.config_file.exists():
            return
        there, here = (
            yaml.safe_load(self.config_file.read_text(encoding="utf-8")),
            yaml.safe_load(_as_yaml(config)),
        )
        for section in here:
            if section != "output" and there.get(section) != here[section]:
                raise ConfigError(
                    f"{self.path} holds a run of another configuration: {section} is {there.get(section)} "
                    f"there and {here[section]} here. Choose another output.folder."
                )

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.summary_file.exists()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps other processes from training here; the lock goes with the process, however it ends."""
        try:
            with FileLock(self.path / ".lock", timeout=0):
                yield
        except Timeout as error:
            raise ConfigError(
                f"Another process is training in {self.path}. Wait for it, or stop it."
            ) from error

    # ---- metrics -------------------------------------------------------------------------------------------

    def open_metrics(self, size: int) -> None:
        """Cuts what was written after the first ``size`` bytes, which a resumed run writes again."""
        with self.metrics_file.open("ab") as file:
            file.truncate(size)

    def log(self, row: dict[str, Any]) -> None:
        """Adds a line to the metrics."""
        with self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def sync_metrics(self) -> int:
        """Puts the metrics on the disk; their size in bytes."""
        with self.metrics_file.open("ab") as file:
            os.fsync(file.fileno())
            return file.tell()

    # ---- results -------------------------------------------------------------------------------------------

    def finish(self, summary: dict[str, Any], tuned: dict[str, Any], model: dict[str, Any]) -> None:
        """Writes the results; the summary last, since it says that the run is finished."""
        write_atomically(self.tuned_file, _as_bytes(tuned))
        write_atomically(self.model_file, _as_bytes(model))
        write_atomically(self.summary_file, json.dumps(summary, indent=2).encode())

    # ---- checkpoints ---------------------------------------------------------------------------------------

    def save_checkpoint(self, step: int, state: dict[str, Any], keep: int) -> Path:
        """Writes a checkpoint whose name holds the hash of its contents, and keeps only the last ``keep``."""
        content = _as_bytes(state)
        path = self.checkpoints / f"step-{step:08d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
        write_atomically(path, content)
        for old in self._checkpoint_files()[keep:]:
            old.unlink()
        for left_over in self.checkpoints.glob("*.tmp"):
            left_over.unlink()
        return path

    def load_checkpoint(self) -> tuple[dict[str, Any] | None, list[Path]]:
        """The newest checkpoint that is whole, or None; and the newer ones that are damaged, which get
        another name so that they do not count among the last that are kept."""
        damaged: list[Path] = []
        for path in self._checkpoint_files():
            content = path.read_bytes()
            named = CHECKPOINT.fullmatch(path.name)
            if named and hashlib.sha256(content).hexdigest().startswith(named[2]):
                return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu"), damaged
            damaged.append(path.rename(path.with_suffix(".damaged")))
        return None, damaged

    def _checkpoint_files(self) -> list[Path]:
        """Newest first."""
        named = [
            (match, path)
            for path in self.checkpoints.glob("*.pt")
            if (match := CHECKPOINT.fullmatch(path.name))
        ]
        return [
            path
            for _, path in sorted(
                named, key=lambda pair: (int(pair[0][1]), pair[1].stat().st_mtime_ns), reverse=True
            )
        ]


def write_atomically(path: Path, content: bytes) -> None:
    """Under its name there is either nothing, what was there before, or all of ``content``."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    if hasattr(os, "O_DIRECTORY"):  # the new name itself; Windows has no such call
        folder = os.open(path.parent, os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _as_yaml(config: Config) -> str:
    return yaml.safe_dump(asdict(config), sort_keys=False)


def _as_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
