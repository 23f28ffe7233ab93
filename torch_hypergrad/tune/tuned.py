"""What the hyper optimizer moves: the values of the tuned settings, and tuned tensors of the training
loss."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ground.buckets import Bucket
from ..ground.vectors import Layout
from .granularity import Granularity
from .hyperparameter import Hyperparameter
from .scale import Scale


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
        granularity: Granularity,
        start: Tensor | None,
    ) -> None:
        self.spec, self.group, self.names, self.granularity = spec, group_index, list(names), granularity
        self.layout = Layout([p.shape for p in group["params"]])
        base = group.get("initial_lr", group["lr"]) if spec.name == "lr" else read_setting(group, spec.name)
        self.base = float(base)
        self.scale = Scale(
            legal[0] if spec.low is None else spec.low, legal[1] if spec.high is None else spec.high, spec.log
        )
        first = group["params"][0]
        wide = self.granularity.is_per_weight or first.device.type == "mps"
        shape = self.granularity.count(self.layout, spec.num_steps)
        start = torch.tensor(self.base, dtype=torch.float64) if start is None else start.detach()
        values = start.to(first.device, first.dtype if wide else torch.float64).expand(shape).clone()
        seen = self.granularity.as_seen(values, first.dtype)
        self.scale.check(spec.name, seen)
        self.leaf = self.scale.leaf(values).requires_grad_()
        self._laid_out: dict[Bucket, Tensor] = {}
        self._compared = False

    @property
    def label(self) -> str:
        """For messages."""
        return f"{self.spec.name}/group{self.group}"

    @property
    def held(self) -> Tensor:
        """Where the values are held, to which nobody else may write in the middle of a window."""
        return self.leaf

    def values(self) -> Tensor:
        """The current values, detached, in the shape of the leaf."""
        return self.scale.values(self.leaf)

    def set_values(self, values: Tensor) -> None:
        """Replaces the values."""
        self.set_leaf(self.scale.leaf(values))

    def set_leaf(self, leaf: Tensor) -> None:
        """Replaces what the hyper optimizer moves."""
        with torch.no_grad():
            self.leaf.copy_(leaf)
        self._moved()

    def set_leaf_gradient(self, gradient: Tensor) -> None:
        """Gives the leaf the gradient that belongs to ``gradient``, which is with respect to the values."""
        self.leaf.grad = self.scale.leaf_gradient(gradient, self.leaf)

    def project(self) -> Tensor:
        """Moves the values into the bounds and counts how many had to move."""
        self._moved()
        return self.scale.project_(self.leaf)

    def _moved(self) -> None:
        self._laid_out.clear()
        self._compared = False

    def for_bucket(self, bucket: Bucket, step: int) -> Tensor:
        """The values as the rule gets them."""
        if self.granularity.is_per_step:
            return self.lay_out(self.values(), bucket, step)
        if bucket not in self._laid_out:
            self._laid_out[bucket] = self.lay_out(self.values(), bucket, step)
        return self._laid_out[bucket]

    def lay_out(self, values: Tensor, bucket: Bucket, step: int) -> Tensor:
        """``values``, or a direction in their space, as the rule gets them."""
        if self.spec.num_steps is not None and step >= self.spec.num_steps:
            raise ValueError(
                f"Training step {step + 1} is past the end of the schedule {self.label}, which has "
                f"num_steps={self.spec.num_steps}. Call restart() to begin the next episode, or give it more "
                "steps."
            )
        return self.granularity.lay_out(values, self.layout, bucket, step)

    def factor(self, settings: Mapping[str, Any]) -> float:
        """What an LR scheduler has made of the group's own value, as a factor on the tuned one."""
        now = float(read_setting(settings, self.spec.name))
        if now == self.base:
            return 1.0
        self._check_not_copied(now)
        if self.base == 0:
            raise ValueError(
                f"The group's {self.spec.name} went from 0 to {now:g} while {self.label} is tuned. A "
                "scheduler's factor on a tuned setting is its value over the initial one, which is 0 here: "
                "start the group above 0."
            )
        return now / self.base

    def _check_not_copied(self, now: float) -> None:
        """Refuses the tuned value in the group: as a factor it would count twice. Once for each value, since
        on a GPU it waits for the device."""
        if self._compared or self.leaf.numel() != 1:
            return
        self._compared = True
        if now == self.values().item():
            raise ValueError(
                f"The group's {self.spec.name} was set to the tuned value, {now:g}. While {self.label} is "
                "tuned, a change of the group is taken for a scheduler's factor on the tuned value, which "
                f"would count it twice. Leave the group at {self.base:g}: hyper.step applies the tuned value "
                "by itself, and a loop of one's own reads hyper.values()."
            )

    def zero_adjoint(self) -> Tensor:
        """A total to sum adjoints in."""
        return self.granularity.zero_adjoint(self.leaf.detach(), self.layout)

    def add_adjoint(self, total: Tensor, part: Tensor, bucket: Bucket, step: int) -> None:
        """Adds the adjoint of what :meth:`for_bucket` gave."""
        self.granularity.add_adjoint(total, part, self.layout, bucket, step)

    def reduce(self, total: Tensor) -> Tensor:
        """The total as one number for each value."""
        return self.granularity.reduce(total, self.layout)

    def named(self, values: Tensor) -> dict[str, Tensor]:
        """Anything shaped like the values, by public names."""
        return self.granularity.named(values, self.spec.name, self.group, self.names, self.layout)


