"""Configurations in the spelling of version 0.1, read as today's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .config import NAMED, ConfigError

METHODS = {"implicit": "Implicit", "unrolled": "Unrolled", "forward": "ForwardMode", "none": "none"}
SOLVERS = {each.lower(): each for each in ("Neumann", "CG", "Nystrom", "Cholesky", "Identity")}
NETWORKS = {each.lower(): each for each in ("Linear", "MLP", "CNN", "ResNet18")}
OF_IMPLICIT = ("num_batches", "curvature", "preconditioner", "second_order")  # other keys were its solver's
DEFAULTS = {"optimizer": "SGD", "hyper_optimizer": "Adam", "model": "mlp", "scheduler": None}
COMPARE = {"setting": "weight_decay", "low": 1e-5, "high": 1e-1, "log": True, "grid_size": 5}


def is_old(content: Mapping[str, Any]) -> bool:
    """Whether any section is spelled as it was."""
    return today(content) != content


def today(content: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration in today's spelling, whichever it has; what is unknown stays, to be refused under its
    name.

    >>> today({"data": {"name": "mnist"}, "method": {"name": "implicit", "num_terms": 5}})["method"]
    {'name': 'Implicit', 'solver': {'name': 'Neumann', 'num_terms': 5}}
    """
    new = {name: dict(keys) if isinstance(keys, Mapping) else keys for name, keys in content.items()}
    sections = {name: keys for name, keys in new.items() if isinstance(keys, dict)}
    train: dict[str, Any] = {}  # what has moved there
    if "data" in sections and "task" not in new:
        data = {"data" if key == "name" else key: value for key, value in new.pop("data").items()}
        train["part"] = data.pop("train_on", None)
        given = {key: value for key, value in data.items() if value is not None}
        new["task"] = {"name": "ImageClassification", **given}
    if "options" in sections.get("scheduler", ()):
        train["scheduler_every"] = sections["scheduler"].pop("every", None)
    for name in sections.keys() & DEFAULTS.keys():
        new[name] = _class(sections[name], DEFAULTS[name])
    if "method" in sections:
        new["method"] = _method(sections["method"])
    if isinstance(sections.get("output", {}).get("tensorboard"), bool):
        new["output"]["loggers"] = ["tensorboard"] if new["output"].pop("tensorboard") else []
    if sections.get("compare", {}).keys() & COMPARE.keys():
        new["compare"] = _compare(sections["compare"])
    train = {key: value for key, value in train.items() if value is not None}
    moves = train and ("train" in sections or "train" not in new)
    return new | ({"train": {**sections.get("train", {}), **train}} if moves else {})


def check_flag(path: Sequence[str]) -> None:
    """Refuses a flag of version 0.1 with today's.

    Raises:
        ConfigError: one line.
    """
    new = ["task", *path[1:]] if path[0] == "data" else list(path)
    if path[0] in NAMED and path[1:2] == ["options"]:
        new = [path[0], *path[2:]]
    if path == ["data", "name"]:
        new = ["task", "data"]
    if new != list(path):
        raise ConfigError(f"--{'.'.join(path)} is now --{'.'.join(new)}.")


def _class(keys: dict[str, Any], default: str | None) -> dict[str, Any] | None:
    if not {"module", "options"} & keys.keys() and str(keys.get("name")) not in NETWORKS:
        return keys
    name = keys.get("module") or keys.get("name", default)
    others = {key: value for key, value in keys.items() if key not in ("name", "module")}
    if isinstance(others.get("options"), (Mapping, type(None))):
        others |= others.pop("options", None) or {}
    return {"name": NETWORKS.get(str(name), name), **others} if name is not None else None


def _compare(keys: dict[str, Any]) -> dict[str, Any]:
    others = {key: value for key, value in keys.items() if key not in COMPARE}
    old = {**COMPARE, **keys}
    values = {"type": "float", **{key: old[key] for key in ("low", "high", "log")}}
    return {**others, "space": {f"optimizer.{old['setting']}": values}, "grid_points": old["grid_size"]}


def _method(keys: dict[str, Any]) -> dict[str, Any] | None:
    if str(keys.get("name")) not in METHODS and str(keys.get("solver")) not in SOLVERS:
        return keys
    given = {key: value for key, value in keys.items() if value is not None}
    name = given.pop("name", "implicit")
    name = METHODS.get(str(name), name)
    if name == "Implicit":
        solver = {key: given.pop(key) for key in list(given) if key not in OF_IMPLICIT}
        named = solver.pop("solver", "neumann")
        given["solver"] = {"name": SOLVERS.get(str(named), named), **solver}
    return None if name == "none" else {"name": name, **given}
