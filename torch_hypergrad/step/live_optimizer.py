"""The wrapped optimizer's state: vectors for the rules on our side, torch's own format on the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .buckets import Bucket, as_list
from .records import RuleState, State
from .updates import UpdateRule
from .updates.base import scalar_dtype
from .vectors import Layout, laid_out_as


class OptimizerState:
    """Keeps the rule's states, and ``optimizer.state`` equal to them: its entries are views of the rules' vectors.

    Args:
        per_element: for each param group, whether a setting is tuned per element, so that even what torch keeps as one
            number for each parameter is one for each weight.

    ``buckets`` and ``rule_states`` are the current ones.
    """

    def __init__(self, optimizer: Optimizer, rule: UpdateRule, per_element: Sequence[bool]) -> None:
        self.optimizer, self.rule, self._per_element = optimizer, rule, list(per_element)
        groups = optimizer.param_groups
        self.params: list[Tensor] = [p for group in groups for p in group["params"]]
        self._positions = [(g, i) for g, group in enumerate(groups) for i in range(len(group["params"]))]
        self._bucket_cache: dict[tuple[int, ...], Bucket] = {}
        self._known: list[dict[str, tuple[Tensor, int]]] = []
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
            key = (self._positions[i][0], p.device, p.dtype, int(float(state.get("step", 0))), "step" in state, kinds, alone)
            found.setdefault(key, []).append(i)
        self.buckets = tuple(self.bucket(indices) for indices in found.values())
        self.rule_states = tuple(self._import(bucket, key) for bucket, key in zip(self.buckets, found))
        self._remember()

    def refine(self, state: State, active: Sequence[bool]) -> State:
        """``state`` with buckets split until each is wholly with or wholly without gradients."""
        if all(active) or all(len({active[i] for i in bucket.indices}) == 1 for bucket in state.buckets):
            return state
        fine = []
        for bucket in state.buckets:
            for flag in (True, False):
                indices = [i for i in bucket.indices if active[i] == flag]
                if indices:
                    fine.append((bucket, self.bucket(indices)))
        return State(
            tuple(part for _, part in fine),
            self._regather(state.buckets, state.params, fine),
            tuple(self._split_rule_states(state, fine)),
            state.buffers,
        )

    def _regather(
        self, buckets: Sequence[Bucket], tensors: Sequence[Tensor], fine: Sequence[tuple[Bucket, Bucket]]
    ) -> tuple[Tensor, ...]:
        pieces = as_list(buckets, tensors, len(self.params))
        return tuple(part.gather(pieces) for _, part in fine)  # type: ignore[arg-type]

    def _split_rule_states(self, state: State, fine: Sequence[tuple[Bucket, Bucket]]) -> Iterator[RuleState]:
        whole = dict(zip(state.buckets, state.rule_states))
        for bucket, part in fine:
            split: RuleState = {}
            for key, value in whole[bucket].items():
                if isinstance(value, Tensor) and value.ndim > 0:
                    value = part.gather(as_list([bucket], [value], len(self.params)))  # type: ignore[arg-type]
                split[key] = value
            yield split

    def write(self, buckets: tuple[Bucket, ...], rule_states: tuple[RuleState, ...]) -> None:
        """Puts the rule's states into the optimizer in torch's own format, where they have changed."""
        old = self.rule_states if buckets == self.buckets else [None] * len(buckets)
        for bucket, before, after in zip(buckets, old, rule_states):
            if after is not before:
                self._export(bucket, after)
        self.buckets, self.rule_states = buckets, rule_states
        self._remember()

    def reset(self, buckets: tuple[Bucket, ...], rule_states: tuple[RuleState, ...]) -> None:
        """Replaces the optimizer's state as a whole, by copies: what is written to it later leaves the given one alone."""
        for p in self.params:
            self.optimizer.state.pop(p, None)
        copies = ({k: v.clone() if isinstance(v, Tensor) else v for k, v in state.items()} for state in rule_states)
        self.buckets = ()
        self.write(buckets, tuple(copies))

    def replaced(self) -> bool:
        """Whether somebody else has written to the optimizer's state, or replaced it."""
        return any(
            len(found := self._tensors_of(p)) != len(known)
            or any(found.get(key) is not tensor or tensor._version != version for key, (tensor, version) in known.items())
            for p, known in zip(self.params, self._known)
        )

    def _remember(self) -> None:
        self._known = [{key: (t, t._version) for key, t in self._tensors_of(p).items()} for p in self.params]

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
                rule_state[kind] = bucket.gather([held.get(i, p) for i, p in enumerate(self.params)])
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
                    entry[key] = self._one_number(piece, i) if key in self.rule.scalars else laid_out_as(piece, self.params[i])
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
        on_device = group.get("capturable") or group.get("fused") or isinstance(self.optimizer, torch.optim.ASGD)
        device = self.params[i].device if on_device else torch.device("cpu")
        return torch.full((), float(step), dtype=torch.float32 if group.get("fused") else scalar_dtype(), device=device)


def _joined_scalars(bucket: Bucket, held: Mapping[int, Tensor]) -> Tensor:
    """One number for the bucket where its parameters agree, else a vector that repeats each parameter's own."""
    values = list(held.values())
    if all(value.ndim == 0 and torch.equal(value, values[0]) for value in values):
        return values[0].clone()
    spread = [value.expand(shape).reshape(-1) for value, shape in zip(values, bucket.layout.shapes)]
    return torch.cat(spread).to(bucket.device).view(bucket.shape)
