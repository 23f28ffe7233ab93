"""Hyperparameters: their granularity, bounds and names, and their values laid out for the update rules."""

from __future__ import annotations

import difflib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from .buckets import Bucket
from .updates import UpdateRule
from .vectors import Layout


@dataclass(frozen=True, eq=False)
class Hyperparameter:
    """An optimizer setting to be tuned, in every param group of the wrapped optimizer.

    Args:
        name: a key of the param groups, such as ``"lr"`` or ``"weight_decay"``; ``"betas.0"`` is the first entry of
            the tuple ``betas``.
        per: one value for each ``"group"``, each ``"tensor"``, each ``"element"`` (every single weight), or each
            training ``"step"`` of an episode (a learned schedule).
        init: the start. None takes each group's own value; else a number, or a tensor with one entry for each value,
            in the order of the groups and their parameters.
        low: lower bound. None takes the setting's legal range (``weight_decay`` is at least 0; pass ``-math.inf``
            for none). Values are projected onto the bounds after each hyper step.
        high: upper bound, likewise.
        log: optimize the logarithm of the value; needs a positive start.
        num_steps: the length of an episode, for ``per="step"``.

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

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise TypeError(f"Hyperparameter name must be a string such as 'lr', got {self.name!r}.")
        if self.per not in _GRANULARITIES:
            known = ", ".join(_GRANULARITIES)
            raise ValueError(f"Hyperparameter({self.name!r}): per must be one of {known}, got {self.per!r}.")
        if self.init is not None and not isinstance(self.init, (int, float, Tensor)):
            raise TypeError(f"Hyperparameter({self.name!r}): init must be a number, a tensor or None, got {self.init!r}.")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ValueError(
                f"Hyperparameter({self.name!r}): low={self.low} must be below high={self.high}: no value lies between."
            )
        if (self.per == "step") != (self.num_steps is not None):
            raise ValueError(
                f"Hyperparameter({self.name!r}): per={self.per!r} with num_steps={self.num_steps}. A schedule "
                '(per="step") needs the number of training steps of an episode, and only a schedule takes it.'
            )
        if self.num_steps is not None and (not isinstance(self.num_steps, int) or self.num_steps < 1):
            raise ValueError(f"Hyperparameter({self.name!r}): num_steps must be a positive int, got {self.num_steps!r}.")
        if self.init is not None:
            _check_start(self.name, torch.as_tensor(self.init), self.low, self.high, self.log)


def _check_start(name: str, start: Tensor, low: float | None, high: float | None, log: bool) -> None:
    if not start.isfinite().all():
        raise ValueError(f"Hyperparameter({name!r}): the start must be finite, got {_in_brief(start)}.")
    if log and (start <= 0).any():
        raise ValueError(
            f"Hyperparameter({name!r}): log=True with a start of {_in_brief(start.min())}. The logarithm needs a positive "
            "start: pass init=1e-5 or the like, or log=False, which may start at 0."
        )
    if (low is not None and (start < low).any()) or (high is not None and (start > high).any()):
        raise ValueError(
            f"Hyperparameter({name!r}): the start {_in_brief(start)} is out of the bounds [{low}, {high}]. "
            "Pass init inside them, or other bounds as low and high."
        )


def _in_brief(values: Tensor) -> str:
    if values.numel() == 1:
        return f"{values.item():g}"
    return f"{values.min().item():g} to {values.max().item():g}"


class Granularity(ABC):
    """How the values of one setting are laid out over the parameters of a group. Adjoints of values are summed up
    in the layout of the rules, and reduced to one for each value at the end."""

    @abstractmethod
    def count(self, layout: Layout, num_steps: int | None) -> tuple[int, ...]:
        """Shape of the values."""

    @abstractmethod
    def lay_out(self, values: Tensor, layout: Layout, bucket: Bucket, step: int) -> Tensor:
        """What the rule gets for ``bucket`` at training step number ``step``. Linear in ``values``."""

    @abstractmethod
    def add_adjoint(self, total: Tensor, part: Tensor, layout: Layout, bucket: Bucket, step: int) -> None:
        """Adds the adjoint of what :meth:`lay_out` gave to ``total``."""

    def zero_adjoint(self, values: Tensor, layout: Layout) -> Tensor:
        """The ``total`` to begin with."""
        return torch.zeros_like(values)

    def reduce(self, total: Tensor, layout: Layout) -> Tensor:
        """``total`` as one adjoint for each value."""
        return total

    def named(self, values: Tensor, setting: str, group: int, names: Sequence[str], layout: Layout) -> dict[str, Tensor]:
        """The values by their public names."""
        return {f"{setting}/group{group}": values}


class PerGroup(Granularity):
    """One number for the whole group."""

    def count(self, layout: Layout, num_steps: int | None) -> tuple[int, ...]:
        return ()

    def lay_out(self, values: Tensor, layout: Layout, bucket: Bucket, step: int) -> Tensor:
        return values.to(bucket.device)

    def add_adjoint(self, total: Tensor, part: Tensor, layout: Layout, bucket: Bucket, step: int) -> None:
        total += part.to(total.device)


class PerStep(Granularity):
    """One number for each training step of an episode."""

    def count(self, layout: Layout, num_steps: int | None) -> tuple[int, ...]:
        return (num_steps or 0,)

    def lay_out(self, values: Tensor, layout: Layout, bucket: Bucket, step: int) -> Tensor:
        return values[step].to(bucket.device)

    def add_adjoint(self, total: Tensor, part: Tensor, layout: Layout, bucket: Bucket, step: int) -> None:
        total[step] += part.to(total.device)


class PerElement(Granularity):
    """One number for each weight, in one vector over the group."""

    def count(self, layout: Layout, num_steps: int | None) -> tuple[int, ...]:
        return (layout.numel,)

    def lay_out(self, values: Tensor, layout: Layout, bucket: Bucket, step: int) -> Tensor:
        return layout.take(values, bucket.positions).to(bucket.device, bucket.dtype).view(bucket.shape)

    def add_adjoint(self, total: Tensor, part: Tensor, layout: Layout, bucket: Bucket, step: int) -> None:
        layout.add_at(total, bucket.positions, part.reshape(-1).to(total.device, total.dtype))

    def named(self, values: Tensor, setting: str, group: int, names: Sequence[str], layout: Layout) -> dict[str, Tensor]:
        return {f"{setting}/{name}": part for name, part in zip(names, layout.split(values))}


class PerTensor(Granularity):
    """One number for each parameter tensor, repeated over its weights."""

    def count(self, layout: Layout, num_steps: int | None) -> tuple[int, ...]:
        return (len(layout.sizes),)

    def lay_out(self, values: Tensor, layout: Layout, bucket: Bucket, step: int) -> Tensor:
        values = values.to(bucket.device, bucket.dtype)
        repeated = [values[i].expand(layout.sizes[i]) for i in bucket.positions]
        return torch.cat(repeated).view(bucket.shape)

    def zero_adjoint(self, values: Tensor, layout: Layout) -> Tensor:
        return values.new_zeros(layout.numel)

    def add_adjoint(self, total: Tensor, part: Tensor, layout: Layout, bucket: Bucket, step: int) -> None:
        layout.add_at(total, bucket.positions, part.reshape(-1).to(total.device, total.dtype))

    def reduce(self, total: Tensor, layout: Layout) -> Tensor:
        return torch.stack([part.sum() for part in total.split(layout.sizes)])

    def named(self, values: Tensor, setting: str, group: int, names: Sequence[str], layout: Layout) -> dict[str, Tensor]:
        return {f"{setting}/{name}": value for name, value in zip(names, values.unbind())}


_GRANULARITIES: dict[str, Granularity] = {
    "group": PerGroup(),
    "tensor": PerTensor(),
    "element": PerElement(),
    "step": PerStep(),
}


def read_setting(settings: Mapping[str, Any], name: str) -> Any:
    """The setting ``name`` of a param group; ``"betas.0"`` reads into the tuple."""
    key, _, entry = name.partition(".")
    return settings[key][int(entry)] if entry else settings[key]


def write_setting(settings: dict[str, Any], name: str, value: Any) -> None:
    """Puts ``value`` in the place of the setting ``name``."""
    key, _, entry = name.partition(".")
    if entry:
        value = tuple(value if i == int(entry) else old for i, old in enumerate(settings[key]))
    settings[key] = value


class TunedSetting:
    """The values of one :class:`Hyperparameter` in one param group.

    ``leaf`` is what the hyper optimizer moves: the values, or on a log scale their logarithms.
    """

    def __init__(
        self,
        spec: Hyperparameter,
        group_index: int,
        group: Mapping[str, Any],
        names: Sequence[str],
        legal: tuple[float, float],
        start: Tensor | None,
    ) -> None:
        self.spec, self.group, self.names = spec, group_index, list(names)
        self.layout = Layout([p.shape for p in group["params"]])
        self._granularity = _GRANULARITIES[spec.per]
        base = group.get("initial_lr", group["lr"]) if spec.name == "lr" else read_setting(group, spec.name)
        self.base = float(base)
        self.low = legal[0] if spec.low is None else spec.low
        self.high = legal[1] if spec.high is None else spec.high
        first = group["params"][0]
        wide = spec.per == "element" or first.device.type == "mps"
        shape = self._granularity.count(self.layout, spec.num_steps)
        start = torch.tensor(self.base, dtype=torch.float64) if start is None else start.detach()
        # Single numbers are kept in float64: 1 - beta2 would lose four digits in float32.
        dtype = first.dtype if wide else torch.float64
        values = start.to(first.device, dtype).expand(shape).clone()
        _check_start(spec.name, values, self.low, self.high, spec.log)
        self.leaf = (values.log() if spec.log else values).requires_grad_()
        self._laid_out: dict[Bucket, Tensor] = {}

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.spec.name}/group{self.group}"

    def values(self) -> Tensor:
        """The current values, detached, in the shape of the leaf."""
        leaf = self.leaf.detach()
        return leaf.exp() if self.spec.log else leaf.clone()

    def set_values(self, values: Tensor) -> None:
        """Replaces the values."""
        with torch.no_grad():
            self.leaf.copy_(values.log() if self.spec.log else values)
        self._laid_out.clear()

    def set_leaf_gradient(self, gradient: Tensor) -> None:
        """Gives the leaf the gradient that belongs to ``gradient``, which is with respect to the values."""
        self.leaf.grad = gradient * self.values() if self.spec.log else gradient.clone()

    def project(self) -> int:
        """Moves the values into the bounds and says how many had to move."""
        self._laid_out.clear()
        low, high = self.low, self.high
        if self.spec.log:
            low, high = (math.log(bound) if bound > 0 else -math.inf for bound in (low, high))
        with torch.no_grad():
            clipped = ((self.leaf < low) | (self.leaf > high)).sum()
            self.leaf.clamp_(low, high)
        return int(clipped)

    def for_bucket(self, bucket: Bucket, step: int) -> Tensor:
        """The values as the rule gets them."""
        if self.spec.per == "step":
            return self.lay_out(self.values(), bucket, step)
        if bucket not in self._laid_out:
            self._laid_out[bucket] = self.lay_out(self.values(), bucket, step)
        return self._laid_out[bucket]

    def lay_out(self, values: Tensor, bucket: Bucket, step: int) -> Tensor:
        """``values``, or a direction in their space, as the rule gets them."""
        if self.spec.num_steps is not None and step >= self.spec.num_steps:
            raise ValueError(
                f"Training step {step + 1} is past the end of the schedule {self.label}, which has "
                f"num_steps={self.spec.num_steps}. Call restart() to begin the next episode, or give it more steps."
            )
        return self._granularity.lay_out(values, self.layout, bucket, step)

    def factor(self, settings: Mapping[str, Any]) -> float:
        """What an LR scheduler has made of the group's own value, as a factor on the tuned one."""
        now = float(read_setting(settings, self.spec.name))
        if now == self.base:
            return 1.0
        if self.base == 0:
            raise ValueError(
                f"The group's {self.spec.name} went from 0 to {now:g} while {self.label} is tuned. A scheduler's factor on "
                "a tuned setting is its value over the initial one, which is 0 here: start the group above 0."
            )
        return now / self.base

    def zero_adjoint(self) -> Tensor:
        """A total to sum adjoints in."""
        return self._granularity.zero_adjoint(self.leaf.detach(), self.layout)

    def add_adjoint(self, total: Tensor, part: Tensor, bucket: Bucket, step: int) -> None:
        """Adds the adjoint of what :meth:`for_bucket` gave."""
        self._granularity.add_adjoint(total, part, self.layout, bucket, step)

    def reduce(self, total: Tensor) -> Tensor:
        """The total as one number for each value."""
        return self._granularity.reduce(total, self.layout)

    def named(self, values: Tensor) -> dict[str, Tensor]:
        """Anything shaped like the values, by public names."""
        return self._granularity.named(values, self.spec.name, self.group, self.names, self.layout)


