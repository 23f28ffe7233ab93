"""All that one HyperOptimizer tunes, put together from what the user wrote down."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..ground.vectors import Layout
from ..updates import UpdateRule
from .granularity import GRANULARITIES, Granularity, labelled
from .hyperparameter import Hyperparameter, TensorHyperparameter
from .scale import Scale
from .tuned import TunedSetting, TunedTensor


class HyperparameterSet:
    """All that one HyperOptimizer tunes: settings of the optimizer first, then tensors in the training
    loss."""

    def __init__(
        self,
        tune: Sequence[Any],
        groups: Sequence[Mapping[str, Any]],
        names: Sequence[Sequence[str]],
        rule: UpdateRule,
    ) -> None:
        specs = [entry for entry in tune if isinstance(entry, Hyperparameter)]
        self.settings = [tuned for spec in specs for tuned in _tuned_settings(spec, groups, names, rule)]
        for i in range(len(groups)):
            _check_unique([tuned.spec.name for tuned in self.settings if tuned.group == i])
        self.modules = [thing for _, thing in map(_named_entry, tune) if isinstance(thing, nn.Module)]
        self.tensors = _tuned_tensors([entry for entry in tune if not isinstance(entry, Hyperparameter)])
        if not self.settings and not self.tensors:
            raise ValueError("tune is empty: pass at least one Hyperparameter, nn.Module or leaf tensor.")
        self.all: list[TunedSetting | TunedTensor] = [*self.settings, *self.tensors]
        self.of_group = [[t for t in self.settings if t.group == i] for i in range(len(groups))]

    @property
    def loss_tensors(self) -> list[Tensor]:
        """The tuned tensors that the training loss reads."""
        return [tuned.tensor for tuned in self.tensors]

    @property
    def are_per_weight(self) -> list[bool]:
        """For each param group, whether a setting has a value for each weight."""
        return [any(t.granularity.is_per_weight for t in tuned) for tuned in self.of_group]

    def named(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """One tensor for each entry of ``all``, split up by public names."""
        return {
            name: value
            for tuned, given in zip(self.all, values)
            for name, value in tuned.named(given).items()
        }

    def from_named(self, named: Mapping[str, Tensor]) -> list[Tensor]:
        """The transpose of :meth:`named`: a new tensor for each entry of ``all``."""
        every = [torch.zeros_like(tuned.values()) for tuned in self.all]
        for tuned, whole in zip(self.all, every):
            for name, part in tuned.named(whole).items():
                part.copy_(named[name])
        return every

    def values(self) -> dict[str, Tensor]:
        """The current values by public names."""
        return self.named([tuned.values() for tuned in self.all])

    def check_values(self, values: Mapping[str, Any]) -> None:
        """Refuses unknown names, other shapes, and values that no hyperparameter may have.

        Raises:
            ValueError: with the name of the first.
        """
        known = {
            name: (tuned, part) for tuned in self.all for name, part in tuned.named(tuned.values()).items()
        }
        for name, given in values.items():
            if name not in known:
                raise ValueError(
                    f"No hyperparameter is named {name!r}. Tuned are: {', '.join(list(known)[:20])}."
                )
            tuned, part = known[name]
            given = torch.as_tensor(given)
            if given.shape != part.shape:
                raise ValueError(
                    f"{name!r} has shape {tuple(part.shape)}, got a tensor of shape {tuple(given.shape)}."
                )
            tuned.scale.check(name, given)

    def set_values(self, values: Mapping[str, Any]) -> None:
        """Replaces the values under the given names, whatever they are."""
        for tuned in self.all:
            current = tuned.values()
            for name, part in tuned.named(current).items():
                if name in values:
                    part.copy_(torch.as_tensor(values[name]))
            tuned.set_values(current)

    def versions(self) -> list[int]:
        """Counters that move when somebody writes to the values."""
        return [tuned.held._version for tuned in self.all]


def _tuned_settings(
    spec: Hyperparameter,
    groups: Sequence[Mapping[str, Any]],
    names: Sequence[Sequence[str]],
    rule: UpdateRule,
) -> list[TunedSetting]:
    _check_setting(spec.name, groups, rule)
    if spec.per in ("element", "label") and spec.name in rule.whole:
        raise ValueError(
            f"Hyperparameter({spec.name!r}, per={spec.per!r}): this setting acts on a parameter as a whole "
            "and has no value for each element. Use per='tensor' or per='group'."
        )
    chosen = range(len(groups)) if spec.groups is None else spec.groups
    if any(i not in range(len(groups)) for i in chosen):
        raise ValueError(
            f"Hyperparameter({spec.name!r}): groups={list(chosen)}, and the optimizer's param groups are "
            f"numbered 0 to {len(groups) - 1}."
        )
    tuned = [i for i in chosen if groups[i]["params"]]
    layouts = [Layout([p.shape for p in groups[i]["params"]]) for i in tuned]
    granularities = [_granularity(spec, names[i], layout) for i, layout in zip(tuned, layouts)]
    counts = [how.count(layout, spec.num_steps) for how, layout in zip(granularities, layouts)]
    return [
        TunedSetting(spec, i, groups[i], names[i], rule.tunable[spec.name], how, start)
        for i, how, start in zip(tuned, granularities, _starts(spec, counts))
    ]


def _granularity(spec: Hyperparameter, names: Sequence[str], layout: Layout) -> Granularity:
    if spec.labels is None:
        return GRANULARITIES[spec.per]
    try:
        return labelled(spec.labels, names, layout)
    except ValueError as error:
        raise ValueError(f"Hyperparameter({spec.name!r}): {error}") from None


def _starts(spec: Hyperparameter, shapes: Sequence[tuple[int, ...]]) -> Sequence[Tensor | None]:
    """The given start for each group, whose values have these shapes; None where each takes its own."""
    if spec.init is None:
        return [None] * len(shapes)
    init = torch.as_tensor(
        spec.init, dtype=torch.float64 if isinstance(spec.init, (int, float)) else None
    ).detach()
    counts = [math.prod(shape) for shape in shapes]
    if init.numel() not in (1, sum(counts)):
        raise ValueError(
            f"Hyperparameter({spec.name!r}, per={spec.per!r}): init has {init.numel()} entries, and there "
            f"are {sum(counts)} values. Pass one entry for each, in the order of the groups and their "
            "parameters."
        )
    return [
        part.reshape(shape) for part, shape in zip(init.reshape(-1).expand(sum(counts)).split(counts), shapes)
    ]


def _check_setting(name: str, groups: Sequence[Mapping[str, Any]], rule: UpdateRule) -> None:
    if name in rule.tunable:
        return
    known = ", ".join(rule.tunable)
    entries = [repr(tunable) for tunable in rule.tunable if tunable.partition(".")[0] == name]
    if entries:
        raise ValueError(
            f"{name!r} is a pair of settings, or more: tune its entries {' and '.join(entries)} one by one."
        )
    if any(name.partition(".")[0] == key for group in groups for key in group if key != "params"):
        raise ValueError(
            f"The setting {name!r} cannot be tuned: it is not a continuous setting that moves the "
            f"parameters. Those of this optimizer are: {known}."
        )
    nearest = difflib.get_close_matches(name, list(rule.tunable), n=1)
    hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
    raise ValueError(f"This optimizer has no setting {name!r}.{hint} Those that can be tuned are: {known}.")


def _check_unique(names: Sequence[str]) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"tune has {names.count(name)} entries named {name!r}. Each setting of a group has one value "
                "at a time: keep one entry."
            )


def _named_entry(entry: Any) -> tuple[str | None, Any]:
    if isinstance(entry, TensorHyperparameter):
        return entry.name, entry
    if isinstance(entry, tuple) and len(entry) == 2 and isinstance(entry[0], str):
        return entry
    return None, entry


def _tuned_tensors(entries: Sequence[Any]) -> list[TunedTensor]:
    found: list[tuple[str, Tensor, Scale]] = []
    for position, (name, thing) in enumerate(map(_named_entry, entries)):
        if isinstance(thing, nn.Module):
            prefix = name or type(thing).__name__
            if not any(p.requires_grad for p in thing.parameters()):
                raise ValueError(
                    f"tune holds the module {prefix}, which has no parameter that requires a gradient: take "
                    "it out."
                )
            named = thing.named_parameters()
            found += [(f"{prefix}.{n}", p, Scale()) for n, p in named if p.requires_grad]
        elif isinstance(thing, TensorHyperparameter):
            found.append((name or f"tensor{position}", thing.tensor, thing.scale))
        elif isinstance(thing, Tensor):
            found.append((name or f"tensor{position}", thing, Scale()))
        else:
            raise TypeError(
                "tune takes Hyperparameter, Hyperparameter.of(tensor), nn.Module or leaf tensors (or a pair "
                f"of a name and one of the latter two), got {type(thing).__name__}: {thing!r}."
            )
    for name, tensor, _ in found:
        _check_tensor(name, tensor)
    _check_unique([name for name, _, _ in found])
    first_names: dict[int, str] = {}
    for name, tensor, _ in found:
        first = first_names.setdefault(id(tensor), name)
        if first != name:
            raise ValueError(f"{first!r} and {name!r} in tune are the same tensor: keep one of them.")
    return [TunedTensor(name, tensor, scale) for name, tensor, scale in found]


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not (tensor.is_leaf and tensor.requires_grad and tensor.is_floating_point()):
        raise ValueError(
            f"The tuned tensor {name!r} must be a floating-point leaf with requires_grad=True (dtype "
            f"{tensor.dtype}, is_leaf={tensor.is_leaf}, requires_grad={tensor.requires_grad}): make it with "
            "tensor.detach().clone().requires_grad_()."
        )
    if 0 in tensor.stride() and tensor.numel() > 1:
        raise ValueError(
            f"The tuned tensor {name!r} of shape {tuple(tensor.shape)} was made by expand: some of its "
            "entries share memory, so they cannot move apart. Make it with "
            "tensor.detach().clone().requires_grad_(), or tune the tensor before expand and expand it in the "
            "loss."
        )
