"""The classes that a configuration may name, by section."""

from __future__ import annotations

import inspect
import re

import torch
from jsonargparse import ArgumentParser
from torch import nn
from torch.optim import Optimizer, lr_scheduler

from ..methods import Method
from ..solvers import Solver
from .config import ConfigError
from .networks import NETWORKS
from .options import Known, find, subclasses
from .tasks import Task

BASES: dict[str, type] = {
    "task": Task,
    "model": nn.Module,
    "optimizer": Optimizer,
    "scheduler": lr_scheduler.LRScheduler,
    "method": Method,
    "method.solver": Solver,
    "hyper_optimizer": Optimizer,
}
MODULES = {Optimizer: torch.optim, lr_scheduler.LRScheduler: lr_scheduler}  # of torch's own classes
GIVEN: set[str | int] = {"input_shape", "num_outputs", "params", "optimizer"}
"""By the package, not by a configuration."""


def known(section: str) -> Known:
    """What ``section`` may name without an import path."""
    if section == "model":
        return NETWORKS
    found, module = subclasses(BASES[section]), MODULES.get(BASES[section])
    there = found if module is None else vars(module)
    return {name: there[name] for name in there if name in found and not name.startswith("_")}


def arguments_of(section: str, name: str) -> str:
    """The help of a class that ``section`` may name: its arguments with types, defaults and meanings; of
    none, the names of all.

    Raises:
        ConfigError: no such class.
    """
    if section not in BASES:
        raise ConfigError(f"--{section}.help: {section} names no class. These do: {', '.join(BASES)}.")
    if not name:
        return (
            f"--{section} is one of {', '.join(known(section))}; --{section}.help NAME lists its arguments."
        )
    kind = find({"name": name}, known(section), BASES[section], section)
    usage = f"--{section} {name} [--{section}.ARGUMENT VALUE ...]"
    parser = ArgumentParser(exit_on_error=False, prog="", usage=usage, add_help=False)
    add = parser.add_class_arguments if inspect.isclass(kind) else parser.add_function_arguments
    add(kind, section, skip=GIVEN.intersection(inspect.signature(kind).parameters), fail_untyped=False)
    text = parser.format_help()
    for pattern, plain in MARKUP:
        text = re.sub(pattern, plain, text)
    return text


MARKUP = (
    (r"  --[\w.]+ CONFIG\s+Path to a configuration file\.", ""),
    (r"Unvalidated<(\w+)>", r"\1"),
    (r":\w+:`([^`]*)`", r"\1"),
    (r"``([^`]*)``", r"\1"),
)
