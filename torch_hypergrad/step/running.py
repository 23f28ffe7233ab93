"""Buffers that move with the weights: how the statistics of normalizations follow from a loss, and what reads
them.

torch writes running statistics outside autograd, and its kernels have no derivative in them. While a loss is
traced, what the buffers are after each call is computed beside it, with a graph; and to what the call returns
nothing is added, but a nothing that depends on the buffers as the output does. Derivatives:
``docs/notation.md``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..device.readings import Reading, Readings
from ..errors import HypergradientError, NotTwiceDifferentiableError
from ..ground import autodiff
from ..ground.autodiff import leaf
from .buffer_calls import Call, Values, intercepted
from .buffer_rules import BufferRule, rule_of
from .handed_buffers import HandedBuffers
from .live_model import LiveModel
from .state import Buffers, PerParameter, differ


class RunningBuffers:
    """What of a model's buffers moves by rules: what normalizations get as running statistics, and buffers of
    modules that :func:`register_buffers` knows. And padding rows of embeddings, which derivatives of
    gradients leave out.

    Args:
        readings: where is asked, once a loss was traced, whether the buffers are what the rules say.
    """

    def __init__(self, live: LiveModel, readings: Readings) -> None:
        self.live, self.readings = live, readings
        places = {place: i for i, place in enumerate(live.buffer_places)}
        self.floats = {
            i for (m, n), i in places.items() if (b := m._buffers[n]) is not None and b.is_floating_point()
        }
        self.ruled = [(m, rule) for m in live.modules if (rule := rule_of(m)) is not None]
        self.moving = {places[m, name] for m, _ in self.ruled for name in m._buffers} & self.floats
        self.are_intercepted = self.moving != self.floats
        normalizations = [m for m in live.modules if isinstance(m, nn.modules.batchnorm._NormBase)]
        self.moving |= {places[m, name] for m in normalizations for name in m._buffers} & self.floats
        self.indices = {id(p): i for i, p in enumerate(live.params)}
        embeddings = [m for m in live.modules if isinstance(m, nn.Embedding) and m.padding_idx is not None]
        self.padding = {
            (self.indices[id(m.weight)], m.padding_idx) for m in embeddings if id(m.weight) in self.indices
        }
        self._nothing = Trace(self, buffers=False, padding=False, check=False)

    def __bool__(self) -> bool:
        """Whether there may be any."""
        return bool(self.floats)

    @property
    def may_find(self) -> bool:
        """Whether there are buffers that a call may turn out to move."""
        return bool(self.floats - self.moving)

    def trace(self, *, buffers: bool, padding: bool = False, check: bool = True) -> Trace:
        """To trace one loss with.

        Args:
            buffers: trace the buffers; if not, only note whether the loss reads them.
            padding: trace the padding rows of embeddings.
            check: ask whether the buffers are what their rules say; not in what is recorded to be replayed.
        """
        padding = padding and bool(self.padding)
        if not self.floats and not padding:
            return self._nothing
        return Trace(self, buffers=buffers and bool(self.floats), padding=padding, check=check)

    def buffer(self, i: int) -> Tensor:
        """A floating-point buffer as it stands."""
        module, name = self.live.buffer_places[i]
        return module._buffers[name]  # type: ignore[return-value]

    def constants(self, before: Buffers) -> Reading[list[str]]:
        """The names of the buffers that have moved since they were ``before``, and have no rule."""
        places = sorted(self.floats - self.moving)
        pairs = [(before[i], self.buffer(i)) for i in places]
        flags = [
            differ(old, new) if old is not None and old.shape == new.shape else _yes(new)
            for old, new in pairs
        ]
        names = [self.live.buffer_names[i] for i in places]
        return self.readings.ask(flags, lambda moved: [name for name, flag in zip(names, moved) if flag])

    def without_padding(self, v: PerParameter) -> list[Tensor | None]:
        """``v`` without the padding rows, which the gradient of an embedding does not have."""
        kept = list(v)
        for i, row in self.padding:
            part = kept[i]
            if part is not None:
                kept[i] = part = part.clone()
                part[row] = 0
        return kept

    def refuse_moving_padding(self, grads: PerParameter) -> None:
        """Refuses a padding row with a gradient, where derivatives of gradients are taken for symmetric: the
        gradient that torch gives is then none of any function."""
        found = [(grads[i], row) for i, row in self.padding]
        rows = [g[row].detach().abs().amax() for g, row in found if g is not None]
        if rows:
            self.readings.ask(rows, _refuse_padding)


def _yes(like: Tensor) -> Tensor:
    return torch.ones((), dtype=torch.bool, device=like.device)


def _refuse_padding(sizes: Sequence[float]) -> None:
    if any(size > 0 for size in sizes):
        raise NotTwiceDifferentiableError(
            "The row padding_idx of an embedding gets a gradient, as it does where a head shares the "
            "embedding's weight: then torch's gradient is not that of any loss, and its derivative is not "
            "symmetric, as second_order='forward' and 'finite_difference' need it. Use "
            "second_order='reverse', or leave out padding_idx."
        )


class Trace:
    """How buffers followed from one loss.

    ``before`` are the buffers before the loss, by place, leaves of its graph; ``after`` the same after it,
    with graph; ``handed`` what the modules have in their place meanwhile, leaves too; ``rows`` the padding
    rows that were read, leaves as well, by number of parameter and row, and ``num_padded`` the calls that
    read them; ``reads`` is whether the loss reads buffers.
    """

    def __init__(self, running: RunningBuffers, *, buffers: bool, padding: bool, check: bool) -> None:
        self._running, self._buffers, self._padding, self._check = running, buffers, padding, check
        self._calls: dict[tuple[int, ...], list[Call]] = {}
        self._calls_again: list[tuple[int, ...]] = []
        self._is_computed = self._is_over = False
        self._moved, self._read, self._read_late = set[int](), set[int](), set[int]()
        self._is_stale = False
        self.handed = HandedBuffers(running.live, running.floats, running.moving)
        self.before: dict[int, Tensor] = {}
        self.after: dict[int, Tensor] = {}
        self.rows: dict[tuple[int, int], Tensor] = {}
        self.num_padded = 0
        for i in self.handed.moving if buffers else ():
            self._begin(i)

    @property
    def reads(self) -> bool:
        """Whether the loss reads buffers."""
        return bool(self._read)

    @property
    def recomputes(self) -> bool:
        """Whether the gradient made calls again."""
        return bool(self._calls_again)

    def begin(self, **buffers: Tensor | None) -> dict[str, int]:
        """Before a call that is given buffers: where these stand, empty if they are none of the model's."""
        held = self.handed.find(**buffers)
        self._running.moving.update(held.values())
        for i in held.values() if self._buffers else ():
            self._begin(i)
        return held

    def _begin(self, i: int) -> None:
        if i not in self.before:
            self.before[i] = self.after[i] = leaf(self.handed.own(i).clone())

    def hooked(self) -> AbstractContextManager[Any]:
        """Inside, calls are followed. Backward passes may call again (checkpointing), so they belong inside
        another such block."""
        running = self._running
        if not running.floats and not self._padding:
            return nullcontext()
        stack = ExitStack()
        stack.enter_context(self.handed.in_place())
        for module, rule in running.ruled:
            stack.callback(module.register_forward_pre_hook(self.handed.give_back).remove)
            hook = partial(self._follow_module, rule)
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        if running.are_intercepted or self._padding:
            stack.enter_context(intercepted(self))
        return stack

    def computed(self) -> None:
        """The loss has been computed: what is called from now on is called again, by its gradient
        (checkpointing)."""
        self._is_computed = True

    def refuse_reading_moved(self) -> None:
        """Refuses a loss whose own gradient is not what it seems: buffers are read, and written to before the
        gradient is taken.

        Raises:
            HypergradientError: if so.
        """
        if self._is_stale:
            raise HypergradientError(
                "The training loss reads buffers that it also moves, in different calls: a BatchNorm that "
                "is called in evaluation mode and in train mode, for instance. torch's gradient takes what "
                "was read for a constant, and BatchNorm's reads it as it is later. Hypergradients do not go "
                "through that: call the layer in one mode."
            )

    def note_attributes(self, grads: Sequence[Tensor | None]) -> None:
        """Notes which buffers were read as attributes: those of whose leaves the loss has a gradient.

        Raises:
            HypergradientError: if the loss also moves one of them.
        """
        read = {i for i, grad in zip(self.handed.leaves, grads) if grad is not None}
        self._read |= read
        for i in sorted(read & self._moved):
            raise HypergradientError(
                f"A loss reads the attribute {self._running.live.buffer_names[i]!r}, which it also moves by "
                "a call of the layer. Hypergradients do not go through that, as what was read, before or "
                "after, has left no trace. Read it where the layer is called in evaluation mode, or compute "
                "the statistic of the batch itself."
            )

    def end(self) -> None:
        """The gradient has been computed too. Calls that it made again have moved their buffers once more, by
        the same statistics."""
        self._is_over = True
        for places in self._calls_again:
            calls = self._calls[places]
            calls.append(calls.pop(0))
            self._move(calls[-1])
        if self.before and self._check:
            ratios = [self._mismatch(i) for i in self.before]
            self._running.readings.ask([torch.stack([r.to(ratios[0]) for r in ratios])], self._refuse)

    def _mismatch(self, i: int) -> Tensor:
        """How far a buffer is from what its rule says, in units of what rounding may do."""
        said, actual = self.after[i].detach(), self.handed.own(i).detach()
        tolerance = torch.finfo(said.dtype).eps ** 0.5 * (1 + said.abs().amax())
        return (actual - said).abs().amax() / tolerance

    def _refuse(self, ratios: Sequence[float]) -> None:
        for i, ratio in zip(self.before, ratios):
            if ratio > 1:
                module, name = self._running.live.buffer_places[i]
                raise HypergradientError(
                    f"The buffer {name!r} of a {type(module).__name__} is not what it should be after the "
                    "loss, so its derivative would be wrong. Likely causes: somebody else writes to it, "
                    "modules share it, the module is compiled, or a rule of register_buffers says something "
                    "else than forward does."
                )

    def _follow_module(self, rule: BufferRule, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        places = {place: i for i, place in enumerate(self._running.live.buffer_places)}
        held = {name: i for name in module._buffers if (i := places[module, name]) in self._running.floats}

        self.handed.take(module)

        def after(buffers: Values) -> Values:
            return rule.after(module, buffers, *args, **kwargs)

        def reads(buffers: Values) -> Tensor | None:
            return None if rule.reads is None else rule.reads(module, buffers, *args, **kwargs)

        return self.follow(Call(held, after, reads), output)

    def follow(self, call: Call, output: Any) -> Any:
        """After a call: moves its buffers on, and gives the output their derivative."""
        places = tuple(call.held.values())
        if not self._buffers:
            with torch.no_grad():
                if call.reads({name: self.handed.own(i) for name, i in call.held.items()}) is not None:
                    self._read.update(places)
            return output
        now = call.values(self.before if self._is_computed else self.after)
        read = call.reads(now)
        if read is not None:
            self._read.update(places)
            self._read_late.update(places if call.reads_late else ())
            self._is_stale |= not self._moved.isdisjoint(places)
            same = call.reads({name: buffer.detach() for name, buffer in now.items()})
            output = output + (read - same).to(output.dtype)  # type: ignore[operator]
        if self._is_computed:
            call.after(now)  # as checkpointing needs it: what was done before
            self._calls_again += [] if self._is_over else [places]
        else:
            self._calls.setdefault(places, []).append(call)
            self._move(call)
        return output

    def _move(self, call: Call) -> None:
        for name, value in call.after(call.values(self.after)).items():
            self.after[call.held[name]] = value
            self._moved.add(call.held[name])
            self._is_stale |= call.held[name] in self._read_late

    def pad(self, ids: Tensor, weight: Tensor, padding_idx: int, output: Tensor) -> Tensor:
        """After a look-up: gives the padding row that was read its derivative."""
        if not self._padding:
            return output
        key = self._running.indices.get(id(weight), -1), padding_idx % len(weight)
        if key[0] < 0:
            return output
        self._running.padding.add(key)
        if key not in self.rows:
            self.rows[key] = leaf(weight[key[1]])
        self.num_padded += not self._is_computed
        return torch.where((ids == key[1])[..., None], self.rows[key], output)

    @property
    def buffer_leaves(self) -> list[Tensor]:
        """The buffers before the loss, as calls read them and as attributes."""
        return [*self.before.values(), *self.handed.leaves.values()]

    @property
    def leaves(self) -> list[Tensor]:
        """What the loss read besides parameters and tuned tensors: buffers, then padding rows."""
        return [*self.buffer_leaves, *self.rows.values()]

    def of_buffers(self, found: Iterator[Tensor | None]) -> list[Tensor | None]:
        """One tensor for each of ``before``, of those for each of ``buffer_leaves``."""
        by_call, by_attribute = (
            [next(found) for _ in leaves] for leaves in (self.before, self.handed.leaves)
        )
        return autodiff.add_lists([by_call, by_attribute])

    def tangents(self, buffers: Buffers | None, params: PerParameter) -> list[Tensor | None]:
        """The tangents of ``leaves``, of those of all buffers and parameters."""
        places = [*self.before, *self.handed.leaves]
        of_rows = [None if (whole := params[i]) is None else whole[row] for i, row in self.rows]
        return [*(None if buffers is None else buffers[i] for i in places), *of_rows]

    def at(self, buffers: Buffers | None) -> list[Tensor | None]:
        """One tensor for each of ``after``, of one for each buffer; None for zero."""
        return [None if buffers is None else buffers[i] for i in self.after]

    def placed(self, tensors: Sequence[Tensor | None], others: Buffers | None = None) -> Buffers | None:
        """One tensor for each buffer, of one for each of ``before``, and of ``others`` for the buffers that
        the loss had nothing to do with; None if all are zero."""
        found = list(others or [None] * len(self._running.live.buffer_places))
        for i, tensor in zip(self.before, tensors):
            found[i] = tensor
        return None if all(tensor is None for tensor in found) else tuple(found)

    def add_rows(self, products: list[Tensor | None], rows: Sequence[Tensor | None]) -> None:
        """The transpose: adds what belongs to padding rows to the products of their parameters."""
        for (i, row), part in zip(self.rows, rows):
            if part is not None:
                before = products[i]
                whole = torch.zeros_like(self._running.live.params[i]) if before is None else before.clone()
                whole[row] += part
                products[i] = whole
