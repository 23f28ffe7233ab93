"""A run from its configuration, or from its folder, to its end."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path

import torch

from .build import build
from .config import Config, ConfigError
from .loop import Run
from .parsing import read_config
from .run_folder import RunFolder
from .stopping import StopRequest, stop_on_signals


def train(config: Config, name: str) -> tuple[Path, int | None]:
    """Trains in a new folder.

    Returns:
        The folder, and the signal that stopped training, None if it is finished.

    Raises:
        ConfigError: before anything is written.
        TrainingError: if training could not go on.
    """
    folder = RunFolder(folder_of(config, name))
    if folder.config_file.exists():
        raise ConfigError(
            f"output.folder={folder.path} holds a run already. Go on with: torch-hypergrad resume "
            f"{folder.path}, or choose another folder."
        )
    with stop_on_signals() as stop:
        finished = run_in(config, folder, stop)
    return folder.path, None if finished else stop.signal


def resume(path: Path) -> tuple[Path, int | None]:
    """Goes on in an existing folder, from the newest checkpoint that is whole; as :func:`train`."""
    folder = RunFolder(path)
    if not folder.config_file.is_file():
        raise ConfigError(
            f"{path} is no folder of a run: it has no "
            f"{folder.config_file.name}. Give the folder that train named."
        )
    if folder.finished:
        print(f"{path} is finished already.")
        return path, None
    with stop_on_signals() as stop:
        finished = run_in(read_config(folder.config_file), folder, stop)
    return path, None if finished else stop.signal


def run_in(config: Config, folder: RunFolder, stop: StopRequest, quiet: bool = False) -> bool:
    """Begins a run in its folder, or goes on with the one that is there, to its end or until it is stopped.

    Returns:
        Whether it is finished.
    """
    folder.check_same(config)
    if folder.finished:
        return True
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    run = Run(config, build(config), folder)
    begun = folder.config_file.exists()
    folder.create(config)
    with folder.locked():
        if begun:
            _go_on(run)
        return run.train(stop, quiet)


def _go_on(run: Run) -> None:
    try:
        damaged = run.load()
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"The checkpoint in {run.folder.path} does not fit its configuration: {reason}"
        ) from error
    for file in damaged:
        print(f"A checkpoint is damaged and was passed over; it is now called {file}.", file=sys.stderr)
    print(f"Going on after step {run.progress.step}.", file=sys.stderr)


def folder_of(config: Config, name: str) -> Path:
    """The folder of a run: as configured, or by name, date and time."""
    if config.output.folder is not None:
        return Path(config.output.folder)
    return Path("runs", f"{name}-{datetime.now():%Y%m%d-%H%M%S}")
