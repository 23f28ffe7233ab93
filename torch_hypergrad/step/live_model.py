"""The model as it stands: parameters, buffers, modes and random number generators."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..device import readings
from ..device.host_memory import same_bits
from ..ground import autodiff
from ..ground.vectors import aligned, has_views, laid_out_as
from .state import Buffers, Surroundings


class LiveModel:
    """Reads and writes what a training loss depends on besides its batch.

    Args:
        modules: the model and every module that is tuned.
        optimizer: the wrapped optimizer, for its parameters.
        names: their names in the model, one list for each group.
        tuned: the tuned tensors of the training loss.
    """

    def __init__(
        self,
        modules: Sequence[nn.Module],
        optimizer: Optimizer,
        names: Sequence[Sequence[str]],
        tuned: Sequence[Tensor],
    ) -> None:
        self.model = modules[0]
        self.params: list[Tensor] = [p for group in optimizer.param_groups for p in group["params"]]
        self.names, self._tuned = [name for of_group in names for name in of_group], list(tuned)
        self._modules = list(dict.fromkeys(m for root in modules for m in root.modules()))
        self.buffer_places = [(module, name) for module in self._modules for name in module._buffers]
        paths = {id(m): f"{path}." if path else "" for root in modules for path, m in root.named_modules()}
        self.buffer_names = [paths[id(module)] + name for module, name in self.buffer_places]
        self._devices = sorted({p.device for p in self.params if p.device.type != "cpu"}, key=str)
        self._kinds = sorted({"cpu", *(device.type for device in self._devices)})
        self._surroundings: Surroundings | None = None
        self._last_buffers: list[Tensor | None] = []
        self.recurrent = any(isinstance(module, nn.RNNBase) for module in self._modules)
        self.autocast = self._autocast_now()
        self.mark_written()

    @property
    def modules(self) -> list[nn.Module]:
        """Every module that the training loss may call."""
        return self._modules

    def write_params(self, values: Sequence[Tensor]) -> None:
        """Copies values into the parameters. Version counters move, by which autograd refuses graphs made
        before."""
        with torch.no_grad():
            torch._foreach_copy_(self.params, list(values))

    def holds(self, values: Sequence[Tensor]) -> bool:
        """Whether the parameters have these values. Only a CPU can tell without waiting."""
        return all(map(readings.at_once, self.params)) and all(map(same_bits, self.params, values))

    def point_to(self, values: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | None]]:
        """Makes ``values`` the parameters' own memory, and gives what :meth:`point_back` needs.

        The parameters stay the same objects, with the same version counters. Where somebody else holds a view
        of a parameter's memory, which has to show the same values, these are copied there instead.
        """
        viewed = [has_views(p) for p in self.params]
        # All memory is taken before anything is changed, so that nothing has changed if there is not enough.
        placed = [
            value if kept else laid_out_as(aligned(value), p)
            for p, value, kept in zip(self.params, values, viewed)
        ]
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

    def versions(self) -> list[int]:
        """The parameters' version counters."""
        return [p._version for p in self.params]

    @contextmanager
    def at_versions(self, versions: Sequence[int]) -> Iterator[None]:
        """Inside, the parameters have version counters as they once had, so that autograd goes back through a
        graph that was made then: for whoever has brought back the values too."""
        now = self.versions()
        autodiff.set_versions(self.params, versions)
        try:
            yield
        finally:
            autodiff.set_versions(self.params, now)

    def mark_written(self) -> None:
        """Takes the parameters as they are now for what :meth:`changed` compares with."""
        self._written = [(p.data_ptr(), p._version) for p in self.params]

    def changed(self) -> str | None:
        """The name of a parameter that somebody else has written to since :meth:`mark_written`, or None."""
        for name, p, written in zip(self.names, self.params, self._written):
            if (p.data_ptr(), p._version) != written:
                return name
        return None

    def buffers(self) -> Buffers:
        """Copies of the buffers of all modules; on a CPU, those that have not changed since the last call are
        shared.

        Version counters are no help: BatchNorm writes its statistics without a trace.
        """
        found = [module._buffers[name] for module, name in self.buffer_places]
        before = self._last_buffers or [None] * len(found)
        self._last_buffers = [_copy(buffer, last) for buffer, last in zip(found, before)]
        return tuple(self._last_buffers)

    def set_buffers(self, buffers: Sequence[Tensor | None]) -> None:
        """Puts buffers into the modules."""
        for (module, name), saved in zip(self.buffer_places, buffers):
            buffer = module._buffers[name]
            if buffer is None or saved is None or buffer.shape != saved.shape or buffer.dtype != saved.dtype:
                module._buffers[name] = None if saved is None else saved.clone()
            else:
                with torch.no_grad():
                    buffer.copy_(saved)

    @contextmanager
    def copied_buffers(self) -> Iterator[None]:
        """Inside, the modules have copies of their buffers, which graphs made here keep for themselves. At
        the end the buffers are the same tensors as before, with the values that the copies have by then."""
        places = [(module, name, module._buffers[name]) for module, name in self.buffer_places]
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
            if p._version != version or (
                p.data_ptr() != data.data_ptr() and not torch.equal(p.detach(), data)
            ):
                raise ValueError(
                    f"train_loss wrote to the parameter {name!r}. A training step is the update rule on the "
                    "weights before the loss, so such a write would be lost. Likely causes: an embedding "
                    "with max_norm, weights clipped or normalized in place. Compute the changed weight "
                    "inside the loss (torch.nn.utils.parametrize), or write after a hyper step; with "
                    "method=Implicit after any step."
                )

    def memory(self) -> Iterator[Tensor]:
        """Every tensor of the modules, and the optimizer's parameters."""
        yield from self.params
        for module in self._modules:
            yield from (p for p in module._parameters.values() if p is not None)
            yield from (b for b in module._buffers.values() if b is not None)
        yield from self._tuned

    def modes(self) -> Hashable:
        """Train or eval mode of every module, and how losses are cast."""
        return tuple(module.training for module in self._modules), self.autocast

    def rng(self) -> tuple[Tensor, ...]:
        """The states of the random number generators."""
        return torch.get_rng_state(), *(torch.get_device_module(d).get_rng_state(d) for d in self._devices)

    def set_rng(self, rng: Sequence[Tensor]) -> None:
        """Brings back the random number generators."""
        torch.set_rng_state(rng[0].cpu())
        for device, state in zip(self._devices, rng[1:]):
            torch.get_device_module(device).set_rng_state(state.cpu(), device)

    def surroundings(self) -> Surroundings:
        """The surroundings as they are now; equal ones share memory."""
        training = tuple(module.training for module in self._modules)
        trainable = tuple(p.requires_grad for p in self.params)
        now = Surroundings(self.rng(), training, trainable, self.autocast)
        if self._surroundings is None or self._surroundings != now:
            self._surroundings = now
        return self._surroundings

    def set_surroundings(self, surroundings: Surroundings) -> None:
        """Brings surroundings back."""
        self.set_rng(surroundings.rng)
        self.set_modes(surroundings)

    def set_modes(self, surroundings: Surroundings) -> None:
        """The same without the random number generators."""
        self.autocast = surroundings.autocast
        for module, mode in zip(self._modules, surroundings.training):
            if module.training != mode:  # to set one takes as long as to compare a hundred
                module.training = mode
        for p, trainable in zip(self.params, surroundings.trainable):
            if p.requires_grad != trainable:
                p.requires_grad_(trainable)

    def _autocast_now(self) -> tuple[tuple[str, bool, torch.dtype], ...]:
        return tuple((k, torch.is_autocast_enabled(k), torch.get_autocast_dtype(k)) for k in self._kinds)

    @contextmanager
    def autocast_for_losses(self) -> Iterator[None]:
        """Takes the user's autocast for that of losses alone: inside, it is off.

        Autocast is for forward passes. Backward passes and update rules compute in the types that these have;
        and casts of weights, which torch keeps while autocast is on, would outlive the weights.
        """
        before, self.autocast = self.autocast, self._autocast_now()
        try:
            with _autocast([(kind, False, dtype) for kind, _, dtype in self.autocast]):
                yield
        finally:
            self.autocast = before

    @contextmanager
    def casting(self) -> Iterator[None]:
        """Computes as losses are to be cast, with no casts from before, and leaves none."""
        try:
            with _autocast(self.autocast):
                yield
        finally:
            torch.clear_autocast_cache()


def is_compiled(module: nn.Module) -> bool:
    """Whether torch.compile has to do with it."""
    wrapped = type(module).__name__ == "OptimizedModule"
    return wrapped or getattr(module, "_compiled_call_impl", None) is not None


def _autocast(wanted: Iterable[tuple[str, bool, torch.dtype]]) -> AbstractContextManager[Any]:
    """Autocast as it is wanted for each kind of device."""
    contexts = [
        torch.autocast(kind, enabled=enabled, dtype=dtype)
        for kind, enabled, dtype in wanted
        if enabled or torch.is_autocast_enabled(kind)
    ]
    if not contexts:
        return nullcontext()
    torch.clear_autocast_cache()
    stack = ExitStack()
    for context in contexts:
        stack.enter_context(context)
    return stack


def _copy(buffer: Tensor | None, last: Tensor | None) -> Tensor | None:
    if buffer is None:
        return None
    if (
        last is not None
        and readings.at_once(buffer)
        and buffer.dtype == last.dtype
        and torch.equal(buffer, last)
    ):
        return last
    return buffer.detach().clone()
