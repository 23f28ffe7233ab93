"""Hyperparameters as a user writes them down."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from .granularity import GRANULARITIES
from .scale import Scale


@dataclass(frozen=True, eq=False)
class Hyperparameter:
    """An optimizer setting to be tuned, in the param groups of the wrapped optimizer.

    Args:
        name: a key of the param groups, such as ``"lr"`` or ``"weight_decay"``; ``"betas.0"`` is the first
            entry of the tuple ``betas``.
        per: one value for each ``"group"``, each ``"tensor"``, each ``"element"`` (every single weight), each
            ``"label"`` (weights that share a label share a value), or each training ``"step"`` of an episode
            (a learned schedule).
        init: the start. None takes each group's own value; else a number, or a tensor with one entry for each
            value, in the order of the groups and their parameters.
        low: lower bound. None takes the setting's legal range (``weight_decay`` is at least 0; pass
            ``-math.inf`` for none). Values are projected onto the bounds after each hyper step.
        high: upper bound, likewise.
        log: optimize the logarithm of the value; needs a positive start.
        num_steps: the length of an episode, for ``per="step"``.
        groups: the numbers of the param groups to tune it in, such as ``[0]`` where group 1 holds biases
            without decay. None takes all.
        labels: for ``per="label"``: by the name of each parameter of these groups its weights' labels, ints
            from 0 on, as a tensor that broadcasts to the parameter's shape. For a linear layer of 30
            features ``{"weight": torch.arange(30) // 10}`` gives each ten features a value of their own.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``low`` above ``high``, a start that is out of bounds, or not positive on a log scale,
            ``per="step"`` without ``num_steps``, or ``per="label"`` without ``labels``; and when the
            HyperOptimizer is made, labels of other parameters or shapes, or a number that no weight has.
    """

    name: str
    per: Literal["group", "tensor", "element", "label", "step"] = "group"
    init: float | Tensor | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False
    num_steps: int | None = None
    groups: Sequence[int] | None = None
    labels: Mapping[str, Tensor] | None = None

    @staticmethod
    def of(
        tensor: Tensor,
        name: str | None = None,
        *,
        low: float | None = None,
        high: float | None = None,
        log: bool = False,
    ) -> TensorHyperparameter:
        """A leaf tensor that ``train_loss`` reads, with a name, bounds and a scale, for ``tune``. See
        :class:`TensorHyperparameter`."""
        return TensorHyperparameter(tensor, name, low, high, log)

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"Hyperparameter name must be a string such as 'lr', got {self.name!r}.")
        if not isinstance(self.per, str) or self.per not in (*GRANULARITIES, "label"):
            known = ", ".join((*GRANULARITIES, "label"))
            raise ValueError(f"Hyperparameter({self.name!r}): per must be one of {known}, got {self.per!r}.")
        if self.init is not None and not isinstance(self.init, (int, float, Tensor)):
            raise TypeError(
                f"Hyperparameter({self.name!r}): init must be a number, a tensor or None, got {self.init!r}."
            )
        if isinstance(self.init, bool) or (isinstance(self.init, Tensor) and not _is_real(self.init)):
            raise TypeError(f"Hyperparameter({self.name!r}): init must hold real numbers, got {self.init!r}.")
        _check_scale(f"Hyperparameter({self.name!r})", self.low, self.high, self.log)
        if (self.per == "step") != (self.num_steps is not None):
            raise ValueError(
                f"Hyperparameter({self.name!r}): per={self.per!r} with num_steps={self.num_steps}. A "
                "schedule "
                '(per="step") needs the number of training steps of an episode, and only a schedule takes it.'
            )
        if (self.per == "label") != (self.labels is not None):
            raise ValueError(
                f"Hyperparameter({self.name!r}): per={self.per!r} with labels={self.labels!r}. Values per "
                "label need the labels of each parameter's weights, and nothing else takes them."
            )
        if self.labels is not None and not _are_labels(self.labels):
            raise TypeError(
                f"Hyperparameter({self.name!r}): labels must be a dict from names of parameters to tensors "
                f"of ints from 0 on, got {self.labels!r}."
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
            _scale(self.low, self.high, self.log).check(self.name, torch.as_tensor(self.init))


@dataclass(frozen=True, eq=False)
class TensorHyperparameter:
    """A tensor of the training loss to be tuned, with a name, bounds and a scale.

    Args:
        tensor: a floating-point leaf that requires a gradient.
        name: its name in ``values()`` and hypergradients. None takes its place in ``tune``: ``"tensor0"``.
        low: lower bound. Values are projected onto the bounds after each hyper step.
        high: upper bound, likewise.
        log: optimize the logarithm of the values; needs a positive start. The tensor then always holds the
            exponential of what is optimized.

    Raises:
        TypeError: an argument of the wrong type.
        ValueError: ``low`` not below ``high``, or a start that is out of bounds, not finite, or not positive
            on a log scale.
    """

    tensor: Tensor
    name: str | None = None
    low: float | None = None
    high: float | None = None
    log: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.tensor, Tensor):
            raise TypeError(
                f"Hyperparameter.of takes a tensor that the training loss reads, got {self.tensor!r}. A "
                "setting of the optimizer is Hyperparameter('lr') or the like."
            )
        if self.name is not None and not isinstance(self.name, str):
            raise TypeError(f"Hyperparameter.of: name must be a string or None, got {self.name!r}.")
        _check_scale(f"Hyperparameter.of({self.name or 'tensor'!r})", self.low, self.high, self.log)
        self.scale.check(self.name or "tensor", self.tensor.detach())

    @property
    def scale(self) -> Scale:
        """Bounds and scale."""
        return _scale(self.low, self.high, self.log)


def _scale(low: float | None, high: float | None, log: bool) -> Scale:
    return Scale(-math.inf if low is None else low, math.inf if high is None else high, log)


def _check_scale(who: str, low: Any, high: Any, log: Any) -> None:
    for bound, value in (("low", low), ("high", high)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
            raise TypeError(f"{who}: {bound} must be a number or None, got {value!r}.")
        if value is not None and math.isnan(value):
            raise ValueError(f"{who}: {bound} must be a number that can be compared, got nan.")
    if not isinstance(log, bool):
        raise TypeError(f"{who}: log must be True or False, got {log!r}.")
    if low is not None and high is not None and not low < high:
        raise ValueError(f"{who}: low={low} must be below high={high}: no value lies between.")


def _are_labels(labels: Any) -> bool:
    return isinstance(labels, Mapping) and all(
        isinstance(name, str)
        and isinstance(of_one, Tensor)
        and not (of_one.is_floating_point() or of_one.is_complex() or of_one.dtype == torch.bool)
        and not (of_one < 0).any()
        for name, of_one in labels.items()
    )


def _is_real(tensor: Tensor) -> bool:
    return not tensor.is_complex() and tensor.dtype != torch.bool