class TunedTensor:
    """A tensor of the user's that the training loss reads; the hyper optimizer moves it itself."""

    def __init__(self, name: str, leaf: Tensor) -> None:
        self.name, self.leaf = name, leaf

    def values(self) -> Tensor:
        """A copy of the tensor."""
        return self.leaf.detach().clone()

    def set_values(self, values: Tensor) -> None:
        """Copies ``values`` into the tensor."""
        with torch.no_grad():
            self.leaf.copy_(values)

    def set_leaf_gradient(self, gradient: Tensor) -> None:
        """Gives the tensor its gradient."""
        self.leaf.grad = gradient.clone()

    def project(self) -> int:
        """No bounds."""
        return 0

    def zero_adjoint(self) -> Tensor:
        """A total to sum adjoints in."""
        return torch.zeros_like(self.leaf)

    def reduce(self, total: Tensor) -> Tensor:
        """The total itself."""
        return total

    def named(self, values: Tensor) -> dict[str, Tensor]:
        """Under the tensor's name."""
        return {self.name: values}


class HyperparameterSet:
    """All that one HyperOptimizer tunes: settings of the optimizer first, then tensors in the training loss."""

    def __init__(
        self, tune: Sequence[Any], groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]], rule: UpdateRule
    ) -> None:
        specs = [entry for entry in tune if isinstance(entry, Hyperparameter)]
        _check_unique([spec.name for spec in specs])
        self.settings = [tuned for spec in specs for tuned in _tuned_settings(spec, groups, names, rule)]
        self.modules = [thing for _, thing in map(_named_entry, tune) if isinstance(thing, nn.Module)]
        self.tensors = _tuned_tensors([entry for entry in tune if not isinstance(entry, Hyperparameter)])
        if not self.settings and not self.tensors:
            raise ValueError("tune is empty: pass at least one Hyperparameter, nn.Module or leaf tensor.")
        self.all: list[TunedSetting | TunedTensor] = [*self.settings, *self.tensors]
        self.of_group = [[t for t in self.settings if t.group == i] for i in range(len(groups))]

    @property
    def loss_tensors(self) -> list[Tensor]:
        """The tuned tensors that the training loss reads."""
        return [tuned.leaf for tuned in self.tensors]

    def named(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """One tensor for each entry of ``all``, split up by public names."""
        return {name: value for tuned, given in zip(self.all, values) for name, value in tuned.named(given).items()}

    def values(self) -> dict[str, Tensor]:
        """The current values by public names."""
        return self.named([tuned.values() for tuned in self.all])

    def set_values(self, values: Mapping[str, Tensor]) -> None:
        """Replaces the values under the given names.

        Raises:
            ValueError: if a name is not one of those tuned, or a shape does not fit.
        """
        unknown = [name for name in values if name not in self.values()]
        if unknown:
            raise ValueError(f"No hyperparameter is named {unknown[0]!r}. Tuned are: {', '.join(self.values())}.")
        for tuned in self.all:
            current = tuned.values()
            for name, part in tuned.named(current).items():
                if name in values:
                    given = torch.as_tensor(values[name])
                    if given.shape != part.shape:
                        raise ValueError(
                            f"{name!r} has shape {tuple(part.shape)}, got a tensor of shape {tuple(given.shape)}."
                        )
                    part.copy_(given)
            tuned.set_values(current)

    def zero_adjoints(self) -> list[Tensor]:
        """One total for each entry of ``all``."""
        return [tuned.zero_adjoint() for tuned in self.all]

    def reduce(self, totals: Sequence[Tensor]) -> list[Tensor]:
        """Totals as gradients with respect to the values."""
        return [tuned.reduce(total) for tuned, total in zip(self.all, totals)]

    def versions(self) -> list[int]:
        """Counters that move when somebody writes to the values."""
        return [tuned.leaf._version for tuned in self.all]


def _tuned_settings(
    spec: Hyperparameter, groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]], rule: UpdateRule
) -> list[TunedSetting]:
    _check_setting(spec.name, groups, rule)
    starts: list[Tensor | None] = [None] * len(groups)
    if isinstance(spec.init, (int, float)):
        starts = [torch.tensor(float(spec.init), dtype=torch.float64)] * len(groups)
    elif isinstance(spec.init, Tensor):
        shapes = [_GRANULARITIES[spec.per].count(Layout([p.shape for p in g["params"]]), spec.num_steps) for g in groups]
        counts = [math.prod(shape) for shape in shapes]
        if spec.init.numel() not in (1, sum(counts)):
            raise ValueError(
                f"Hyperparameter({spec.name!r}, per={spec.per!r}): init has {spec.init.numel()} entries, and there are "
                f"{sum(counts)} values. Pass one entry for each, in the order of the groups and their parameters."
            )
        flat = spec.init.detach().reshape(-1).expand(sum(counts))
        starts = [part.reshape(shape) for part, shape in zip(flat.split(counts), shapes)]
    return [
        TunedSetting(spec, i, group, names[i], rule.tunable[spec.name], start)
        for i, (group, start) in enumerate(zip(groups, starts))
    ]


