"""The files of a run, written so that whatever is killed whenever leaves a run that can go on."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import yaml
from filelock import FileLock, Timeout

from .config import Config, ConfigError
from .edits import FREE, check_edits, differences, told
from .messages import one_line
from .old import today
from .parsing import as_yaml, config_of, read_config
from .values import as_files

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
        self.best_file = path / "best.pt"
        self.checkpoints = path / "checkpoints"

    # ---- whose it is ---------------------------------------------------------------------------------------

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Makes the folder and keeps other processes from writing to it; the lock goes with the process,
        however it ends.

        Raises:
            ConfigError: if another process has it, or the folder cannot be made.
        """
        lock = FileLock(self.path / ".lock", timeout=0.5)  # a live view looks at it for an instant
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise ConfigError(
                f"Another process is training in {self.path}. Wait for it, or stop it."
            ) from error
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error
        try:
            yield
        finally:
            lock.release()

    def create(self, config: Config) -> None:
        """Writes the complete configuration, if there is none. Only whoever holds the lock may do so.

        Raises:
            ConfigError: if it cannot be written.
        """
        try:
            self.checkpoints.mkdir(parents=True, exist_ok=True)
            if not self.config_file.exists():
                write_atomically(self.config_file, as_yaml(config).encode())
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error

    def check_new(self) -> None:
        """Refuses a folder that holds a run.

        Raises:
            ConfigError: with the command that goes on with it.
        """
        try:
            begun = self.config_file.exists()
        except (OSError, ValueError) as error:
            raise self._unusable(error) from error
        if begun:
            raise ConfigError(
                f"output.folder={self.path} holds a run already. Go on with: torch-hypergrad resume "
                f"{self.path}, or choose another folder."
            )

    def check_same(self, config: Config) -> None:
        """Refuses another configuration than that of the run which is there; only what it writes may differ.

        Raises:
            ConfigError: with the keys that differ.
        """
        if not self.config_file.exists():
            return
        changes = differences(as_dict(read_config(self.config_file)), as_dict(config))
        changes = {path: pair for path, pair in changes.items() if not path.startswith("output.")}
        if changes:
            raise ConfigError(
                f"{self.path} holds a run of another configuration: {told(changes)}. Choose another "
                "output.folder."
            )

    def check_unedited(self) -> None:
        """Refuses a finished run whose configuration is no longer that of its training.

        Raises:
            ConfigError: with what has changed.
        """
        trained = json.loads(self.summary_file.read_text(encoding="utf-8")).get("config")
        if trained is not None:
            there = as_dict(read_config(self.config_file))
            complete = as_dict(config_of({**today(trained), "output": there["output"]}))
            changes = check_edits(complete, there, f"{self.config_file} of a finished run")
            later = {path: pair for path, pair in changes.items() if not path.startswith(FREE)}
            if later:
                raise ConfigError(
                    f"{self.path} is finished, and {self.config_file} was edited since: {told(later)}. Undo "
                    "it, or train in a new folder."
                )

    def _unusable(self, error: Exception) -> ConfigError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        return ConfigError(
            f"The folder {str(self.path)[:200]} (output.folder) cannot be used: {reason}. Choose another one."
        )

    @property
    def finished(self) -> bool:
        """Whether the run has come to its end."""
        return self.summary_file.exists()

    # ---- metrics -------------------------------------------------------------------------------------------

    def open_metrics(self, size: int) -> int:
        """Cuts what was written after the first ``size`` bytes, which a resumed run writes again.

        Returns:
            How many of these bytes are missing. Half a line at the end is cut off as well.
        """
        self.metrics_file.touch()
        content = self.metrics_file.read_bytes()[:size]
        whole = content[: content.rfind(b"\n") + 1]
        os.truncate(self.metrics_file, len(whole))
        return size - len(whole)

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

    def finish(
        self,
        summary: dict[str, Any],
        tuned: dict[str, Any],
        model: dict[str, Any],
        pictures: Sequence[tuple[str, bytes]] = (),
    ) -> None:
        """Writes the results; the summary last, since it says that the run is finished."""
        drawn = []
        for number, (caption, png) in enumerate(pictures):
            file = self.path / "pictures" / f"{number}.png"
            file.parent.mkdir(exist_ok=True)
            write_atomically(file, png)
            drawn.append({"file": f"pictures/{number}.png", "caption": caption})
        summary = {**summary, "pictures": drawn}
        for name, content in as_files(tuned["values"]).items() if tuned["values"] else ():
            write_atomically(self.path / name, content)
        write_atomically(self.tuned_file, _as_bytes(tuned))
        write_atomically(self.model_file, _as_bytes(model))
        write_atomically(self.summary_file, json.dumps(summary, indent=2).encode())

    def save_best(self, state: dict[str, Any]) -> None:
        """Writes what was best so far."""
        write_atomically(self.best_file, _as_bytes(state))

    def load_best(self) -> dict[str, Any]:
        """What :meth:`save_best` wrote."""
        return _loaded(self.best_file.read_bytes(), self.best_file)

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
                return _loaded(content, path), damaged
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


def as_dict(config: Config) -> dict[str, Any]:
    """All keys, with values as a file of YAML gives them back."""
    return yaml.safe_load(as_yaml(config))


def _loaded(content: bytes, path: Path) -> dict[str, Any]:
    """Tensors and plain containers; code is refused, and never run."""
    try:
        return torch.load(io.BytesIO(content), weights_only=True, map_location="cpu")
    except (pickle.UnpicklingError, EOFError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{path} is whole but holds something else than a checkpoint, which is not loaded: "
            f"{one_line(error).split('. ')[0]}. Delete it; the one before is used then."
        ) from error


def _as_bytes(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