class TunedTensor:
    """A tensor of the user's that the training loss reads.

    ``leaf`` is what the hyper optimizer moves: the tensor itself, or on a log scale the logarithms of its
    entries.
    """

    def __init__(self, name: str, tensor: Tensor, scale: Scale) -> None:
        self.name, self.tensor, self.scale = name, tensor, scale
        self.label = name
        self.leaf = scale.leaf(tensor.detach()).requires_grad_() if scale.log else tensor
        self._show()

    @property
    def held(self) -> Tensor:
        """Where the values are held, to which nobody else may write in the middle of a window."""
        return self.tensor

    def values(self) -> Tensor:
        """A copy of the tensor."""
        return self.tensor.detach().clone()

    def set_values(self, values: Tensor) -> None:
        """Copies ``values`` into the tensor."""
        self.set_leaf(self.scale.leaf(values))

    def set_leaf(self, leaf: Tensor) -> None:
        """Replaces what the hyper optimizer moves."""
        with torch.no_grad():
            self.leaf.copy_(leaf)
        self._show()

    def set_leaf_gradient(self, gradient: Tensor) -> None:
        """Gives the leaf the gradient that belongs to ``gradient``, which is with respect to the values."""
        if self.scale.log:
            with torch.no_grad():  # entries that somebody wrote to since are taken over
                now = self.tensor.log()
                self.leaf.copy_(torch.where(self.tensor == self._shown, self.leaf, now))
        self.leaf.grad = self.scale.leaf_gradient(gradient, self.leaf)

    def project(self) -> Tensor:
        """Moves the values into the bounds and counts how many had to move."""
        clipped = self.scale.project_(self.leaf)
        self._show()
        return clipped

    def _show(self) -> None:
        """Lets the loss read what the leaf says."""
        if self.scale.log:
            self._shown = self.scale.values(self.leaf)
            with torch.no_grad():
                self.tensor.copy_(self._shown)

    def zero_adjoint(self) -> Tensor:
        """A total to sum adjoints in."""
        return torch.zeros_like(self.tensor.detach())

    def reduce(self, total: Tensor) -> Tensor:
        """The total itself."""
        return total

    def named(self, values: Tensor) -> dict[str, Tensor]:
        """Under the tensor's name."""
        return {self.name: values}
