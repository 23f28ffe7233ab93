"""The adjoint of a state: what a sweep carries backwards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .buckets import Bucket, as_list
from .records import State
from .vectors import has_views


@dataclass(frozen=True)
class Adjoint:
    """The derivative of the validation loss with respect to a state: None stands for zeros."""

    buckets: tuple[Bucket, ...]
    params: tuple[Tensor, ...]
    rule_states: tuple[dict[str, Tensor], ...]

    def own_params(self) -> tuple[Tensor, ...]:
        """``params``, to be written to: copies of those that share memory, as what autograd returns may do."""
        others = [id(adj) for rule_state in self.rule_states for adj in rule_state.values()]
        return tuple(
            adj if adj.is_contiguous() and id(adj) not in others and not has_views(adj) else adj.contiguous().clone()
            for adj in self.params
        )


def merged(adjoint: Adjoint, state: State, num_params: int) -> Adjoint:
    """The adjoint of ``state``, given that of the same state with its buckets split."""
    pieces = as_list(adjoint.buckets, adjoint.params, num_params)
    rule_states = []
    for bucket, rule_state in zip(state.buckets, state.rule_states):
        parts = [(b, a) for b, a in zip(adjoint.buckets, adjoint.rule_states) if b.indices[0] in bucket.indices]
        joined = {}
        for key in {key for _, adj in parts for key in adj}:
            held = [(b, adj[key]) for b, adj in parts if key in adj]
            joined[key] = _joined(bucket, rule_state[key], held, num_params)
        rule_states.append(joined)
    params = tuple(bucket.gather(pieces) for bucket in state.buckets)  # type: ignore[arg-type]
    return Adjoint(state.buckets, params, tuple(rule_states))


def _joined(bucket: Bucket, whole: Tensor, held: Sequence[tuple[Bucket, Tensor]], num_params: int) -> Tensor:
    if whole.ndim == 0:
        return torch.stack([adj for _, adj in held]).sum()
    zeros = as_list([bucket], [torch.zeros_like(whole)], num_params)
    found = as_list([b for b, _ in held], [adj for _, adj in held], num_params)
    return bucket.gather([z if f is None else f for z, f in zip(zeros, found)])  # type: ignore[misc]
