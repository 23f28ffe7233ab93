"""Optimizers registered with ``higher.register_optim``, as update rules."""

from __future__ import annotations

import math
import warnings

from torch import Tensor
from torch.optim import Optimizer

from .base import Settings, State, UpdateRule


def higher_rule(optimizer: Optimizer) -> UpdateRule | None:
    """The rule that calls ``optimizer``'s counterpart in ``higher``, or None if none is registered.

    Every setting that is a float may be tuned. The rule is as right as the registered optimizer. It runs on one
    parameter at a time and states no stationarity, so it is for unrolled and forward mode.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # higher's own deprecations are not the user's concern
        import higher

        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        try:
            counterpart = higher.optim.get_diff_optim(optimizer, parameters)
        except ValueError:
            return None

    def update(param: Tensor, grad: Tensor, state: State, settings: Settings) -> tuple[Tensor, State]:
        counterpart.state = [{0: dict(state)}]
        counterpart.param_groups = [{**settings, "params": [param]}]
        counterpart._update([[grad]])
        return counterpart.param_groups[0]["params"][0], counterpart.state[0][0]

    counterpart.param_groups, counterpart.state = [], []
    tunable = {
        name: (-math.inf, math.inf)
        for group in optimizer.param_groups
        for name, value in group.items()
        if isinstance(value, float)
    }
    return UpdateRule(update, tunable, elementwise=False)
