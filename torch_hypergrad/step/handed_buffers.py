"""What modules have in the place of their buffers while a loss is traced."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..ground.autodiff import leaf
from .live_model import LiveModel, is_compiled


class HandedBuffers:
    """Leaves of a loss's graph, in the same memory as the buffers: through them goes what reads an attribute.

    ``moving`` are the places, among all buffers, of those that move by rules; modules that share a buffer
    share its place. ``leaves`` are theirs: none where modules are compiled, as compiled graphs depend on all
    that they are given.

    Args:
        floats: the places of all floating-point buffers.
        moving: of those that move by rules.
    """

    def __init__(self, live: LiveModel, floats: Iterable[int], moving: Iterable[int]) -> None:
        self._places = {i: live.buffer_places[i] for i in floats}
        self._own: dict[int, Any] = {i: module._buffers[name] for i, (module, name) in self._places.items()}
        self._known = {id(buffer): i for i, buffer in self._own.items()}
        common = {i: self._known[id(self._own[i])] for i in moving}
        self.moving = list(dict.fromkeys(common.values()))
        is_handed = not any(map(is_compiled, live.modules))
        self.leaves = {i: leaf(self._own[i]) for i in self.moving if is_handed}
        self._known |= {id(handed): i for i, handed in self.leaves.items()}
        self._of_module: dict[nn.Module, dict[str, Tensor]] = {}
        for i, place in common.items() if is_handed else ():
            module, name = self._places[i]
            self._of_module.setdefault(module, {})[name] = self.leaves[place]
        self._instead: dict[tuple[nn.Module, str], Any] = {}

    def find(self, **buffers: Tensor | None) -> dict[str, int]:
        """The places of buffers that a function was given; empty if they are not all the model's."""
        found = {name: self._known.get(id(buffer), -1) for name, buffer in buffers.items()}
        return found if min(found.values()) >= 0 else {}

    def own(self, i: int) -> Tensor:
        """The buffer itself, as it is now."""
        module, name = self._places[i]
        now = module._buffers[name]
        return self._instead[module, name] if now is self.leaves.get(i) else now  # type: ignore[return-value]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the modules have the leaves."""
        for module in self._of_module:
            self.take(module)
        try:
            yield
        finally:
            for module in self._of_module:
                self.give_back(module)

    def take(self, module: nn.Module) -> None:
        """Puts the leaves into a module, in the place of whatever it has."""
        for name, handed in self._of_module.get(module, {}).items():
            if module._buffers[name] is not handed:
                self._instead[module, name] = module._buffers[name]
                module._buffers[name] = handed

    def give_back(self, module: nn.Module, *_: Any) -> None:
        """A module has its own buffers again, for a call that writes to them."""
        for name, handed in self._of_module.get(module, {}).items():
            if module._buffers[name] is handed:
                module._buffers[name] = self._instead[module, name]
