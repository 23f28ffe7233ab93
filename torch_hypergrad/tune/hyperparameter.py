"""Hyperparameters as a user writes them down."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .granularity import GRANULARITIES


@dataclass(frozen=True, eq=False)
class Hyperparameter:
    """An optimizer setting to be tuned, in the param groups of the wrapped optimizer.

    Args:
        name: a key of the param groups, such as ``"lr"`` or ``"weight_decay"``; ``"betas.0"`` is the first
            entry of the tuple ``betas``.
        per: one value for each ``"group"``, each ``"tensor"``, each ``"element"`` (every single weight), or
            each training ``"step"`` of an episode (a learned schedule).
        init: the start. None takes each group's own value; else a number, or a tensor with one entry for each
            value, in the order of the groups and their parameters.
        low: lower bound. None takes the setting's legal range (``weight_decay`` is at least 0; pass
            ``-math.inf`` for none). Values are projected onto the bounds after each hyper step.
        high: upper bound, likewise.
        log: optimize the logarithm of the value; needs a positive start.
        num_steps: the length of an episode, for ``per="step"``.
        groups: the numbers of the param groups to tune it in, such as ``[0]`` where group 1 holds biases
            without decay. None takes all.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``low`` above ``high``, a start that is out of bounds, or not positive on a log scale, or
            ``per="step"`` without ``num_steps``.
    """

    name: str
    per: Literal["group", "tensor", "element", "step"] = "group"
    init: float | Tensor | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False
    num_steps: int | None = None
    groups: Sequence[int] | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"Hyperparameter name must be a string such as 'lr', got {self.name!r}.")
        if not isinstance(self.per, str) or self.per not in GRANULARITIES:
            known = ", ".join(GRANULARITIES)
            raise ValueError(f"Hyperparameter({self.name!r}): per must be one of {known}, got {self.per!r}.")
        if self.init is not None and not isinstance(self.init, (int, float, Tensor)):
            raise TypeError(
                f"Hyperparameter({self.name!r}): init must be a number, a tensor or None, got {self.init!r}."
            )
        if isinstance(self.init, bool) or (isinstance(self.init, Tensor) and not _is_real(self.init)):
            raise TypeError(f"Hyperparameter({self.name!r}): init must hold real numbers, got {self.init!r}.")
        for bound in ("low", "high"):
            value = getattr(self, bound)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise TypeError(
                    f"Hyperparameter({self.name!r}): {bound} must be a number or None, got {value!r}."
                )
            if value is not None and math.isnan(value):
                raise ValueError(
                    f"Hyperparameter({self.name!r}): {bound} must be a number that can be compared, got nan."
                )
        if not isinstance(self.log, bool):
            raise TypeError(f"Hyperparameter({self.name!r}): log must be True or False, got {self.log!r}.")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(
                f"Hyperparameter({self.name!r}): low={self.low} must be below high={self.high}: no value "
                "lies between."
            )
        if GRANULARITIES[self.per].is_per_step != (self.num_steps is not None):
            raise ValueError(
                f"Hyperparameter({self.name!r}): per={self.per!r} with num_steps={self.num_steps}. A "
                "schedule "
                '(per="step") needs the number of training steps of an episode, and only a schedule takes it.'
            )
        if self.num_steps is not None and (
            isinstance(self.num_steps, bool) or not isinstance(self.num_steps, int)
        ):
            raise TypeError(
                f"Hyperparameter({self.name!r}): num_steps must be an int, got {self.num_steps!r}."
            )
        if self.num_steps is not None and self.num_steps < 1:
            raise ValueError(
                f"Hyperparameter({self.name!r}): num_steps must be positive, got {self.num_steps}."
            )
        numbers = self.groups
        if numbers is not None and not (
            isinstance(numbers, (list, tuple, range)) and all(type(i) is int for i in numbers)
        ):
            raise TypeError(
                f"Hyperparameter({self.name!r}): groups must be a list of numbers of param groups or None, "
                f"got {numbers!r}."
            )
        if self.init is not None:
            check_start(self.name, torch.as_tensor(self.init), self.low, self.high, self.log)


def _is_real(tensor: Tensor) -> bool:
    return not tensor.is_complex() and tensor.dtype != torch.bool


def check_start(name: str, start: Tensor, low: float | None, high: float | None, log: bool) -> None:
    """Refuses values that are not finite, not positive on a log scale, or out of bounds."""
    if not start.isfinite().all():
        raise ValueError(f"Hyperparameter {name!r}: values must be finite, got {in_brief(start)}.")
    if log and (start <= 0).any():
        raise ValueError(
            f"Hyperparameter {name!r}: log=True with a value of {in_brief(start.min())}. The logarithm needs "
            "a positive start: pass init=1e-5 or the like, or log=False, which may start at 0."
        )
    if (low is not None and (start < low).any()) or (high is not None and (start > high).any()):
        raise ValueError(
            f"Hyperparameter {name!r}: the value {in_brief(start)} is out of the bounds [{low}, {high}]. "
            "Pass init inside them, or other bounds as low and high: without these, a setting's legal range "
            "bounds it."
        )


def in_brief(values: Tensor) -> str:
    """One number, or from where to where many go."""
    if values.numel() == 1:
        return f"{values.item():g}"
    return f"{values.min().item():g} to {values.max().item():g}"
