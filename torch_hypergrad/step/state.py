"""What a training step reads and writes, and a step as it was taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import register_pytree_node

from ..device import readings
from ..device.host_memory import same_bits
from ..ground.buckets import Bucket
from ..ground.vectors import has_views
from ..updates.base import RuleState
from .batch import Seen

Buffers: TypeAlias = tuple["Tensor | None", ...]
PerParameter: TypeAlias = "Sequence[Tensor | None]"
"""One tensor for each parameter of the optimizer; None for zero, or for a gradient that there is none of."""


class Part(NamedTuple):
    """Parameters that are updated together, as one vector, and what the rule keeps for them."""

    bucket: Bucket
    param: Tensor
    rule_state: RuleState

    def of(self, bucket: Bucket) -> Part:
        """The part of some of the parameters."""
        pieces = dict(self.bucket.scatter(self.param))
        split = {
            key: bucket.gather(dict(self.bucket.scatter(value))) if _is_vector(value) else value
            for key, value in self.rule_state.items()
        }
        return Part(bucket, bucket.gather(pieces), split)


@dataclass(frozen=True, eq=False)
class State:
    """All that a training step reads and writes. Its tensors are never written to, so that states may share
    them.

    An adjoint is a state too, the derivative of the validation loss in each of these; and so is a tangent,
    their derivative along a hyperparameter. There what is missing in a rule's state, or None in the buffers,
    is zero.

    Args:
        parts: the parameters, bucket by bucket.
        buffers: those of the modules; None where they are not needed, or all zero.
    """

    parts: tuple[Part, ...]
    buffers: Buffers | None = None

    @cached_property
    def params(self) -> tuple[Tensor, ...]:
        """One vector of parameters for each bucket."""
        return tuple(part.param for part in self.parts)

    def nbytes(self) -> int:
        """Of the memory behind the parameters and the rule's state."""
        held = [value for part in self.parts for value in (part.param, *part.rule_state.values())]
        return sum(value.untyped_storage().nbytes() for value in held if isinstance(value, Tensor))

    def per_parameter(self, length: int) -> list[Tensor | None]:
        """The parameters as views in their own shapes, None for those in no bucket."""
        pieces: list[Tensor | None] = [None] * length
        for part in self.parts:
            for i, piece in part.bucket.scatter(part.param):
                pieces[i] = piece
        return pieces

    def refined(self, active: Sequence[bool], bucket_of: Callable[[Sequence[int]], Bucket]) -> State:
        """With buckets split until each is wholly active or wholly not."""
        if all(active) or all(len({active[i] for i in part.bucket.indices}) == 1 for part in self.parts):
            return self
        parts = [
            part.of(bucket_of(indices))
            for part in self.parts
            for flag in (True, False)
            if (indices := [i for i in part.bucket.indices if active[i] == flag])
        ]
        return replace(self, parts=tuple(parts))

    def without(self, is_unread: Callable[[Bucket, str], bool]) -> State:
        """Without the rule's vectors that nobody reads, in whose places something is that has no values."""
        if not any(
            _is_vector(value) and value is not part.bucket.unread and is_unread(part.bucket, key)
            for part in self.parts
            for key, value in part.rule_state.items()
        ):
            return self
        parts = [
            part._replace(
                rule_state={
                    key: part.bucket.unread if _is_vector(value) and is_unread(part.bucket, key) else value
                    for key, value in part.rule_state.items()
                }
            )
            for part in self.parts
        ]
        return replace(self, parts=tuple(parts))

    def merged(self, like: State) -> State:
        """An adjoint of ``like`` with its buckets split, as one in its own buckets."""
        pieces = {i: piece for part in self.parts for i, piece in part.bucket.scatter(part.param)}
        parts = []
        for whole in like.parts:
            split = [part for part in self.parts if part.bucket.indices[0] in whole.bucket.indices]
            joined = {
                key: _joined(
                    whole.bucket, whole.rule_state[key], [p for p in split if key in p.rule_state], key
                )
                for key in {key for part in split for key in part.rule_state}
            }
            parts.append(Part(whole.bucket, whole.bucket.gather(pieces), joined))
        return replace(self, parts=tuple(parts))

    def owning_params(self) -> State:
        """With parameters that may be written to: copies of those that share memory, as what autograd returns
        may do."""
        others = {id(adj) for part in self.parts for adj in part.rule_state.values()}
        parts = [
            part
            if part.param.is_contiguous() and id(part.param) not in others and not has_views(part.param)
            else part._replace(param=part.param.contiguous().clone())
            for part in self.parts
        ]
        return State(tuple(parts), self.buffers)


register_pytree_node(
    State, lambda state: ([state.parts, state.buffers], None), lambda parts, _: State(*parts)
)


def _is_vector(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim > 0


def _joined(bucket: Bucket, whole: Tensor, parts: Sequence[Part], key: str) -> Tensor:
    if whole.ndim == 0:
        return torch.stack([part.rule_state[key] for part in parts]).sum()
    zeros = torch.zeros(whole.shape, dtype=whole.dtype, device=bucket.device)
    pieces = dict(bucket.scatter(zeros))
    for part in parts:
        pieces.update(part.bucket.scatter(part.rule_state[key]))
    return bucket.gather(pieces)


@dataclass(frozen=True)
class Surroundings:
    """What a loss depends on besides its arguments.

    Args:
        rng: the states of the random number generators: the CPU's, then each device's.
        training: train or eval mode of each module.
        trainable: for each parameter, whether it requires a gradient.
        autocast: for each kind of device, whether autocast is on, and its dtype.
    """

    rng: tuple[Any, ...]
    training: tuple[bool, ...]
    trainable: tuple[bool, ...]
    autocast: tuple[tuple[str, bool, torch.dtype], ...] = ()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Surroundings)
            and (self.training, self.trainable, self.autocast)
            == (other.training, other.trainable, other.autocast)
            and all(map(same_bits, self.rng, other.rng))
        )


@dataclass(frozen=True)
class Step:
    """One training step as it was taken.

    Args:
        number: its place in the episode, from 0.
        batch: what the training loss was called with, in containers of its own.
        seen: what the batch's tensors were like then.
        surroundings: the surroundings before the loss was computed.
        settings: the settings of every param group.
        given: the very object that the training loss is to be called with, while the step is being taken.
        active: for each parameter, whether it had a gradient.
        loss: the training loss, a scalar without graph; None before the step was taken.
        tampered: whether the parameters differed from what the step before had written, where that was
            checked.
    """

    number: int
    batch: Any
    seen: Seen
    surroundings: Surroundings
    settings: tuple[Mapping[str, Any], ...]
    given: Any = None
    active: tuple[bool, ...] = ()
    loss: Tensor | None = None
    tampered: Tensor | None = None


def differs(state: State, other: State) -> Tensor:
    """Whether any parameter differs, as a bool tensor; no synchronization. NaN equals NaN."""
    flags = [differ(a, b) for a, b in zip(state.params, other.params)]
    return torch.stack([flag.to(flags[0].device) for flag in flags]).any()


def differ(a: Tensor, b: Tensor) -> Tensor:
    """The same for two tensors of one shape."""
    if readings.at_once(a) and torch.equal(a, b):
        return torch.tensor(False)
    return ((a != b) & ~(a.isnan() & b.isnan())).any()
