"""What an update rule is, the arithmetic that rules are written in, and the registry."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..device import readings
from ..ground.vectors import dot

RuleState: TypeAlias = dict[str, Any]
"""What the rule keeps for its parameters, under torch's own names: tensors, and ``"step"`` as an int."""

Settings: TypeAlias = Mapping[str, Any]
"""A param group's settings under torch's own names; the tuned ones are tensors (0-dim, or of the param's
shape)."""

UpdateFunction: TypeAlias = Callable[[Tensor, Tensor, RuleState, Settings], tuple[Tensor, RuleState]]
StationarityFunction: TypeAlias = Callable[[Tensor, Tensor, RuleState, Settings], Tensor]
PreconditionerFunction: TypeAlias = Callable[[RuleState, Settings], Tensor]


@dataclass(frozen=True)
class Pulled:
    """Adjoints of what an update rule reads, None or missing where zero: of ``param``, ``grad``, the entries
    of ``state``, and the tuned settings by their names, in the shapes of these."""

    param: Tensor
    grad: Tensor | None
    state: Mapping[str, Tensor]
    settings: Mapping[str, Tensor]


PullFunction: TypeAlias = Callable[
    [Tensor, Tensor, RuleState, Settings, Tensor, Mapping[str, Tensor]], Pulled | None
]
ReadsFunction: TypeAlias = Callable[[Settings], Collection[str] | None]


@dataclass(frozen=True)
class UpdateRule:
    """One optimizer's step as a pure function, and what may be tuned in it.

    Args:
        update: ``update(param, grad, state, settings) -> (param, state)``, out of place, in differentiable
            tensor arithmetic. ``state`` is empty at a parameter's first step.
        tunable: the continuous settings, each with its legal range ``(low, high)``; ``"betas.0"`` is the
            first entry of the tuple ``betas``.
        stationarity: ``stationarity(param, grad, state, settings) -> F``, which is zero at the training
            optimum; its Jacobian in ``param`` is symmetric when that of ``grad`` is. None if the optimizer
            has no such form.
        moves_optimum: the tunable settings that ``stationarity`` depends on.
        elementwise: whether each entry is updated from the same entry of param, grad and state alone, and the
            stationarity likewise. Such rules run on all parameters of a group as one flat vector; others run
            on one parameter at a time.
        scalars: names in ``state`` that are one number for each parameter.
        whole: tunable settings that act on a parameter as a whole, and so have no value per element.
        pull: ``pull(param, grad, state, settings, adj_param, adj_state) -> Pulled``, the vector-Jacobian
            product of ``update`` written out: from the adjoints of what ``update`` returns to those of what
            it reads. It may return None for settings that it does not cover. None leaves all to autograd,
            which takes about twice as many passes over memory.
        pull_reads: ``pull_reads(settings) -> names``, whose values ``pull`` reads for these settings, of
            ``"grad"`` and the entries of ``state``: the others need not be kept of a step. Depends on which
            settings are tuned (tensors), and on the values of the others. None, the result too, stands for
            all.
        preconditioner: ``preconditioner(state, settings) -> D``, the positive diagonal that the rule divides
            its steps by, such as ``sqrt(v) + eps``, from a state after a step; only its proportions matter.
            None if it has none.
    """

    update: UpdateFunction
    tunable: Mapping[str, tuple[float, float]]
    stationarity: StationarityFunction | None = None
    moves_optimum: Sequence[str] = ()
    elementwise: bool = True
    scalars: Sequence[str] = ()
    whole: Sequence[str] = ()
    pull: PullFunction | None = None
    pull_reads: ReadsFunction | None = None
    preconditioner: PreconditionerFunction | None = None


_RULES: dict[type[Optimizer], UpdateRule] = {}


def register_update(
    optimizer_type: type[Optimizer],
    tunable: Mapping[str, tuple[float, float]],
    *,
    stationarity: StationarityFunction | None = None,
    moves_optimum: Sequence[str] = (),
    elementwise: bool = True,
    scalars: Sequence[str] = (),
    whole: Sequence[str] = (),
    pull: PullFunction | None = None,
    pull_reads: ReadsFunction | None = None,
    preconditioner: PreconditionerFunction | None = None,
) -> Callable[[UpdateFunction], UpdateFunction]:
    """Registers the decorated function as the update rule of ``optimizer_type``.

    The arguments are those of :class:`UpdateRule`. A rule registered again replaces the earlier one.

    Example:
        >>> class PlainSGD(torch.optim.Optimizer):
        ...     def __init__(self, params, lr):
        ...         super().__init__(params, {"lr": lr})
        >>> @register_update(PlainSGD, {"lr": (0.0, math.inf)})
        ... def plain_sgd(param, grad, state, settings):
        ...     return param - settings["lr"] * grad, state
    """

    def register(update: UpdateFunction) -> UpdateFunction:
        _RULES[optimizer_type] = UpdateRule(
            update,
            dict(tunable),
            stationarity,
            tuple(moves_optimum),
            elementwise,
            tuple(scalars),
            tuple(whole),
            pull,
            pull_reads,
            preconditioner,
        )
        return update

    return register


