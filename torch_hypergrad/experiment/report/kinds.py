"""Puts tuned values together: by the setting that they belong to, and many tensors by their kind."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ..config import setting_of
from .read import RecordedRun, part_of

MAX_PANELS = 12
_BY_DIMENSIONS = {
    2: "weights of linear layers",
    3: "weights of 1-d convolutions",
    4: "weights of convolutions",
}


def by_setting(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of each entry of the section tune."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(setting_of(name), []).append(name)
    return found


def by_kind(run: RecordedRun, names: Iterable[str]) -> dict[str, list[str]]:
    """The names of tensors by what they do in a network, in the order of the first of each."""
    shapes = run.tuned.get("model", {})
    found: dict[str, list[str]] = {}
    for name in names:
        part = part_of(name)
        found.setdefault(_kind(part, shapes.get(part)), []).append(name)
    return found


def _kind(part: str, shape: Any) -> str:
    last = part.rpartition(".")[2]
    if last == "bias":
        return "biases"
    if shape is None:
        return {"weight": "weights"}.get(last, last)
    return _BY_DIMENSIONS.get(len(shape), "scales of normalization" if last == "weight" else last)


def grouped(run: RecordedRun, names: list[str]) -> dict[str, list[str]]:
    """Titles of panels, and the names that each shows: one each, or a kind where they are too many."""
    if len(names) <= MAX_PANELS:
        several = len(by_setting(names)) > 1
        whole = several or all(part_of(name).startswith("group") for name in names)
        return {name if whole else part_of(name): [name] for name in names}
    groups = {}
    settings = by_setting(names)
    for setting, members in settings.items():
        for kind, parts in by_kind(run, members).items():
            groups[f"{kind}, {setting}" if len(settings) > 1 else kind] = parts
    return dict(list(groups.items())[:MAX_PANELS])


def left_out(names: list[str], groups: Mapping[str, list[str]]) -> str:
    """Says how many tensors have no panel."""
    missing = len(names) - sum(map(len, groups.values()))
    return f" {missing} further ones are in the table." if missing else ""
