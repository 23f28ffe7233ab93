"""Buffers that move with the weights: how the statistics of normalizations follow from a loss, and what reads
them.

torch writes running statistics outside autograd, and its kernels have no derivative in them. While a loss is
traced, hooks compute beside each call of a module what its buffers are after it, with a graph; and add to
what it returns nothing, but a nothing that depends on the buffers as the output does. Derivatives:
``docs/notation.md``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from ..device.readings import Readings
from ..errors import HypergradientError, NotTwiceDifferentiableError
from ..ground.autodiff import leaf
from .live_model import LiveModel
from .state import Buffers, PerParameter

Values: TypeAlias = Mapping[str, Tensor]
After: TypeAlias = Callable[..., Values]
Reads: TypeAlias = Callable[..., "Tensor | None"]


@dataclass(frozen=True)
class BufferRule:
    """How the buffers of a kind of module move, and how its output depends on them.

    Args:
        after: ``after(module, buffers, *args, **kwargs) -> dict``, the buffers after a call of the module
            with these arguments, in the mode that it is in, in differentiable arithmetic; those that are left
            out do not move.
        reads: ``reads(module, buffers, *args, **kwargs) -> Tensor``, the output of the call as a function of
            the buffers, or None where it does not read them. None: it never does.
    """

    after: After
    reads: Reads | None = None


_RULES: dict[type[nn.Module], BufferRule] = {}


def register_buffers(module_type: type[nn.Module], *, after: After, reads: Reads | None = None) -> None:
    """Says how the floating-point buffers of a kind of module move, so that hypergradients go through them.

    The arguments are those of :class:`BufferRule`. It holds for classes that inherit ``forward`` unchanged.
    Buffers of other modules are constants of differentiation. For :class:`Implicit` each entry must follow
    from the same entry before, linearly, as in a running mean; and a training loss that reads it takes it for
    a constant.

    Example:
        >>> class Center(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.register_buffer("mean", torch.zeros(()))
        ...     def forward(self, x):
        ...         if not self.training:
        ...             return x - self.mean
        ...         self.mean.lerp_(x.detach().mean(), 0.1)
        ...         return x - x.mean()
        >>> register_buffers(
        ...     Center,
        ...     after=lambda m, old, x: {"mean": old["mean"].lerp(x.mean(), 0.1)} if m.training else {},
        ...     reads=lambda m, buffers, x: None if m.training else x - buffers["mean"])
    """
    _RULES[module_type] = BufferRule(after, reads)


def _rule_of(module: nn.Module) -> BufferRule | None:
    kind = type(module)
    base = next((base for base in kind.__mro__ if base in _RULES), None)
    if base is None:
        return None
    if kind.forward is base.forward or kind.__module__.startswith("torch.nn."):
        return _RULES[base]
    warnings.warn(
        f"{kind.__name__} has a forward of its own, so that hypergradients take its running statistics for "
        "constants. Say how they move with torch_hypergrad.register_buffers.",
        stacklevel=5,
    )
    return None


class RunningBuffers:
    """What of a model's buffers has a rule, and which embeddings have a padding row.

    Args:
        readings: where is asked, once a loss was traced, whether the buffers are what the rules say.
    """

    def __init__(self, live: LiveModel, readings: Readings) -> None:
        self.live, self.readings = live, readings
        self.modules: dict[nn.Module, tuple[BufferRule, dict[str, int]]] = {}
        places = {place: i for i, place in enumerate(live.buffer_places)}
        for module in live.modules:
            held = {
                n: places[module, n]
                for n, b in module._buffers.items()
                if b is not None and b.is_floating_point()
            }
            rule = _rule_of(module) if held else None
            if rule is not None:
                self.modules[module] = rule, held
        embeddings = [
            m for m in live.modules if isinstance(m, nn.Embedding) and m._parameters.get("weight") is not None
        ]
        self.padded = [module for module in embeddings if module.padding_idx is not None]
        self.indices = {id(p): i for i, p in enumerate(live.params)}
        self._nothing = Trace(self, {}, [], check=False)

    def __bool__(self) -> bool:
        """Whether any buffer has a rule."""
        return bool(self.modules)

    @property
    def places(self) -> set[int]:
        """Where the buffers with a rule stand among all."""
        return {i for _, held in self.modules.values() for i in held.values()}

    def trace(self, *, buffers: bool, padding: bool = False, check: bool = True) -> Trace:
        """To trace one loss with.

        Args:
            buffers: trace the buffers.
            padding: trace the padding rows of embeddings: second derivatives leave them out.
            check: ask whether the buffers are what their rules say; not in what is recorded to be replayed.
        """
        modules, padded = self.modules if buffers else {}, self.padded if padding else []
        return Trace(self, modules, padded, check=check) if modules or padded else self._nothing

    def _padding_rows(self) -> list[tuple[int, int]]:
        """For each embedding with a padding row, the number of its parameter, and of the row."""
        found = [(self.indices.get(id(module.weight), -1), module.padding_idx) for module in self.padded]
        return [(i, row) for i, row in found if i >= 0 and row is not None]

    def without_padding(self, v: PerParameter) -> list[Tensor | None]:
        """``v`` without the padding rows, which the gradient of an embedding does not have."""
        kept = list(v)
        for i, row in self._padding_rows():
            part = kept[i]
            if part is not None:
                kept[i] = part = part.clone()
                part[row] = 0
        return kept

    def refuse_moving_padding(self, grads: PerParameter) -> None:
        """Refuses a padding row with a gradient, where derivatives of gradients are taken for symmetric: the
        gradient that torch gives is then none of any function."""
        found = [(grads[i], row) for i, row in self._padding_rows()]
        rows = [g[row].detach().abs().amax() for g, row in found if g is not None]
        if rows:
            self.readings.ask(rows, _refuse_padding)


def _refuse_padding(sizes: Sequence[float]) -> None:
    if any(size > 0 for size in sizes):
        raise NotTwiceDifferentiableError(
            "The row padding_idx of an embedding gets a gradient, as it does where a head shares the "
            "embedding's weight: then torch's gradient is not that of any loss, and its derivative is not "
            "symmetric, as second_order='forward' and 'finite_difference' need it. Use "
            "second_order='reverse', or leave out padding_idx."
        )


class Call(NamedTuple):
    """One call of a module whose buffers have a rule."""

    rule: BufferRule
    held: Mapping[str, int]
    module: nn.Module
    args: Any
    kwargs: Any

    def buffers(self, values: Mapping[int, Tensor]) -> Values:
        """The module's own among all."""
        return {name: values[i] for name, i in self.held.items()}


class Trace:
    """How buffers followed from one loss.

    ``before`` are the buffers with a rule before the loss, by place, leaves of its graph; ``after`` the same
    after it, with graph; ``pads`` for each embedding with a padding row the number of its parameter (-1: none
    of the optimizer's) and the row as it was read; ``num_padded`` counts calls of these.
    """

    def __init__(
        self,
        running: RunningBuffers,
        modules: Mapping[nn.Module, Any],
        padded: Sequence[nn.Embedding],
        *,
        check: bool,
    ) -> None:
        self._running, self._modules, self._padded, self._check = running, modules, padded, check
        self._calls: list[Call] = []
        self._calls_again: list[nn.Module] = []
        self._is_computed = self._is_over = self._reads_moved = False
        self.num_padded = 0
        self.before = {i: leaf(module._buffers[name].clone()) for module, name, i in self._held()}  # type: ignore[union-attr]
        self.after: dict[int, Tensor] = dict(self.before)
        self.pads = {
            m: (running.indices.get(id(m.weight), -1), leaf(m.weight[m.padding_idx])) for m in padded
        }

    def hooked(self) -> AbstractContextManager[Any]:
        """Inside, calls of the modules are followed. Backward passes may call them again (checkpointing), so
        they belong inside another such block."""
        if not self._modules and not self._padded:
            return nullcontext()
        stack = ExitStack()
        for module, (rule, held) in self._modules.items():
            hook = partial(self._follow, rule, held)
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        for module in self._padded:
            stack.callback(module.register_forward_hook(self._pad).remove)
        return stack

    def computed(self) -> None:
        """The loss has been computed: what is called from now on is called again, by its gradient
        (checkpointing)."""
        self._is_computed = True

    def refuse_reading_moved(self) -> None:
        """Refuses a loss whose gradient would go through buffers, as that of the user's training does not.

        Raises:
            HypergradientError: if so.
        """
        if self._reads_moved:
            raise HypergradientError(
                "The training loss calls a module that reads buffers which an earlier call in the same loss "
                "has moved: BatchNorm in evaluation mode after a call in train mode, for instance. "
                "Hypergradients do not go through that. Call it in one mode, or give it the batches at once."
            )

    def end(self) -> None:
        """The gradient has been computed too. Modules that it called again have moved their buffers once
        more, by the same statistics."""
        self._is_over = True
        waiting = {
            module: [call for call in self._calls if call.module is module] for module in self._modules
        }
        for module in self._calls_again:
            call = waiting[module].pop(0)
            waiting[module].append(call)
            self._move(call)
        if self.before and self._check:
            ratios = [self._mismatch(module, name, i) for module, name, i in self._held()]
            self._running.readings.ask([torch.stack([r.to(ratios[0]) for r in ratios])], self._refuse)

    def _held(self) -> list[tuple[nn.Module, str, int]]:
        return [(module, name, i) for module, (_, held) in self._modules.items() for name, i in held.items()]

    def _mismatch(self, module: nn.Module, name: str, i: int) -> Tensor:
        """How far a buffer is from what its rule says, in units of what rounding may do."""
        said, actual = self.after[i].detach(), module._buffers[name]
        tolerance = torch.finfo(said.dtype).eps ** 0.5 * (1 + said.abs().amax())
        return ((actual - said).abs().amax() / tolerance).detach()  # type: ignore[operator]

    def _refuse(self, ratios: Sequence[float]) -> None:
        for (module, name, _), ratio in zip(self._held(), ratios):
            if ratio > 1:
                raise HypergradientError(
                    f"The buffer {name!r} of a {type(module).__name__} is not what it should be after the "
                    "loss, so its derivative would be wrong. Likely causes: somebody else writes to it, "
                    "modules share it, the module is compiled or called through torch.func.functional_call, "
                    "or a rule of register_buffers says something else than forward does."
                )

    def _follow(
        self,
        rule: BufferRule,
        held: Mapping[str, int],
        module: nn.Module,
        args: Any,
        kwargs: Any,
        output: Any,
    ) -> Any:
        """After a call of a module: moves its buffers on, and gives the output their derivative."""
        call = Call(rule, held, module, args, kwargs)
        now = call.buffers(self.before if self._is_computed else self.after)
        read = None if rule.reads is None else rule.reads(module, now, *args, **kwargs)
        if read is not None and rule.reads is not None:
            self._reads_moved |= any(self.after[i] is not self.before[i] for i in held.values())
            fixed = {name: buffer.detach() for name, buffer in now.items()}
            same = rule.reads(module, fixed, *args, **kwargs)
            output = output + (read - same).to(output.dtype)  # type: ignore[operator]
        if not self._is_computed:
            self._calls.append(call)
            self._move(call)
        else:
            rule.after(module, now, *args, **kwargs)  # as checkpointing needs it: what was done before
            if not self._is_over:
                self._calls_again.append(module)
        return output

    def _move(self, call: Call) -> None:
        moved = call.rule.after(call.module, call.buffers(self.after), *call.args, **call.kwargs)
        self.after.update({call.held[name]: value for name, value in moved.items()})

    def _pad(self, module: nn.Embedding, args: Any, output: Tensor) -> Tensor:
        """After a call of an embedding: gives the padding row that was read its derivative."""
        self.num_padded += not self._is_computed
        return torch.where((args[0] == module.padding_idx)[..., None], self.pads[module][1], output)

    @property
    def leaves(self) -> list[Tensor]:
        """What the loss read besides parameters and tuned tensors: buffers, then padding rows."""
        return [*self.before.values(), *(row for _, row in self.pads.values())]

    def at(self, buffers: Buffers | None) -> list[Tensor | None]:
        """One tensor for each of ``after``, of one for each buffer; None for zero."""
        return [None if buffers is None else buffers[i] for i in self.after]

    def placed(self, tensors: Sequence[Tensor | None]) -> Buffers:
        """The transpose: one tensor for each buffer, of one for each of ``before``."""
        found = dict(zip(self.before, tensors))
        return tuple(found.get(i) for i in range(len(self._running.live.buffer_places)))

    def row_tangents(self, tangents: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The tangents of the padding rows, of those of the parameters."""
        whole = [(m, None if i < 0 else tangents[i]) for m, (i, _) in self.pads.items()]
        return [None if tangent is None else tangent[m.padding_idx] for m, tangent in whole]

    def add_rows(self, products: list[Tensor | None], rows: Sequence[Tensor | None]) -> None:
        """The transpose: adds what belongs to padding rows to the products of their parameters."""
        for (module, (i, _)), row in zip(self.pads.items(), rows):
            if row is not None and i >= 0:
                before = products[i]
                whole = torch.zeros_like(module.weight.detach()) if before is None else before.clone()
                whole[module.padding_idx] += row
                products[i] = whole


# ---- the normalizations of torch -------------------------------------------------------------------------


def _moved(module: Any, buffers: Values, mean: Tensor, var: Tensor, weight: float | Tensor) -> Values:
    stats = {"running_mean": mean, "running_var": var}
    return {name: buffers[name] + (stat - buffers[name]) * weight for name, stat in stats.items()}


def batch_norm_after(module: _BatchNorm, buffers: Values, x: Tensor) -> Values:
    """``r' = (1 - m) r + m stat``, with the unbiased variance; a momentum of None takes ``m = 1 / number of
    calls``."""
    if not module.training or not module.track_running_stats or module.running_mean is None:
        return {}
    dims = [d for d in range(x.ndim) if d != 1]
    var, mean = torch.var_mean(x.to(buffers["running_mean"].dtype), dims)
    weight: Any = module.momentum
    if weight is None:
        weight = 1 / module.num_batches_tracked.to(mean)  # type: ignore[union-attr]  # forward has counted this call
    return _moved(module, buffers, mean, var, weight)


def instance_norm_after(module: _InstanceNorm, buffers: Values, x: Tensor) -> Values:
    """The same with the mean over the examples of each one's mean and variance."""
    if not module.training or not module.track_running_stats or module.running_mean is None:
        return {}
    x = x if x.dim() > module._get_no_batch_dim() else x[None]
    var, mean = torch.var_mean(x.to(buffers["running_mean"].dtype), list(range(2, x.ndim)))
    return _moved(module, buffers, mean.mean(0), var.mean(0), module.momentum or 0.0)


def norm_reads(module: _NormBase, buffers: Values, x: Tensor) -> Tensor | None:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` in evaluation mode."""
    if module.training or module.running_mean is None:
        return None
    has_batch = not isinstance(module, _InstanceNorm) or x.dim() > module._get_no_batch_dim()
    shape = [-1] + [1] * (x.ndim - (2 if has_batch else 1))
    mean, var = (buffers[name].reshape(shape) for name in ("running_mean", "running_var"))
    y = (x - mean) * (var + module.eps).rsqrt()
    y = y if module.weight is None else y * module.weight.reshape(shape)
    return y if module.bias is None else y + module.bias.reshape(shape)


register_buffers(_BatchNorm, after=batch_norm_after, reads=norm_reads)
register_buffers(_InstanceNorm, after=instance_norm_after, reads=norm_reads)