def registered_rule(optimizer: Optimizer) -> UpdateRule | None:
    """The rule of the optimizer's class, or of the base class whose ``step`` it inherits unchanged."""
    # torch wraps the step of a class when its first instance is made.
    own = inspect.unwrap(type(optimizer).step)
    for base in type(optimizer).__mro__:
        if base in _RULES and inspect.unwrap(base.step) is own:
            return _RULES[base]
    return None


def registered_types() -> list[type[Optimizer]]:
    """The optimizer classes that have a rule."""
    return list(_RULES)


POSITIVE = (0.0, math.inf)
FRACTION = (0.0, 1.0 - 1e-6)
"""Range of decay rates such as ``betas``: at 1 the bias correction divides by zero."""


def is_on(setting: float | Tensor) -> bool:
    """Whether a term with this factor is computed: torch leaves it out at 0, a tuned one has a derivative
    there."""
    return isinstance(setting, Tensor) or setting != 0


# A tuned setting is a tensor and an untuned one a number. With numbers these functions call the very
# operations of torch.optim, so that training is bitwise the same; with tensors the same formulas, which can
# be differentiated, in as few passes over memory: vectors are long, and each pass costs as much as several
# multiplications.


def add_scaled(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """``x + scale * y``."""
    return torch.addcmul(x, y, scale) if isinstance(scale, Tensor) else torch.add(x, y, alpha=scale)


def add_scaled_(x: Tensor, y: Tensor, scale: float | Tensor) -> Tensor:
    """The same, in place, for an ``x`` that nobody else has."""
    return x.addcmul_(y, scale) if isinstance(scale, Tensor) else x.add_(y, alpha=scale)


def addcmul(x: Tensor, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """``x + scale * a * b``."""
    return (
        torch.addcmul(x, a * b, scale) if isinstance(scale, Tensor) else torch.addcmul(x, a, b, value=scale)
    )


def addcdiv(x: Tensor, a: Tensor, b: Tensor, scale: float | Tensor) -> Tensor:
    """``x + scale * a / b``."""
    return (
        torch.addcmul(x, a / b, scale) if isinstance(scale, Tensor) else torch.addcdiv(x, a, b, value=scale)
    )


def lerp(x: Tensor, y: Tensor, weight: float | Tensor) -> Tensor:
    """``x + weight * (y - x)``."""
    return torch.lerp(x, y, weight.to(x.dtype) if isinstance(weight, Tensor) else weight)


def adjoint_of(setting: float | Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The adjoint of a setting that enters each entry by the product of ``a`` and ``b``: summed up, if it is
    one number."""
    return dot(a, b) if not isinstance(setting, Tensor) or setting.ndim == 0 else a * b


def beside(setting: float | Tensor, like: Tensor) -> Tensor:
    """The setting as a tensor with the dtype and on the device of ``like``. Filled in there: what is brought
    there has to be waited for."""
    return (
        setting.to(like)
        if isinstance(setting, Tensor)
        else torch.full((), setting, dtype=like.dtype, device=like.device)
    )


def signed(grad: Tensor, settings: Settings) -> Tensor:
    """The gradient of what is minimized."""
    return -grad if settings["maximize"] else grad


def decayed(grad: Tensor, param: Tensor, settings: Settings) -> Tensor:
    """The gradient of what is minimized, with the weight decay that is added to it (L2)."""
    grad = signed(grad, settings)
    weight_decay = settings["weight_decay"]
    return add_scaled(grad, param, weight_decay) if is_on(weight_decay) else grad


def l2_stationarity(param: Tensor, grad: Tensor, state: RuleState, settings: Settings) -> Tensor:
    """``F = g + weight_decay * param``: for every rule whose decay is added to the gradient."""
    return decayed(grad, param, settings)


def scalar_dtype() -> torch.dtype:
    """The dtype in which torch.optim keeps numbers such as ``step``."""
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def scalar_tensor(value: float | Tensor, like: Tensor | None = None) -> Tensor:
    """``value`` as torch.optim keeps it: rounded to :func:`scalar_dtype`, on the device of ``like`` or the
    CPU."""
    device = torch.device("cpu") if like is None else like.device
    if isinstance(value, Tensor):
        return value.to(scalar_dtype())
    return torch.full((), value, dtype=scalar_dtype(), device=device)


def scalar_value(value: Tensor, param: Tensor) -> float | Tensor:
    """A number where that costs no synchronization and loses no derivative, else a tensor in which ``param``
    keeps its dtype: float64 for one number, and ``param``'s own dtype for one number for each entry."""
    if value.ndim == 0 and readings.at_once(value) and not value.requires_grad:
        return value.item()
    return value.double() if value.ndim == 0 else value.to(param.dtype)
