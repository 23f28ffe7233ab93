"""A run as plain containers, what a checkpoint says of the run that it belongs to, and whether it fits
another."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from ..history.packing import pack_state, unpack_state
from ..methods import Method, Window
from ..step.problem import Problem
from ..tune.hyperparameter_set import HyperparameterSet

PARTS = (
    "fingerprint",
    "model",
    "modules",
    "optimizer",
    "hyperparameters",
    "bases",
    "hyper_optimizer",
    "window",
    "origin",
    "state",
    "number",
    "rng",
)


def pack_run(problem: Problem, method: Method, window: Window, hyper_optimizer: Optimizer) -> dict[str, Any]:
    """Everything but where the run began and how many steps it took."""
    live, hyperparameters = problem.live, problem.hyperparameters
    return {
        "fingerprint": _fingerprint(problem, method, hyper_optimizer),
        "model": live.model.model.state_dict(),
        "modules": [module.state_dict() for module in hyperparameters.modules],
        "optimizer": live.optimizer.optimizer.state_dict(),
        "hyperparameters": [tuned.leaf.detach().clone() for tuned in hyperparameters.all],
        "bases": [setting.base for setting in hyperparameters.settings],
        "hyper_optimizer": hyper_optimizer.state_dict(),
        "window": window.state_dict(),
        "state": pack_state(live.state()),  # buffers that are not persistent, and dtypes
        "rng": list(live.model.rng()),
    }


def check_run(saved: Any, problem: Problem, method: Method, hyper_optimizer: Optimizer) -> None:
    """Refuses what :func:`unpack_run` would, and changes nothing."""
    _check(saved, _fingerprint(problem, method, hyper_optimizer), problem.hyperparameters)


def unpack_run(saved: Any, problem: Problem, method: Method, hyper_optimizer: Optimizer) -> None:
    """Takes over a saved run, but for its window, its start and the random number generators.

    Raises:
        TypeError: if ``saved`` is no dict.
        ValueError: if it was saved with something else; nothing has changed then.
    """
    check_run(saved, problem, method, hyper_optimizer)
    live, hyperparameters = problem.live, problem.hyperparameters
    live.model.model.load_state_dict(saved["model"])
    for module, state in zip(hyperparameters.modules, saved["modules"]):
        module.load_state_dict(state)
    live.optimizer.optimizer.load_state_dict(saved["optimizer"])
    live.reset(unpack_state(saved["state"], live.optimizer)[0])
    for setting, base in zip(hyperparameters.settings, saved["bases"]):
        setting.base = base
    for tuned, leaf in zip(hyperparameters.all, saved["hyperparameters"]):
        tuned.set_leaf(leaf)
    # A copy: torch's optimizers go on with the very tensors that they are given.
    hyper_optimizer.load_state_dict(copy.deepcopy(saved["hyper_optimizer"]))


def _fingerprint(problem: Problem, method: Method, hyper_optimizer: Optimizer) -> dict[str, Any]:
    """What must be the same where a checkpoint is loaded, as plain containers."""
    model, optimizer = problem.live.model.model, problem.live.optimizer.optimizer
    hyperparameters = problem.hyperparameters
    names = {id(p): name for name, p in model.named_parameters()}
    shapes = {name: list(value.shape) for name, value in hyperparameters.values().items()}
    logs = [tuned.label for tuned in hyperparameters.all if tuned.scale.log]
    return {
        "optimizer": type(optimizer).__name__,
        "method": re.sub(r" object at 0x\w+", "", repr(method)),
        "hyper optimizer": type(hyper_optimizer).__name__,
        "model": {
            n: f"shape {list(v.shape)}" for n, v in model.state_dict().items() if isinstance(v, Tensor)
        },
        "param group": [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups],
        "hyperparameter": {name: f"shape {shape}" for name, shape in shapes.items()},
        "hyperparameter scale": dict.fromkeys(logs, "log=True"),
    }


def _check(saved: Any, own: Mapping[str, Any], hyperparameters: HyperparameterSet) -> None:
    """Refuses what is no checkpoint, or one that does not fit: a part is missing or differs, or values are
    out of bounds here."""
    remedy = (
        "Save with torch.save(hyper.state_dict(), path), and load what torch.load(path, weights_only=True) "
        "returns."
    )
    if not isinstance(saved, dict):
        raise TypeError(
            f"This is no checkpoint of a HyperOptimizer: a dict was expected, got {saved!r}. {remedy}"
        )
    missing = [part for part in PARTS if part not in saved]
    if missing:
        keys = [str(key) for key in saved][:5]
        raise ValueError(
            f"This is no checkpoint of a HyperOptimizer: {missing[0]!r} is missing, and its first keys are "
            f"{keys}. {remedy}"
        )
    for kind, ours in own.items():
        theirs = saved["fingerprint"].get(kind)
        if theirs != ours or (isinstance(ours, dict) and list(theirs) != list(ours)):
            raise ValueError(
                f"The checkpoint was saved with another {kind}: {_difference(theirs, ours)}. Make the "
                "HyperOptimizer as it was made for the saved run, then load. Nothing was changed."
            )
    for tuned, leaf in zip(hyperparameters.all, saved["hyperparameters"]):
        tuned.scale.check(tuned.label, tuned.scale.values(leaf))


def _difference(theirs: Any, ours: Any) -> str:
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return f"{theirs} there, {ours} here"
    for name in (*theirs, *ours):
        if theirs.get(name) != ours.get(name):
            return f"{name!r} has {theirs.get(name, 'none')} there and {ours.get(name, 'none')} here"
    return "the same entries in another order"
