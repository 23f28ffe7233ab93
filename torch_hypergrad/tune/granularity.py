"""How the values of one setting are laid out over the parameters of a group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from ..ground.buckets import Bucket
from ..ground.vectors import Layout


class Granularity(ABC):
    """How the values of one setting are laid out over the parameters of a group. Adjoints of values are
    summed up in the layout of the rules, and reduced to one for each value at the end."""

    is_number: ClassVar[bool] = False
    """Whether it is one number for the whole group at all times, as the optimizer itself has it."""

    is_per_weight: ClassVar[bool] = False
    """Whether each weight has a value of its own; kept in the weights' dtype, the others in float64, since
    ``1 - beta2`` would lose four digits in float32."""

    is_per_step: ClassVar[bool] = False
    """Whether each training step of an episode has one, so that the number of steps must be known."""

    @abstractmethod
    def count(self, layout: Layout, num_steps: int | None) -> tuple[int, ...]:
        """Shape of the values."""

    @abstractmethod
    def lay_out(self, values: Tensor, layout: Layout, bucket: Bucket, step: int) -> Tensor:
        """What the rule gets for ``bucket`` at training step number ``step``. Linear in ``values``."""

    @abstractmethod
    def add_adjoint(self, total: Tensor, part: Tensor, layout: Layout, bucket: Bucket, step: int) -> None:
        """Adds the adjoint of what :meth:`lay_out` gave to ``total``."""

    def as_seen(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        """The values as the rule sees them, rounded to the ``dtype`` of the weights where they are."""
        return values

    def zero_adjoint(self, values: Tensor, layout: Layout) -> Tensor:
        """The ``total`` to begin with."""
        return torch.zeros_like(values)

    def reduce(self, total: Tensor, layout: Layout) -> Tensor:
        """``total`` as one adjoint for each value."""
        return total

    def named(
        self, values: Tensor, setting: str, group: int, names: Sequence[str], layout: Layout
    ) -> dict[str, Tensor]:
        """The values by their public names."""
        return {f"{setting}/group{group}": values}


class PerGroup(Granularity):
    """One number for the whole group."""

    is_number = True

    def count(self, layout: Layout, num_steps: int | None) -> tuple[int, ...]:
        return ()

    def lay_out(self, values: Tensor, layout: Layout, bucket: Bucket, step: int) -> Tensor:
        return values.to(bucket.device)

    def add_adjoint(self, total: Tensor, part: Tensor, layout: Layout, bucket: Bucket, step: int) -> None:
        total += part.to(total.device)


class PerStep(Granularity):
    """One number for each training step of an episode."""

    is_per_step = True

    def count(self, layout: Layout, num_steps: int | None) -> tuple[int, ...]:
        return (num_steps or 0,)

    def lay_out(self, values: Tensor, layout: Layout, bucket: Bucket, step: int) -> Tensor:
        return values[step].to(bucket.device)

    def add_adjoint(self, total: Tensor, part: Tensor, layout: Layout, bucket: Bucket, step: int) -> None:
        total[step] += part.to(total.device)


class PerElement(Granularity):
    """One number for each weight, in one vector over the group."""

    is_per_weight = True

    def count(self, layout: Layout, num_steps: int | None) -> tuple[int, ...]:
        return (layout.numel,)

    def lay_out(self, values: Tensor, layout: Layout, bucket: Bucket, step: int) -> Tensor:
        return layout.take(values, bucket.positions).to(bucket.device, bucket.dtype).view(bucket.shape)

    def add_adjoint(self, total: Tensor, part: Tensor, layout: Layout, bucket: Bucket, step: int) -> None:
        layout.add_at(total, bucket.positions, part.reshape(-1).to(total.device, total.dtype))

    def named(
        self, values: Tensor, setting: str, group: int, names: Sequence[str], layout: Layout
    ) -> dict[str, Tensor]:
        return {f"{setting}/{name}": part for name, part in zip(names, layout.split(values))}


class PerTensor(Granularity):
    """One number for each parameter tensor, repeated over its weights."""

    def count(self, layout: Layout, num_steps: int | None) -> tuple[int, ...]:
        return (len(layout.sizes),)

    def lay_out(self, values: Tensor, layout: Layout, bucket: Bucket, step: int) -> Tensor:
        values = values.to(bucket.device, bucket.dtype)
        repeated = [values[i].expand(layout.sizes[i]) for i in bucket.positions]
        return torch.cat(repeated).view(bucket.shape)

    def as_seen(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(dtype)

    def zero_adjoint(self, values: Tensor, layout: Layout) -> Tensor:
        return values.new_zeros(layout.numel)

    def add_adjoint(self, total: Tensor, part: Tensor, layout: Layout, bucket: Bucket, step: int) -> None:
        layout.add_at(total, bucket.positions, part.reshape(-1).to(total.device, total.dtype))

    def reduce(self, total: Tensor, layout: Layout) -> Tensor:
        return torch.stack([part.sum() for part in total.split(layout.sizes)])

    def named(
        self, values: Tensor, setting: str, group: int, names: Sequence[str], layout: Layout
    ) -> dict[str, Tensor]:
        return {f"{setting}/{name}": value for name, value in zip(names, values.unbind())}


class PerLabel(Granularity):
    """One number for each label.

    Args:
        labels: that of each weight, over the group: ints of shape ``(numel,)``.
    """

    def __init__(self, labels: Tensor) -> None:
        self._labels, self._num = labels, int(labels.max()) + 1

    def count(self, layout: Layout, num_steps: int | None) -> tuple[int, ...]:
        return (self._num,)

    def lay_out(self, values: Tensor, layout: Layout, bucket: Bucket, step: int) -> Tensor:
        labels = layout.take(self._labels.to(values.device), bucket.positions)
        return values[labels].to(bucket.device, bucket.dtype).view(bucket.shape)

    def as_seen(self, values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(dtype)

    def zero_adjoint(self, values: Tensor, layout: Layout) -> Tensor:
        return values.new_zeros(layout.numel)

    def add_adjoint(self, total: Tensor, part: Tensor, layout: Layout, bucket: Bucket, step: int) -> None:
        layout.add_at(total, bucket.positions, part.reshape(-1).to(total.device, total.dtype))

    def reduce(self, total: Tensor, layout: Layout) -> Tensor:
        return total.new_zeros(self._num).index_add(0, self._labels.to(total.device), total)


GRANULARITIES: dict[str, Granularity] = {
    "group": PerGroup(),
    "tensor": PerTensor(),
    "element": PerElement(),
    "step": PerStep(),
}
"""Those that need to know nothing else."""


def labelled(labels: Mapping[str, Tensor], names: Sequence[str], layout: Layout) -> PerLabel:
    """Values per label for one group.

    Args:
        labels: those of the weights, by the names of parameters.
        names: those of the group's parameters.

    Raises:
        ValueError: if the labels do not fit the group.
    """
    joined = torch.cat([_spread(labels, name, shape) for name, shape in zip(names, layout.shapes)])
    unused = sorted(set(range(int(joined.max()) + 1)) - set(joined.tolist()))
    if unused:
        raise ValueError(
            f"labels: no weight of the group has the label {unused[0]}, so nothing depends on its value. "
            f"Number the labels from 0 to {int(joined.max()) - len(unused)} without gaps."
        )
    return PerLabel(joined)


def _spread(labels: Mapping[str, Tensor], name: str, shape: torch.Size) -> Tensor:
    """The label of each weight of a parameter."""
    if name not in labels:
        raise ValueError(
            f"labels has no entry for {name!r}, a parameter of the group, but for {', '.join(labels)}. Give "
            "each parameter's weights their labels, or put the others into a param group of their own and "
            "tune groups=[...]."
        )
    try:
        return labels[name].detach().long().cpu().expand(shape).reshape(-1)
    except RuntimeError:
        raise ValueError(
            f"labels[{name!r}] has shape {tuple(labels[name].shape)}, which does not broadcast to that of "
            f"the parameter, {tuple(shape)}."
        ) from None
