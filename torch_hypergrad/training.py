"""Training steps: taken once on the model, and taken again from any recorded state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from . import autodiff
from .buckets import Bucket, as_list
from .errors import TrajectoryError
from .hyperparameters import HyperparameterSet, TunedSetting, write_setting
from .updates import UpdateRule
from .updates.base import scalar_dtype
from .vectors import Layout

Loss: TypeAlias = Callable[[nn.Module, Any], Tensor]
GradTransform: TypeAlias = Callable[[list[Tensor]], list[Tensor]]
RuleState: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class State:
    """All that a training step reads and writes: one vector of parameters and one rule state for each bucket, and the
    buffers of the modules (None where they are not needed)."""

    buckets: tuple[Bucket, ...]
    params: tuple[Tensor, ...]
    rule_states: tuple[RuleState, ...]
    buffers: tuple[Tensor | None, ...] | None


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
        new_param, new_state: the outputs.
    """

    param: Tensor
    grad: Tensor
    state: dict[str, Tensor]
    tuned: dict[TunedSetting, Tensor]
    new_param: Tensor
    new_state: dict[str, Tensor]


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


class Training:
    """A model, its optimizer's update rule and its training loss, as a function from one state to the next.

    Args:
        twice_differentiable: take every step with kernels that can be differentiated twice, so that a step taken
            again has the very same gradient and the same dropout masks.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        rule: UpdateRule,
        hyperparameters: HyperparameterSet,
        train_loss: Loss,
        grad_transform: GradTransform | None,
        names: Sequence[str],
        *,
        twice_differentiable: bool,
    ) -> None:
        self.model, self.optimizer, self.rule = model, optimizer, rule
        self.hyperparameters, self.train_loss, self.grad_transform = hyperparameters, train_loss, grad_transform
        self.names = list(names)
        self.params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self._positions = [(g, i) for g, group in enumerate(optimizer.param_groups) for i in range(len(group["params"]))]
        modules = dict.fromkeys(m for root in (model, *hyperparameters.modules) for m in root.modules())
        self._modules = list(modules)
        self._buffers = [(module, name) for module in self._modules for name in module._buffers]
        self._devices = sorted({t.device for t in self.params if t.device.type != "cpu"}, key=str)
        self._recurrent = any(isinstance(module, nn.RNNBase) for module in self._modules)
        self._twice_differentiable = twice_differentiable
        self._bucket_cache: dict[tuple[int, ...], Bucket] = {}
        self._surroundings: Surroundings | None = None
        self._settings: tuple[dict[str, Any], ...] = ()
        self._exported: list[tuple[Tensor, str, Tensor, int]] = []
        self._adopt()

    # ---- the model and the wrapped optimizer, as they stand -------------------------------------------------------

    def capture(self, *, buffers: bool) -> State:
        """The current state; parameters and buffers are copied, the rule's states are immutable and shared."""
        if self._state_replaced():
            self._adopt()
        params = tuple(bucket.gather([p.detach() for p in self.params]) for bucket in self._buckets)
        return State(self._buckets, params, self._rule_states, self.buffers() if buffers else None)

    def load(self, state: State) -> None:
        """Puts parameters and buffers into the model."""
        self._write_params(state.buckets, state.params)
        if state.buffers is not None:
            self.set_buffers(state.buffers)

    def buffers(self) -> tuple[Tensor | None, ...]:
        """Copies of the buffers of all modules."""
        found = (module._buffers[name] for module, name in self._buffers)
        return tuple(None if buffer is None else buffer.detach().clone() for buffer in found)

    def set_buffers(self, buffers: Sequence[Tensor | None]) -> None:
        """Puts buffers into the modules."""
        for (module, name), saved in zip(self._buffers, buffers):
            buffer = module._buffers[name]
            if buffer is None or saved is None or buffer.shape != saved.shape or buffer.dtype != saved.dtype:
                module._buffers[name] = None if saved is None else saved.clone()
            else:
                with torch.no_grad():
                    buffer.copy_(saved)

    def write(self, state: State) -> None:
        """Puts parameters into the model, and the rule's states into the optimizer in torch's own format."""
        self._write_params(state.buckets, state.params)
        self.write_optimizer_state(state)
        self.mark_written()

    def write_optimizer_state(self, state: State) -> None:
        """Puts the rule's states into the optimizer in torch's own format."""
        for bucket, old, new in zip(state.buckets, self._aligned_states(state), state.rule_states):
            if new is not old:
                self._export(bucket, new)
        self._buckets, self._rule_states = state.buckets, state.rule_states
        self._exported = [
            (self.params[i], key, tensor, tensor._version)
            for bucket in state.buckets
            for i in bucket.indices
            for key, tensor in self.optimizer.state.get(self.params[i], {}).items()
            if isinstance(tensor, Tensor) and key != "step"
        ]

    def reset_optimizer_state(self, state: State) -> None:
        """Fills an emptied optimizer state with the rule's states of ``state``."""
        self._buckets, self._rule_states = (), ()
        self.write_optimizer_state(state)
        self.mark_written()

    def mark_written(self) -> None:
        """Takes the parameters as they are now for what :meth:`changed_parameter` compares with."""
        self._written = [(p.data_ptr(), p._version) for p in self.params]

    def changed(self) -> str | None:
        """What somebody else has written to since the last :meth:`write`, or None."""
        for name, p, written in zip(self.names, self.params, self._written):
            if (p.data_ptr(), p._version) != written:
                return f"the parameter {name!r}"
        return "the optimizer's state" if self._state_replaced() else None

    def differs(self, state: State, other: State) -> Tensor:
        """Whether any parameter differs, as a bool tensor; no synchronization. NaN equals NaN."""
        return torch.stack([_differ(a, b).to(self.params[0].device) for a, b in zip(state.params, other.params)]).any()

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Restores parameters, buffers, modes and random number generators at the end."""
        state, surroundings = self.capture(buffers=True), self.surroundings()
        try:
            yield
        finally:
            self.load(state)
            self.set_surroundings(surroundings)
            self.mark_written()

    def _aligned_states(self, state: State) -> Sequence[RuleState | None]:
        same = state.buckets == self._buckets
        return self._rule_states if same else [None] * len(state.buckets)

    def _write_params(self, buckets: Sequence[Bucket], params: Sequence[Tensor]) -> None:
        targets, sources = [], []
        for bucket, param in zip(buckets, params):
            for i, piece in bucket.scatter(param):
                targets.append(self.params[i])
                sources.append(piece)
        with torch.no_grad():
            torch._foreach_copy_(targets, sources)

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
                    entry[key] = self._one_number(piece, i) if key in self.rule.scalars else piece
        for entry, i in zip(entries, bucket.indices):
            if entry:
                self.optimizer.state[self.params[i]].update(entry)

    def _one_number(self, piece: Tensor, i: int) -> Tensor:
        per_element = any(t.spec.per == "element" for t in self.hyperparameters.of_group[self._positions[i][0]])
        return piece.clone() if per_element else piece.reshape(-1)[0].clone()

    def _step_tensor(self, i: int, step: int) -> Tensor:
        held = self.optimizer.state.get(self.params[i], {}).get("step")
        if isinstance(held, Tensor):
            return held.fill_(step)
        group = self.optimizer.param_groups[self._positions[i][0]]
        on_device = group.get("capturable") or group.get("fused") or isinstance(self.optimizer, torch.optim.ASGD)
        device = self.params[i].device if on_device else torch.device("cpu")
        return torch.tensor(float(step), dtype=torch.float32 if group.get("fused") else scalar_dtype(), device=device)

    def _state_replaced(self) -> bool:
        state = self.optimizer.state
        return any(state.get(p, {}).get(key) is not t or t._version != version for p, key, t, version in self._exported)

    def _adopt(self) -> None:
        """Reads the optimizer's state in torch's format, and puts together what can be updated together."""
        found: dict[Any, list[int]] = {}
        for i, p in enumerate(self.params):
            state = self.optimizer.state.get(p, {})
            kinds = tuple(sorted(key for key, value in state.items() if isinstance(value, Tensor) and key != "step"))
            alone = None if self.rule.elementwise else i
            key = (self._positions[i][0], p.device, p.dtype, int(float(state.get("step", 0))), "step" in state, kinds, alone)
            found.setdefault(key, []).append(i)
        self._buckets = tuple(self.bucket(indices) for indices in found.values())
        self._rule_states = tuple(self._import(bucket, key) for bucket, key in zip(self._buckets, found))
        self.write_optimizer_state(State(self._buckets, (), self._rule_states, None))
        self.mark_written()

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

    # ---- surroundings ---------------------------------------------------------------------------------------------

    def surroundings(self) -> Surroundings:
        """Random number generators and modes as they are now; equal ones share memory."""
        rng = [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self._devices)]
        training = tuple(module.training for module in self._modules)
        now = Surroundings(tuple(rng), training, tuple(p.requires_grad for p in self.params))
        if self._surroundings is None or self._surroundings != now:
            self._surroundings = now
        return self._surroundings

    def set_rng(self, rng: Sequence[Tensor]) -> None:
        """Brings back the random number generators."""
        torch.set_rng_state(rng[0].cpu())
        for device, state in zip(self._devices, rng[1:]):
            torch.get_device_module(device).set_rng_state(state.cpu(), device)

    def set_surroundings(self, surroundings: Surroundings) -> None:
        """Brings back random number generators and modes."""
        self.set_rng(surroundings.rng)
        for module, mode in zip(self._modules, surroundings.training):
            module.training = mode
        for p, trainable in zip(self.params, surroundings.trainable):
            p.requires_grad_(trainable)

    # ---- one step -------------------------------------------------------------------------------------------------

    def begin(self, number: int, batch: Any) -> Step:
        """A step about to be taken; ``active`` and ``loss`` are filled in by :meth:`finish`."""
        settings = tuple({k: _plain(v) for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups)
        if settings != self._settings:
            self._settings = settings
        return Step(number, batch, versions_of(batch), self.surroundings(), self._settings, (), torch.empty(0))

    def finish(self, step: Step, loss: Tensor, grads: Sequence[Tensor | None], tampered: Tensor | None) -> Step:
        """The step with what came out of it."""
        return replace(step, loss=loss.detach(), active=tuple(g is not None for g in grads), tampered=tampered)

    def gradients(
        self, batch: Any, *, create_graph: bool = False, transform: bool = True
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The training loss at the model's current weights, and its gradient for each parameter, transformed or not."""
        with torch.enable_grad(), self.kernels(twice_differentiable=create_graph or self._twice_differentiable):
            loss = self.train_loss(self.model, batch)
            check_loss(loss, "train_loss")
            trainable = [i for i, p in enumerate(self.params) if p.requires_grad]
            found = autodiff.gradients([loss], [self.params[i] for i in trainable], create_graph=create_graph)
            active = [(i, g) for i, g in zip(trainable, found) if g is not None]
            grads = [g for _, g in active]
            for i, g in active:
                if g.layout is not torch.strided:
                    raise ValueError(
                        f"The gradient of {self.names[i]!r} is sparse. Sparse gradients have no second derivative: "
                        "make the embedding with sparse=False."
                    )
            if transform and self.grad_transform is not None:
                grads = self._transformed(self.grad_transform, grads)
        result: list[Tensor | None] = [None] * len(self.params)
        for (i, _), g in zip(active, grads):
            result[i] = g
        return loss, result

    def kernels(self, *, twice_differentiable: bool) -> AbstractContextManager[None]:
        """The context to compute losses in."""
        return autodiff.differentiable_kernels(recurrent=self._recurrent) if twice_differentiable else nullcontext()

    def trainable(self) -> list[Tensor]:
        """The optimizer's parameters that require a gradient."""
        return [p for p in self.params if p.requires_grad]

    def _transformed(self, transform: GradTransform, grads: list[Tensor]) -> list[Tensor]:
        transformed = list(transform(list(grads)))
        if [g.shape for g in transformed] != [g.shape for g in grads]:
            raise ValueError(
                "grad_transform must return one gradient for each it was given, in the same shapes: it was given "
                f"{[tuple(g.shape) for g in grads]} and returned {[tuple(g.shape) for g in transformed]}."
            )
        return transformed

    def revisit(self, step: Step, *, create_graph: bool, transform: bool = True) -> tuple[Tensor, list[Tensor | None]]:
        """The loss and gradients on a recorded step's batch, in its surroundings, at the model's current weights."""
        if versions_of(step.batch) != step.versions:
            raise TrajectoryError(
                f"A tensor in the batch of training step {step.number + 1} was changed in place after the step. The step "
                "is replayed on the recorded batch, which is kept by reference: pass a fresh tensor to each step, or a "
                "clone of a buffer that is used again."
            )
        self.set_surroundings(step.surroundings)
        return self.gradients(step.batch, create_graph=create_graph, transform=transform)

    def replay(self, step: Step, state: State) -> State:
        """The state after a recorded step, computed again from the one before."""
        self.load(state)
        _, grads = self.revisit(step, create_graph=False)
        return replace(self.advance(state, grads, step), buffers=self.buffers())

    def advance(self, state: State, grads: Sequence[Tensor | None], step: Step) -> State:
        """The update rule on every bucket that has gradients. Buffers are left out."""
        state = self.refine(state, [g is not None for g in grads])
        params, rule_states = [], []
        with torch.no_grad():
            for bucket, param, rule_state in zip(state.buckets, state.params, state.rule_states):
                if grads[bucket.indices[0]] is not None:
                    grad = bucket.gather(grads)  # type: ignore[arg-type]
                    param, rule_state = self.rule.update(param, grad, rule_state, self.settings(bucket, step))
                params.append(param)
                rule_states.append(rule_state)
        return State(state.buckets, tuple(params), tuple(rule_states), None)

    def traced_update(
        self, bucket: Bucket, param: Tensor, grads: Sequence[Tensor | None], rule_state: RuleState, step: Step
    ) -> TracedUpdate:
        """The update rule on one bucket as :meth:`advance` calls it, to be differentiated."""
        with torch.enable_grad():
            param, grad = autodiff.leaf(param), autodiff.leaf(bucket.gather(grads))  # type: ignore[arg-type]
            state = {k: autodiff.leaf(v) for k, v in rule_state.items() if _is_float(v)}
            tuned = {
                setting: autodiff.leaf(setting.for_bucket(bucket, step.number))
                for setting in self.hyperparameters.of_group[bucket.group]
            }
            new_param, new_state = self.rule.update(param, grad, {**rule_state, **state}, self.settings(bucket, step, tuned))
        return TracedUpdate(param, grad, state, tuned, new_param, {k: v for k, v in new_state.items() if _is_float(v)})

    def settings(self, bucket: Bucket, step: Step, tuned: Mapping[TunedSetting, Tensor] | None = None) -> dict[str, Any]:
        """The settings of a bucket at a step, with the tuned ones in their place (or those given as ``tuned``)."""
        settings = dict(step.settings[bucket.group])
        for setting in self.hyperparameters.of_group[bucket.group]:
            value = setting.for_bucket(bucket, step.number) if tuned is None else tuned[setting]
            factor = setting.factor(step.settings[bucket.group])
            write_setting(settings, setting.spec.name, value if factor == 1.0 else value * factor)
        return settings

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


