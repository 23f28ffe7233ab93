"""States and steps as plain containers of tensors, and back."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..step.batch import seen
from ..step.gradient import LossAndGradient
from ..step.live_optimizer import LiveOptimizer
from ..step.state import Part, State, Step, Surroundings


def pack_state(state: State, known: LossAndGradient | None = None) -> dict[str, Any]:
    """``state``, and the gradient there if it was kept."""
    return {
        "buckets": [list(part.bucket.indices) for part in state.parts],
        "params": list(state.params),
        "rule_states": [
            {key: None if value is part.bucket.unread else value for key, value in part.rule_state.items()}
            for part in state.parts
        ],
        "buffers": None if state.buffers is None else list(state.buffers),
        "known": None
        if known is None
        else {"loss": known.loss, "grads": known.grads, "rng": list(known.rng)},
    }


def unpack_state(packed: dict[str, Any], optimizer: LiveOptimizer) -> tuple[State, LossAndGradient | None]:
    """The transpose of :func:`pack_state`, on the devices of the parameters."""
    parts = []
    for indices, param, rule_state in zip(packed["buckets"], packed["params"], packed["rule_states"]):
        bucket = optimizer.bucket(indices)
        on_device = {
            key: bucket.unread
            if value is None
            else value.to(bucket.device)
            if isinstance(value, Tensor) and value.ndim > 0
            else value
            for key, value in rule_state.items()
        }
        parts.append(Part(bucket, param.to(bucket.device), on_device))
    buffers, known = packed["buffers"], packed["known"]
    return State(tuple(parts), None if buffers is None else tuple(buffers)), (
        None if known is None else LossAndGradient(known["loss"], known["grads"], rng=tuple(known["rng"]))
    )


def pack_step(step: Step) -> dict[str, Any]:
    """``step``; its batch must be plain itself."""
    packed = {
        **vars(step),
        "surroundings": dict(vars(step.surroundings)),
        "settings": [dict(s) for s in step.settings],
    }
    del packed["seen"], packed["given"]
    return packed


def unpack_step(packed: dict[str, Any]) -> Step:
    """The transpose of :func:`pack_step`."""
    rest = {
        "seen": seen(packed["batch"]),
        "surroundings": Surroundings(**{k: tuple(v) for k, v in packed["surroundings"].items()}),
        "settings": tuple(packed["settings"]),
        "active": tuple(packed["active"]),
    }
    return Step(**{**packed, **rest})
