"""The model as it stands: parameters, buffers, modes and random number generators."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from . import readings
from .buckets import Bucket
from .host_memory import same_bits
from .records import Surroundings
from .vectors import aligned, has_views, laid_out_as


class ModelState:
    """Reads and writes what a training loss depends on besides its batch.

    Args:
        modules: the model and every module that is tuned.
        params: the optimizer's parameters, in order.
        names: their names in the model.
        tuned: the tuned tensors of the training loss.
    """

    def __init__(
        self, modules: Sequence[nn.Module], params: Sequence[Tensor], names: Sequence[str], tuned: Sequence[Tensor]
    ) -> None:
        self.params, self.names, self._tuned = list(params), list(names), list(tuned)
        self._modules = list(dict.fromkeys(m for root in modules for m in root.modules()))
        self._buffers = [(module, name) for module in self._modules for name in module._buffers]
        self._devices = sorted({p.device for p in self.params if p.device.type != "cpu"}, key=str)
        self._surroundings: Surroundings | None = None
        self._last_buffers: list[Tensor | None] = []
        self.recurrent = any(isinstance(module, nn.RNNBase) for module in self._modules)
        self.mark_written()

    def write_params(self, buckets: Sequence[Bucket], params: Sequence[Tensor], *, counted: bool) -> None:
        """Copies the buckets' vectors into the parameters.

        Args:
            counted: whether version counters move, by which autograd refuses graphs made before.
        """
        targets, sources = [], []
        for bucket, param in zip(buckets, params):
            for i, piece in bucket.scatter(param):
                targets.append(self.params[i] if counted else self.params[i].data)
                sources.append(piece)
        if targets:
            with torch.no_grad():
                torch._foreach_copy_(targets, sources)

    def holds(self, buckets: Sequence[Bucket], params: Sequence[Tensor]) -> bool:
        """Whether the parameters have the values of the buckets' vectors. Only a CPU can tell without waiting."""
        return all(map(readings.at_once, self.params)) and all(
            same_bits(self.params[i].detach(), piece)
            for bucket, param in zip(buckets, params)
            for i, piece in bucket.scatter(param)
        )

    def point_to(self, values: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        """Makes ``values`` the parameters' own memory, and gives what :meth:`point_back` needs.

        The parameters stay the same objects, with the same version counters. Where somebody else holds a view of a
        parameter's memory, which has to show the same values, these are copied there instead.
        """
        viewed = [has_views(p) for p in self.params]
        # All memory is taken before anything is changed, so that nothing has changed if there is not enough.
        placed = [value if kept else laid_out_as(aligned(value), p) for p, value, kept in zip(self.params, values, viewed)]
        before = [(p.data, p.detach().clone() if kept else None) for p, kept in zip(self.params, viewed)]
        for p, value, (own, content) in zip(self.params, placed, before):
            if content is None:
                p.data = value
            else:
                own.copy_(value)
        return before

    def point_back(self, before: Sequence[tuple[Tensor, Tensor | None]]) -> None:
        """Gives the parameters their own memory again, as it was."""
        for p, (own, content) in zip(self.params, before):
            if content is not None:
                own.copy_(content)
            p.data = own

    def mark_written(self) -> None:
        """Takes the parameters as they are now for what :meth:`changed` compares with."""
        self._written = [(p.data_ptr(), p._version) for p in self.params]

    def changed(self) -> str | None:
        """The name of a parameter that somebody else has written to since :meth:`mark_written`, or None."""
        for name, p, written in zip(self.names, self.params, self._written):
            if (p.data_ptr(), p._version) != written:
                return name
        return None

    def buffers(self) -> tuple[Tensor | None, ...]:
        """Copies of the buffers of all modules; on a CPU, those that have not changed since the last call are shared.

        Version counters are no help: BatchNorm writes its statistics without a trace.
        """
        found = [module._buffers[name] for module, name in self._buffers]
        before = self._last_buffers or [None] * len(found)
        self._last_buffers = [_copy(buffer, last) for buffer, last in zip(found, before)]
        return tuple(self._last_buffers)

    def set_buffers(self, buffers: Sequence[Tensor | None]) -> None:
        """Puts buffers into the modules."""
        for (module, name), saved in zip(self._buffers, buffers):
            buffer = module._buffers[name]
            if buffer is None or saved is None or buffer.shape != saved.shape or buffer.dtype != saved.dtype:
                module._buffers[name] = None if saved is None else saved.clone()
            else:
                with torch.no_grad():
                    buffer.copy_(saved)

    @contextmanager
    def copied_buffers(self) -> Iterator[None]:
        """Inside, the modules have copies of their buffers, which graphs made here keep for themselves. At the end the
        buffers are the same tensors as before, with the values that the copies have by then."""
        places = [(module, name, module._buffers[name]) for module, name in self._buffers]
        copies = {id(buffer): buffer.detach().clone() for _, _, buffer in places if buffer is not None}
        for module, name, buffer in places:
            if buffer is not None:
                module._buffers[name] = copies[id(buffer)]
        try:
            yield
        finally:
            for module, name, buffer in places:
                if buffer is not None and module._buffers[name] is copies[id(buffer)]:
                    buffer.data.copy_(copies[id(buffer)])
                    module._buffers[name] = buffer

    @contextmanager
    def unwritten(self) -> Iterator[None]:
        """Refuses what writes to the parameters inside.

        Raises:
            ValueError: with the name of the first.
        """
        before = [(p._version, p.data) for p in self.params]
        yield
        for name, p, (version, data) in zip(self.names, self.params, before):
            if p._version != version or (p.data_ptr() != data.data_ptr() and not torch.equal(p.detach(), data)):
                raise ValueError(
                    f"train_loss wrote to the parameter {name!r}. A training step is the update rule on the weights before "
                    "the loss, so such a write would be lost. Likely causes: an embedding with max_norm, weights clipped or "
                    "normalized in place. Compute the changed weight inside the loss (torch.nn.utils.parametrize), or write "
                    "after a hyper step; with method=Implicit after any step."
                )

    def memory(self) -> Iterator[Tensor]:
        """Every tensor of the modules, and the optimizer's parameters."""
        yield from self.params
        for module in self._modules:
            yield from (p for p in module._parameters.values() if p is not None)
            yield from (b for b in module._buffers.values() if b is not None)
        yield from self._tuned

    def modes(self) -> tuple[bool, ...]:
        """Train or eval mode of every module."""
        return tuple(module.training for module in self._modules)

    def surroundings(self) -> Surroundings:
        """Random number generators and modes as they are now; equal ones share memory."""
        rng = [torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self._devices)]
        now = Surroundings(tuple(rng), self.modes(), tuple(p.requires_grad for p in self.params))
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
            if module.training != mode:  # to set one takes as long as to compare a hundred
                module.training = mode
        for p, trainable in zip(self.params, surroundings.trainable):
            if p.requires_grad != trainable:
                p.requires_grad_(trainable)


def _copy(buffer: Tensor | None, last: Tensor | None) -> Tensor | None:
    if buffer is None:
        return None
    if last is not None and readings.at_once(buffer) and buffer.dtype == last.dtype and torch.equal(buffer, last):
        return last
    return buffer.detach().clone()
