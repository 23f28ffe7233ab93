"""Tensors moved to host memory while the device computes on, and fetched back ahead of use."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

Pairs: TypeAlias = Sequence[tuple[Tensor, Tensor]]
"""Targets and sources of copies."""


class Copies(Protocol):
    """Copies between one device and host memory, in the order in which they are asked for."""

    def to_host(self, like: Tensor) -> Tensor:
        """Host memory to copy ``like`` to."""

    def beside(self, pairs: Pairs) -> Any:
        """Starts copies that come after all computed so far, beside what is computed next. Returns what to
        wait for."""

    def between(self, pairs: Pairs) -> Any:
        """The same as a part of the computation: what is computed next comes after them."""

    def wait(self, event: Any) -> None:
        """Lets what is computed from now on come after the copies. Python does not wait."""


class CudaCopies:
    """A side stream, whose copies overlap with the computation of the current stream."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def to_host(self, like: Tensor) -> Tensor:
        # Only pinned memory can be copied to without waiting. torch's host allocator keeps what is given back
        # for the next snapshot of the size, and gives it out again only when the copies that use it have
        # ended.
        return torch.empty_like(like, device="cpu", pin_memory=True)

    def beside(self, pairs: Pairs) -> torch.cuda.Event:
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            _copy(pairs)
        return self._stream.record_event()

    def between(self, pairs: Pairs) -> torch.cuda.Event:
        _copy(pairs)
        return torch.cuda.current_stream(self._device).record_event()

    def wait(self, event: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(event)


class PlainCopies:
    """Copies to and from a device without streams of its own: one after the other."""

    def to_host(self, like: Tensor) -> Tensor:
        return torch.empty_like(like, device="cpu")

    def beside(self, pairs: Pairs) -> None:
        for target, source in pairs:
            target.copy_(source)

    between = beside

    def wait(self, event: None) -> None:
        """They are there."""


def copies_of(device: torch.device) -> Copies | None:
    """How to copy from and to ``device``; None for what lies in host memory already."""
    if device.type == "cpu":
        return None
    return CudaCopies(device) if device.type == "cuda" else PlainCopies()


class Parked:
    """A tree whose tensors are in host memory; ``rest`` goes with it as it is."""

    def __init__(
        self, leaves: list[Any], devices: list[torch.device | None], spec: TreeSpec, rest: Any
    ) -> None:
        self.leaves, self.devices, self.spec, self.rest = leaves, devices, spec, rest


Transfer: TypeAlias = tuple[Copies, Any, Pairs]
"""Copies on their way: who makes them, what to wait for, and the tensors."""


class Offload:
    """Moves trees of tensors to host memory and back.

    No tensor is marked with ``record_stream``: memory so marked is given out again only when Python sees that
    the copy has ended, and Python runs far ahead of the device. Instead, sources are held until the
    computation has been told to come after their copies, one snapshot later, and what is fetched is allocated
    by the computation, which has waited for the copy before anybody can give it back. So memory is reused in
    the order of the computation, and a copy slower than a step slows the steps down instead of piling up.
    """

    def __init__(self, copies_of: Callable[[torch.device], Copies | None] = copies_of) -> None:
        self._make, self._copies = copies_of, dict[torch.device, "Copies | None"]()
        self._leaving: list[Transfer] = []
        self._coming: dict[Parked, tuple[list[Any], list[Transfer]]] = {}

    def moves(self, tree: Any) -> bool:
        """Whether ``tree`` has a tensor that is not in host memory."""
        return any(
            isinstance(leaf, Tensor) and self._of(leaf.device) is not None for leaf in tree_flatten(tree)[0]
        )

    def park(self, tree: Any, rest: Any = None, *, beside: bool = True) -> Parked:
        """Moves ``tree`` to host memory.

        Args:
            beside: while the computation goes on, for which nobody may write to the tensors.
        """
        if beside:
            self.settle()
        leaves, spec = tree_flatten(tree)
        devices = [
            leaf.device if isinstance(leaf, Tensor) and self._of(leaf.device) is not None else None
            for leaf in leaves
        ]
        hosts = [leaf if d is None else self._of(d).to_host(leaf) for leaf, d in zip(leaves, devices)]  # type: ignore[union-attr]
        started = self._start(hosts, leaves, devices, beside=beside)
        if beside:
            self._leaving += started
        return Parked(hosts, devices, spec, rest)

    def fetch(self, parked: Parked) -> None:
        """Starts to bring ``parked`` back."""
        if parked not in self._coming:
            found = [
                leaf if device is None else torch.empty_like(leaf, device=device, pin_memory=False)
                for leaf, device in zip(parked.leaves, parked.devices)
            ]
            self._coming[parked] = found, self._start(found, parked.leaves, parked.devices, beside=True)

    def restored(self, parked: Parked) -> Any:
        """The tree, on the devices it came from."""
        self.fetch(parked)
        found, transfers = self._coming.pop(parked)
        _wait(transfers)
        return tree_unflatten(found, parked.spec)

    def drop_fetched(self) -> None:
        """Forgets what was fetched and not asked for."""
        for _, transfers in self._coming.values():
            _wait(transfers)
        self._coming.clear()

    def settle(self) -> None:
        """Lets what is computed from now on come after what is being moved out, whose memory is given back
        then."""
        _wait(self._leaving)
        self._leaving = []

    def _start(
        self,
        targets: Sequence[Any],
        sources: Sequence[Any],
        devices: Sequence[torch.device | None],
        *,
        beside: bool,
    ) -> list[Transfer]:
        transfers: list[Transfer] = []
        for device in dict.fromkeys(d for d in devices if d is not None):
            copies = self._of(device)
            assert copies is not None
            pairs = [(t, s) for t, s, d in zip(targets, sources, devices) if d == device]
            transfers.append((copies, copies.beside(pairs) if beside else copies.between(pairs), pairs))
        return transfers

    def _of(self, device: torch.device) -> Copies | None:
        if device not in self._copies:
            self._copies[device] = self._make(device)
        return self._copies[device]


def _copy(pairs: Pairs) -> None:
    for target, source in pairs:
        target.copy_(source, non_blocking=True)


def _wait(transfers: Sequence[Transfer]) -> None:
    for copies, event, _ in transfers:
        copies.wait(event)
