"""A run from its configuration, or from its folder, to its end."""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import torch

from .build import START, build
from .config import Config, ConfigError
from .edits import told
from .loop import Run, Watch
from .messages import one_line
from .parsing import read_config
from .run_folder import RunFolder
from .stopping import StopRequest, TrainingError, stop_on_signals


def train(config: Config, name: str) -> tuple[Path, int | None]:
    """Trains in a new folder.

    Returns:
        The folder, and the signal that stopped training, None if it is finished.

    Raises:
        ConfigError: before anything is written.
        TrainingError: if training could not go on.
    """
    folder = RunFolder(folder_of(config, name))
    folder.check_new()  # at once; and again where nobody else can begin one
    with stop_on_signals() as stop:
        finished = run_in(config, folder, stop, new=True) and _baseline(config, folder, stop)
    return folder.path, None if finished else stop.signal


def resume(path: Path) -> tuple[Path, int | None]:
    """Goes on in an existing folder, from the newest checkpoint that is whole; as :func:`train`."""
    folder = RunFolder(path)
    if not folder.config_file.is_file():
        raise ConfigError(
            f"{path} is no folder of a run: it has no "
            f"{folder.config_file.name}. Give the folder that train named."
        )
    config = read_config(folder.config_file)
    if folder.finished:
        folder.check_unedited()
        print(f"{path} is finished already.")
        if not _baseline_of(folder).config_file.exists():
            return path, None
    with stop_on_signals() as stop:
        finished = run_in(config, folder, stop) and _baseline(config, folder, stop)
    return path, None if finished else stop.signal


QUICK = 60.0
"""Seconds of training up to which the same is trained again without tuning, if nothing is said."""


def _baseline(config: Config, run: RunFolder, stop: StopRequest) -> bool:
    """Trains a finished run again with all values fixed at their start, if its configuration wants that.

    Returns:
        Whether that is finished, or not wanted.
    """
    wanted = config.output.baseline
    if wanted is None:
        wanted = json.loads(run.summary_file.read_text(encoding="utf-8"))["seconds"] < QUICK
    if not wanted or config.method is None or config.train.fixed is not None:
        return True
    folder = _baseline_of(run)
    if folder.finished:
        return True
    train = replace(config.train, fixed=START, hyper_every=None, warmup=0, episodes=1)
    output = replace(config.output, folder=None, loggers=[])
    print(
        "Training the same again without tuning, for the report (--baseline false does not).", file=sys.stderr
    )
    return run_in(replace(config, train=train, output=output), folder, stop, quiet=True)


def _baseline_of(run: RunFolder) -> RunFolder:
    return RunFolder(run.path / "baseline")


def last_run() -> Path:
    """The run in ``runs/`` that was last written to.

    Raises:
        ConfigError: if there is none.
    """
    written = {path.stat().st_mtime_ns: path.parent for path in Path("runs").glob("*/metrics.jsonl")}
    if not written:
        raise ConfigError(f"There is no run in {Path('runs').resolve()}. Give the folder that train named.")
    return written[max(written)]


def run_in(
    config: Config,
    folder: RunFolder,
    stop: StopRequest,
    quiet: bool = False,
    new: bool = False,
    watch: Watch | None = None,
) -> bool:
    """Begins a run in its folder, or goes on with the one that is there, to its end or until it is stopped.
    What ``watch`` raises at an evaluation ends it, too.

    Returns:
        Whether it is finished.

    Raises:
        ConfigError: if it is another's: of another configuration or process, or, with ``new``, of any run.
        TrainingError: if training could not go on.
    """
    folder.check_same(config)
    if folder.finished:
        return True
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    with _told_in_one_line(folder):
        parts = build(config)
        with folder.locked():  # before anything is written or trusted
            if new:
                folder.check_new()
            folder.check_same(config)
            if folder.finished:
                return True
            begun = folder.config_file.exists()
            folder.create(config)
            run = Run(config, parts, folder, watch)
            if begun:
                _go_on(run)
            if not quiet:
                print(f"Training in {folder.path}", file=sys.stderr)
            return run.train(stop, quiet)


@contextmanager
def _told_in_one_line(folder: RunFolder) -> Iterator[None]:
    """What the machine lacks ends training with the reason: room on the disk or in memory."""
    try:
        yield
    except OSError as error:
        go_on = f" Go on with: torch-hypergrad resume {folder.path}" if folder.config_file.exists() else ""
        raise TrainingError(f"Training stopped: {error}. Make room, or allow writing.{go_on}") from error
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, (MemoryError, torch.OutOfMemoryError)) or NO_MEMORY.search(str(error))):
            raise
        raise TrainingError(
            f"Training stopped, out of memory: {one_line(error)} Take a smaller train.batch_size, network or "
            "method.memory, in a new folder."
        ) from error


NO_MEMORY = re.compile(r"can't allocate memory|not enough memory|out of memory")


def _go_on(run: Run) -> None:
    try:
        loaded = run.load()
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"The checkpoint in {run.folder.path} does not fit its configuration: {one_line(error)}"
        ) from error
    for file in loaded.damaged:
        print(f"A checkpoint is damaged and was passed over; it is now called {file}.", file=sys.stderr)
    if loaded.missing:
        print(
            f"metrics.jsonl has lost {loaded.missing} bytes since the checkpoint: the report will lack them.",
            file=sys.stderr,
        )
    if loaded.changes:
        print(f"The configuration was edited: {told(loaded.changes)}.", file=sys.stderr)
    print(f"Going on after step {run.progress.step}.", file=sys.stderr)


def folder_of(config: Config, name: str) -> Path:
    """The folder of a run: as configured, or by name, seed, date and time, and a suffix that no other has."""
    if config.output.folder is not None:
        return Path(config.output.folder).expanduser()
    when = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    return Path("runs", f"{name}-seed{config.train.seed}-{when}")
