"""The classes that a configuration may name, by section."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from types import ModuleType

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


def _classes(module: ModuleType, base: type) -> dict[str, type]:
    return {
        name: kind
        for name, kind in vars(module).items()
        if isinstance(kind, type) and issubclass(kind, base) and kind is not base and not name.startswith("_")
    }


KNOWN: dict[str, Callable[[], Known]] = {
    "task": lambda: subclasses(Task),
    "model": lambda: NETWORKS,
    "optimizer": lambda: _classes(torch.optim, Optimizer),
    "scheduler": lambda: _classes(lr_scheduler, lr_scheduler.LRScheduler),
    "method": lambda: subclasses(Method),
    "method.solver": lambda: subclasses(Solver),
    "hyper_optimizer": lambda: _classes(torch.optim, Optimizer),
}
"""What may be named without an import path."""
BASES: dict[str, type] = {
    "task": Task,
    "model": nn.Module,
    "optimizer": Optimizer,
    "scheduler": lr_scheduler.LRScheduler,
    "method": Method,
    "method.solver": Solver,
    "hyper_optimizer": Optimizer,
}
GIVEN: set[str | int] = {
    "input_shape",
    "num_outputs",
    "params",
    "optimizer",
}  # by the package, not by a configuration


def arguments_of(section: str, name: str) -> str:
    """The help of a class that ``section`` may name: its arguments with types, defaults and meanings; of
    none, the names of all.

    Raises:
        ConfigError: no such class.
    """
    if section not in KNOWN:
        raise ConfigError(f"--{section}.help: {section} names no class. These do: {', '.join(KNOWN)}.")
    if not name:
        return (
            f"--{section} is one of {', '.join(KNOWN[section]())}; --{section}.help NAME lists its arguments."
        )
    kind = find({"name": name}, KNOWN[section](), BASES[section], section)
    usage = f"--{section} {name} [--{section}.ARGUMENT VALUE ...]"
    parser = ArgumentParser(exit_on_error=False, prog="", usage=usage, add_help=False)
    add = parser.add_class_arguments if inspect.isclass(kind) else parser.add_function_arguments
    taken = GIVEN.intersection(inspect.signature(kind).parameters)
    add(kind, section, skip=taken, fail_untyped=False)
    text = parser.format_help().replace(f"  --{section} CONFIG{NO_FILE}", "")
    for pattern, plain in MARKUP:
        text = re.sub(pattern, plain, text)
    return text


NO_FILE = "\n                        Path to a configuration file."
MARKUP = ((r"Unvalidated<(\w+)>", r"\1"), (r":\w+:`([^`]*)`", r"\1"), (r"``([^`]*)``", r"\1"))
