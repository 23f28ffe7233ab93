"""What a checkpoint says of the run that it belongs to, and whether it fits another."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..methods import Method
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


def fingerprint(
    model: nn.Module,
    optimizer: Optimizer,
    method: Method,
    hyperparameters: HyperparameterSet,
    hyper_optimizer: Optimizer,
) -> dict[str, Any]:
    """What must be the same where a checkpoint is loaded, as plain containers."""
    names = {id(p): name for name, p in model.named_parameters()}
    shapes = {name: list(value.shape) for name, value in hyperparameters.values().items()}
    logs = [setting.label for setting in hyperparameters.settings if setting.spec.log]
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


def check_checkpoint(saved: Any, own: Mapping[str, Any], hyperparameters: HyperparameterSet) -> None:
    """Refuses what is no checkpoint, or one that does not fit.

    Raises:
        TypeError: if ``saved`` is no dict.
        ValueError: if a part is missing or differs, with the first difference; or if values are out of bounds
            here.
    """
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
    for setting, leaf in zip(hyperparameters.settings, saved["hyperparameters"]):
        setting.check_values(leaf.exp() if setting.spec.log else leaf, setting.label)


def _difference(theirs: Any, ours: Any) -> str:
    if not isinstance(ours, dict) or not isinstance(theirs, dict):
        return f"{theirs} there, {ours} here"
    for name in (*theirs, *ours):
        if theirs.get(name) != ours.get(name):
            return f"{name!r} has {theirs.get(name, 'none')} there and {ours.get(name, 'none')} here"
    return "the same entries in another order"
