"""The wrapped optimizer's state: vectors for the rules on our side, torch's own format on the other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..ground.buckets import Bucket
from ..ground.vectors import Layout, laid_out_as
from ..updates import UpdateRule
from ..updates.base import RuleState, scalar_dtype
from .state import Part


class LiveOptimizer:
    """Keeps the rule's states, and ``optimizer.state`` equal to them: its entries are views of the rules'
    vectors.

    Args:
        per_element: for each param group, whether a setting is tuned per element, so that even what torch
            keeps as one number for each parameter is one for each weight.

    ``buckets`` and ``rule_states`` are the current ones.
    """

    def __init__(self, optimizer: Optimizer, rule: UpdateRule, per_element: Sequence[bool]) -> None:
        self.optimizer, self.rule, self._per_element = optimizer, rule, list(per_element)
        groups = optimizer.param_groups
        self.params: list[Tensor] = [p for group in groups for p in group["params"]]
        self._positions = [(g, i) for g, group in enumerate(groups) for i in range(len(group["params"]))]
        self._bucket_cache: dict[tuple[int, ...], Bucket] = {}
        self._known: list[tuple[int, list[tuple[str, Tensor, int]]]] = []
        self.buckets: tuple[Bucket, ...] = ()
        self.rule_states: tuple[RuleState, ...] = ()
        self.adopt()

    def bucket(self, indices: Sequence[int]) -> Bucket:
        """The bucket of the parameters at ``indices``, the same object each time."""
        key = tuple(indices)
        if key not in self._bucket_cache:
            first = self.params[key[0]]
            self._bucket_cache[key] = Bucket(
                group=self._positions[key[0]][0],
                indices=key,
                positions=tuple(self._positions[i][1] for i in key),
                layout=Layout([self.params[i].shape for i in key]),
                flat=self.rule.elementwise,
                dtype=first.dtype,
                device=first.device,
            )
        return self._bucket_cache[key]

    def adopt(self) -> None:
        """Reads the optimizer's state in torch's format, and puts together what can be updated together."""
        found: dict[Any, list[int]] = {}
        for i, p in enumerate(self.params):
            state = self.optimizer.state.get(p, {})
            kinds = tuple(sorted(self._tensors_of(p)))
            alone = None if self.rule.elementwise else i
            key = (
                self._positions[i][0],
                p.device,
                p.dtype,
                int(float(state.get("step", 0))),
                "step" in state,
                kinds,
                alone,
            )
            found.setdefault(key, []).append(i)
        self.buckets = tuple(self.bucket(indices) for indices in found.values())
        self.rule_states = tuple(self._import(bucket, key) for bucket, key in zip(self.buckets, found))
        self._remember()

    def write(self, parts: Sequence[Part]) -> None:
        """Puts the rule's states into the optimizer in torch's own format, where they have changed."""
        buckets = tuple(part.bucket for part in parts)
        old = self.rule_states if buckets == self.buckets else [None] * len(buckets)
        for part, before in zip(parts, old):
            if part.rule_state is not before:
                self._export(part.bucket, part.rule_state)
        self.buckets, self.rule_states = buckets, tuple(part.rule_state for part in parts)
        self._remember()

    def reset(self, parts: Sequence[Part]) -> None:
        """Replaces the optimizer's state as a whole, by copies: what is written to it later leaves the given
        one alone."""
        for p in self.params:
            self.optimizer.state.pop(p, None)
        self.buckets = ()
        self.write([part._replace(rule_state=_copied(part.rule_state)) for part in parts])

    def replaced(self) -> bool:
        """Whether somebody else has written to the optimizer's state, or replaced it."""
        for p, (length, known) in zip(self.params, self._known):
            entries = self.optimizer.state.get(p, {})
            if len(entries) != length or any(entries.get(k) is not t or t._version != v for k, t, v in known):
                return True
        return False

    def _remember(self) -> None:
        self._known = [
            (
                len(self.optimizer.state.get(p, {})),
                [(k, t, t._version) for k, t in self._tensors_of(p).items()],
            )
            for p in self.params
        ]

    def _tensors_of(self, p: Tensor) -> dict[str, Tensor]:
        state = self.optimizer.state.get(p, {})
        return {key: value for key, value in state.items() if key != "step" and isinstance(value, Tensor)}

    def _import(self, bucket: Bucket, key: tuple[Any, ...]) -> RuleState:
        _, _, _, step, has_step, kinds, _ = key
        rule_state: RuleState = {"step": step} if has_step else {}
        for kind in kinds:
            held = {i: self.optimizer.state[self.params[i]][kind].detach() for i in bucket.indices}
            if kind in self.rule.scalars:
                rule_state[kind] = _joined_scalars(bucket, held)
            else:
                rule_state[kind] = bucket.gather(held)
        return rule_state

    def _export(self, bucket: Bucket, rule_state: RuleState) -> None:
        entries: list[RuleState] = [{} for _ in bucket.indices]
        for key, value in rule_state.items():
            if key == "step":
                for entry, i in zip(entries, bucket.indices):
                    entry["step"] = self._step_tensor(i, value)
            elif value.ndim == 0 and key in self.rule.scalars:
                for entry in entries:
                    entry[key] = value.clone()
            else:
                for entry, (i, piece) in zip(entries, bucket.scatter(value)):
                    entry[key] = (
                        self._one_number(piece, i)
                        if key in self.rule.scalars
                        else laid_out_as(piece, self.params[i])
                    )
        for entry, i in zip(entries, bucket.indices):
            if entry:
                self.optimizer.state[self.params[i]].update(entry)

    def _one_number(self, piece: Tensor, i: int) -> Tensor:
        per_element = self._per_element[self._positions[i][0]]
        return piece.clone() if per_element else piece.reshape(-1)[0].clone()

    def _step_tensor(self, i: int, step: int) -> Tensor:
        held = self.optimizer.state.get(self.params[i], {}).get("step")
        if isinstance(held, Tensor):
            return held.fill_(step)
        group = self.optimizer.param_groups[self._positions[i][0]]
        on_device = (
            group.get("capturable") or group.get("fused") or isinstance(self.optimizer, torch.optim.ASGD)
        )
        device = self.params[i].device if on_device else torch.device("cpu")
        return torch.full(
            (), float(step), dtype=torch.float32 if group.get("fused") else scalar_dtype(), device=device
        )


def _copied(rule_state: RuleState) -> RuleState:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in rule_state.items()}


def _joined_scalars(bucket: Bucket, held: Mapping[int, Tensor]) -> Tensor:
    """One number for the bucket where its parameters agree, else a vector that repeats each parameter's
    own."""
    values = list(held.values())
    if all(value.ndim == 0 and torch.equal(value, values[0]) for value in values):
        return values[0].clone()
    spread = [value.expand(shape).reshape(-1) for value, shape in zip(values, bucket.layout.shapes)]
    return torch.cat(spread).to(bucket.device).view(bucket.shape)
