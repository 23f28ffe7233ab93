"""Configurations in the spelling of version 0.1, read as today's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import NAMED, Named

METHODS = {"implicit": "Implicit", "unrolled": "Unrolled", "forward": "ForwardMode"}
SOLVERS = {
    "neumann": ("Neumann", ("num_terms", "scale", "damping")),
    "cg": ("CG", ("max_steps", "rtol", "damping")),
    "nystrom": ("Nystrom", ("rank", "max_steps", "rtol", "damping")),
    "cholesky": ("Cholesky", ("damping",)),
    "identity": ("Identity", ("scale",)),
}
NETWORKS = {"linear": "Linear", "mlp": "MLP", "cnn": "CNN", "resnet18": "ResNet18"}
DEFAULTS = {"optimizer": "SGD", "hyper_optimizer": "Adam", "model": "mlp"}


def is_old(content: Mapping[str, Any]) -> bool:
    """Whether any section is spelled as it was."""
    others = _is_old_compare(content.get("compare")) or _is_old_output(content.get("output"))
    return others or "data" in content or any(_is_old_section(content.get(name)) for name in NAMED)


def today(content: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration in today's spelling, whichever it has."""
    return modern(content) if is_old(content) else dict(content)


def modern(content: Mapping[str, Any]) -> dict[str, Any]:
    """The same configuration in today's spelling; what is unknown stays, to be refused under its name.

    >>> modern({"data": {"name": "mnist"}, "method": {"name": "implicit", "num_terms": 5}})["method"]
    {'name': 'Implicit', 'solver': {'name': 'Neumann', 'num_terms': 5}}
    """
    new = dict(content)
    train = dict(new["train"]) if isinstance(new.get("train"), Mapping) else {}
    if isinstance(content.get("data"), Mapping) and "task" not in content:
        data = dict(new.pop("data"))
        if (part := data.pop("train_on", None)) is not None:
            train["part"] = part
        data = {"data" if key == "name" else key: value for key, value in data.items() if value is not None}
        new["task"] = {"name": "ImageClassification", **data}
    for section, default in DEFAULTS.items():
        if _is_old_section(new.get(section)):
            new[section] = _with_options(new[section], default)
    if _is_old_section(new.get("scheduler")):
        scheduler = dict(new["scheduler"])
        train["scheduler_every"] = scheduler.pop("every", "step")
        new["scheduler"] = _with_options(scheduler, None) if scheduler.get("name") else None
    if _is_old_section(new.get("method")):
        new["method"] = _method(new["method"])
    if _is_old_output(new.get("output")):
        output = dict(new["output"])
        loggers = ["tensorboard"] if output.pop("tensorboard") else []
        new["output"] = {"loggers": loggers, **output}
    if _is_old_compare(new.get("compare")):
        new["compare"] = _compare(new["compare"])
    return new | ({"train": train} if isinstance(new.get("train", {}), Mapping) and train else {})


def _is_old_section(section: Any) -> bool:
    if not isinstance(section, Mapping):
        return False
    name = section.get("name", "")
    old_name = isinstance(name, str) and name in {*METHODS, *NETWORKS, "none"}
    return old_name or "options" in section or "module" in section or isinstance(section.get("solver"), str)


def _with_options(section: Mapping[str, Any], default: str | None) -> Named:
    name = section.get("module") or section.get("name", default)
    others = {key: value for key, value in section.items() if key not in ("name", "module")}
    if isinstance(others.get("options"), (Mapping, type(None))):
        others |= others.pop("options", None) or {}
    return {"name": NETWORKS.get(str(name), name), **others}


OLD_COMPARE = {"setting": "weight_decay", "low": 1e-5, "high": 1e-1, "log": True, "grid_size": 5}


def _is_old_output(section: Any) -> bool:
    return isinstance(section, Mapping) and isinstance(section.get("tensorboard"), bool)


def _is_old_compare(section: Any) -> bool:
    return isinstance(section, Mapping) and any(key in section for key in OLD_COMPARE)


def _compare(section: Mapping[str, Any]) -> dict[str, Any]:
    others = {key: value for key, value in section.items() if key not in OLD_COMPARE}
    old = {**OLD_COMPARE, **section}
    values = {"type": "float", **{key: old[key] for key in ("low", "high", "log")}}
    return {**others, "space": {f"optimizer.{old['setting']}": values}, "grid_points": old["grid_size"]}


def _method(section: Mapping[str, Any]) -> Named | None:
    given = {key: value for key, value in section.items() if value is not None}
    name = given.pop("name", "implicit")
    if name == "none":
        return None
    if name != "implicit":
        return {"name": METHODS.get(name, name), **given}
    kind, takes = SOLVERS.get(given.pop("solver", "neumann"), ("Neumann", ()))
    solver = {key: given.pop(key) for key in takes if key in given}
    return {"name": "Implicit", "solver": {"name": kind, **solver}, **given}
