"""Optimizers registered with ``higher.register_optim``, as update rules."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .base import RuleState, Settings, UpdateRule


def higher_rule(optimizer: Optimizer) -> UpdateRule | None:
    """The rule that calls ``optimizer``'s counterpart in ``higher``, or None if none is registered.

    Every setting that is a float, or one in a tuple, may be tuned. The rule is as right as the registered
    optimizer. It runs on one parameter at a time and states no stationarity, so it is for unrolled and
    forward mode.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # higher's own deprecations are not the user's concern
        import higher

        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        try:
            counterpart = higher.optim.get_diff_optim(optimizer, parameters)
        except ValueError:
            return None

    def update(param: Tensor, grad: Tensor, state: RuleState, settings: Settings) -> tuple[Tensor, RuleState]:
        counterpart.state = [{0: dict(state)}]
        counterpart.param_groups = [{**settings, "params": [param]}]
        counterpart._update([[grad]])
        new_state = {key: _tensor(key, value) for key, value in counterpart.state[0][0].items()}
        scalars.extend(_scalars(new_state, param, known=scalars))
        return counterpart.param_groups[0]["params"][0], new_state

    counterpart.param_groups, counterpart.state = [], []
    scalars: list[str] = []  # known only when a step has shown them, or a state that is there already
    for p in parameters:
        scalars.extend(_scalars(optimizer.state.get(p, {}), p, known=scalars))
    names = [
        name
        for group in optimizer.param_groups
        for key, value in group.items()
        for name in _floats(key, value)
    ]
    return UpdateRule(update, dict.fromkeys(names, (-math.inf, math.inf)), elementwise=False, scalars=scalars)


def _floats(key: str, value: Any) -> list[str]:
    """The names of the floats in a setting, as ``Hyperparameter`` takes them."""
    if isinstance(value, tuple):
        return [f"{key}.{i}" for i, entry in enumerate(value) if isinstance(entry, float)]
    return [key] if isinstance(value, float) else []


def _tensor(key: str, value: Any) -> Any:
    """A number in a state as a tensor; ``"step"`` stays what it is."""
    is_number = isinstance(value, (bool, int, float)) and key != "step"
    return (
        torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None) if is_number else value
    )


def _scalars(state: Mapping[str, Any], param: Tensor, known: Sequence[str]) -> list[str]:
    """The names in a state that are one number for the parameter, but for the known ones."""
    numbers = [k for k, v in state.items() if isinstance(v, Tensor) and v.ndim == 0 and k != "step"]
    return [name for name in numbers if name not in known and param.ndim > 0]