def _differ(a: Tensor, b: Tensor) -> Tensor:
    if a.device.type == "cpu" and torch.equal(a, b):
        return torch.tensor(False)
    return ((a != b) & ~(a.isnan() & b.isnan())).any()


def _joined_scalars(bucket: Bucket, held: Mapping[int, Tensor]) -> Tensor:
    """One number for the bucket where its parameters agree, else a vector that repeats each parameter's own."""
    values = list(held.values())
    if all(value.ndim == 0 and torch.equal(value, values[0]) for value in values):
        return values[0].clone()
    spread = [value.expand(shape).reshape(-1) for value, shape in zip(values, bucket.layout.shapes)]
    return torch.cat(spread).to(bucket.device).view(bucket.shape)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _plain(value: Any) -> Any:
    """A setting that cannot change later: torch takes ``lr`` as a tensor, which schedulers write in place."""
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 else value


def check_loss(loss: Any, name: str) -> None:
    """Refuses what cannot be differentiated.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: if it is not a scalar, or has no graph.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{name}(model, batch) returned {type(loss).__name__}, expected a scalar tensor. Return the loss itself, "
            "not loss.item() or a tuple."
        )
    if loss.numel() != 1:
        raise ValueError(
            f"{name}(model, batch) returned a tensor of shape {tuple(loss.shape)}, expected a scalar. Reduce it with "
            ".mean() or .sum()."
        )
    if not loss.requires_grad:
        raise ValueError(
            f"{name}(model, batch) returned a tensor without a graph: nothing in it depends on a parameter that requires "
            "a gradient. Likely causes: .detach(), .item(), torch.no_grad() inside, or a model that is frozen as a whole."
        )
