"""What is recorded of training: states and steps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from . import readings
from .buckets import Bucket
from .tuned import TunedSetting

RuleState: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class State:
    """All that a training step reads and writes. Its tensors are never written to, so that states may share them.

    Args:
        buckets: which parameters are updated together.
        params: one vector of parameters for each bucket.
        rule_states: one for each bucket.
        buffers: those of the modules; None where they are not needed.
        grads: the gradient of the training loss at this state, before any transformation, for each parameter; None
            where it is not kept.
    """

    buckets: tuple[Bucket, ...]
    params: tuple[Tensor, ...]
    rule_states: tuple[RuleState, ...]
    buffers: tuple[Tensor | None, ...] | None
    grads: tuple[Tensor | None, ...] | None = None


@dataclass(frozen=True)
class Surroundings:
    """What a loss depends on besides its arguments: random number generators, train or eval mode, frozen parameters."""

    rng: tuple[Tensor, ...]
    training: tuple[bool, ...]
    trainable: tuple[bool, ...]

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Surroundings)
            and (self.training, self.trainable) == (other.training, other.trainable)
            and all(torch.equal(a, b) for a, b in zip(self.rng, other.rng))
        )


@dataclass(frozen=True)
class TracedUpdate:
    """The update rule on one bucket, with a graph from its inputs to its outputs.

    Args:
        param, grad, state, tuned: the inputs, leaves of the graph; of the state, what is continuous.
        new_param, new_state: the outputs; of the state, everything.
    """

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    tuned: dict[TunedSetting, Tensor]
    new_param: Tensor
    new_state: RuleState


@dataclass(frozen=True)
class Step:
    """One training step as it was taken.

    Args:
        number: its place in the episode, from 0.
        batch: what the training loss was called with.
        versions: the version counters of the batch's tensors.
        surroundings: the random number generators and modes before the loss was computed.
        settings: the settings of every param group.
        active: for each parameter, whether it had a gradient.
        loss: the training loss, a scalar without graph.
        tampered: whether the parameters differed from what the step before had written, where that was checked.
    """

    number: int
    batch: Any
    versions: tuple[int, ...]
    surroundings: Surroundings
    settings: tuple[Mapping[str, Any], ...]
    active: tuple[bool, ...]
    loss: Tensor
    tampered: Tensor | None = None


def versions_of(batch: Any) -> tuple[int, ...]:
    """The version counters of all tensors in ``batch``, a pytree."""
    return tuple(leaf._version for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and not leaf.is_inference())


def differs(state: State, other: State) -> Tensor:
    """Whether any parameter differs, as a bool tensor; no synchronization. NaN equals NaN."""
    flags = [differ(a, b) for a, b in zip(state.params, other.params)]
    return torch.stack([flag.to(flags[0].device) for flag in flags]).any()


def differ(a: Tensor, b: Tensor) -> Tensor:
    """The same for two tensors of one shape."""
    if readings.at_once(a) and torch.equal(a, b):
        return torch.tensor(False)
    return ((a != b) & ~(a.isnan() & b.isnan())).any()