def _check_setting(name: str, groups: Sequence[Mapping[str, Any]], rule: UpdateRule) -> None:
    if name in rule.tunable:
        return
    known = ", ".join(rule.tunable)
    if any(name.partition(".")[0] == key for group in groups for key in group if key != "params"):
        raise ValueError(
            f"The setting {name!r} cannot be tuned: it is not a continuous setting that moves the parameters. "
            f"Those of this optimizer are: {known}."
        )
    nearest = difflib.get_close_matches(name, list(rule.tunable), n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"This optimizer has no setting {name!r}.{hint} Those that can be tuned are: {known}.")


def _check_unique(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"tune has {names.count(name)} entries named {name!r}. Each setting of a group has one value at a time: "
                "keep one entry."
            )


def _named_entry(entry: Any) -> tuple[str | None, Any]:
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str):
        return entry
    return None, entry


def _tuned_tensors(entries: Sequence[Any]) -> list[TunedTensor]:
    tuned: list[TunedTensor] = []
    for position, (name, thing) in enumerate(map(_named_entry, entries)):
        if isinstance(thing, nn.Module):
            prefix = name or type(thing).__name__
            tuned += [TunedTensor(f"{prefix}.{n}", p) for n, p in thing.named_parameters() if p.requires_grad]
        elif isinstance(thing, Tensor):
            tuned.append(TunedTensor(name or f"tensor{position}", thing))
        else:
            raise TypeError(
                f"tune takes Hyperparameter, nn.Module or leaf tensors (or a pair of a name and one of the latter), "
                f"got {type(thing).__name__}: {thing!r}."
            )
    for t in tuned:
        if not (t.leaf.is_leaf and t.leaf.requires_grad and t.leaf.is_floating_point()):
            raise ValueError(
                f"The tuned tensor {t.name!r} must be a floating-point leaf with requires_grad=True (dtype {t.leaf.dtype}, "
                f"is_leaf={t.leaf.is_leaf}, requires_grad={t.leaf.requires_grad}): make it with "
                "tensor.detach().clone().requires_grad_()."
            )
    _check_unique([t.name for t in tuned])
    return tuned
