"""What may change in the configuration of a run that has begun."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import ConfigError

Change = tuple[Any, Any]

FREE = ("output.", "compare.", "space", "train.threads")  # what is written, and how fast
NOTHING = "nothing"


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Change]:
    """Keys whose values are not the same, by path.

    >>> differences({"train": {"seed": 0}, "tune": {}}, {"train": {"seed": 1}, "tune": {}})
    {'train.seed': (0, 1)}
    """
    one, other = _flat(before), _flat(after)
    paths = dict.fromkeys([*one, *other])
    pairs = {path: (one.get(path, NOTHING), other.get(path, NOTHING)) for path in paths}
    return {path: pair for path, pair in pairs.items() if pair[0] != pair[1]}


def check_edits(before: Mapping[str, Any], after: Mapping[str, Any], where: str) -> dict[str, Change]:
    """The changes of a configuration with which a run may go on: what it writes, and a later end.

    Raises:
        ConfigError: with what has changed that may not.
    """
    changes = differences(before, after)
    refused = {path: pair for path, pair in changes.items() if not _may_change(path, pair, after)}
    if refused:
        raise ConfigError(
            f"{where} was edited after the run had begun: {told(refused)}. Undo it, or train in a new "
            "folder. What a run writes (output) may change, and train.steps, epochs and episodes may grow."
        )
    return changes


def told(changes: Mapping[str, Change]) -> str:
    """``optimizer.lr was 0.1, is 0.2``, and so on."""
    return "; ".join(f"{path} was {before}, is {after}" for path, (before, after) in changes.items())


def _may_change(path: str, pair: Change, after: Mapping[str, Any]) -> bool:
    if path.startswith(FREE):
        return True
    one_episode = path == "train.episodes" or after["train"]["episodes"] == 1
    later_end = path in ("train.steps", "train.epochs", "train.episodes") and one_episode
    return later_end and all(type(number) is int for number in pair) and pair[0] < pair[1]


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found
