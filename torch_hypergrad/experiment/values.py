"""Tuned values in files: YAML where they are few, safetensors for any number."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file, save
from torch import Tensor

from .config import ConfigError
from .messages import one_line

FEW = 100
"""Numbers that are written as YAML, too."""


def as_files(values: Mapping[str, Tensor]) -> dict[str, bytes]:
    """The contents of ``values.safetensors``, and of ``values.yaml`` where there are few numbers."""
    files = {
        "values.safetensors": save(
            {name: value.detach().cpu().contiguous() for name, value in values.items()}
        )
    }
    if sum(value.numel() for value in values.values()) <= FEW:
        numbers = {name: value.tolist() for name, value in values.items()}
        files["values.yaml"] = yaml.safe_dump(numbers, sort_keys=False).encode()
    return files


def read_values(path: Path | str) -> dict[str, Tensor]:
    """Values by name, from ``values.yaml``, ``values.safetensors``, ``tuned.pt``, or the folder of a run.

    Raises:
        ConfigError: one line, for a file that is missing or holds something else.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        file = file / "values.safetensors"
    if not file.is_file():
        raise ConfigError(
            f"{file} is no file of tuned values. Expected values.yaml or values.safetensors of a run, or its "
            "folder."
        )
    try:
        found = _READERS[file.suffix](file)
    except Exception as error:  # damaged files fail in many ways
        known = ", ".join(_READERS)
        reason = f"its ending is none of {known}" if file.suffix not in _READERS else one_line(error)
        raise ConfigError(f"{file} holds no tuned values: {reason}.") from error
    if not found:
        raise ConfigError(f"{file} is of a run that tuned nothing.")
    return found


def _from_yaml(file: Path) -> dict[str, Tensor]:
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    return {str(name): torch.tensor(value, dtype=torch.float64) for name, value in content.items()}


def _from_pt(file: Path) -> dict[str, Tensor]:
    return torch.load(file, map_location="cpu", weights_only=True)["values"]


_READERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    ".yaml": _from_yaml,
    ".yml": _from_yaml,
    ".safetensors": load_file,
    ".pt": _from_pt,
}
