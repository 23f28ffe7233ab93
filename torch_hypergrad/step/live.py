"""The model and the wrapped optimizer, as they stand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from operator import is_
from typing import Any

import torch
from torch import Tensor

from .batch import recorded, seen
from .live_model import LiveModel
from .live_optimizer import LiveOptimizer
from .state import Buffers, Part, PerParameter, State, Step


class Live:
    """What a state is read from and written to."""

    def __init__(self, model: LiveModel, optimizer: LiveOptimizer) -> None:
        self.model, self.optimizer = model, optimizer
        self.params = model.params
        self._settings: tuple[dict[str, Any], ...] = ()
        self._written: State | None = None
        self._pieces: list[Tensor] = []  # of what was written
        self._standing: State | None = None

    def state(self) -> State:
        """The current state; what has changed since the last :meth:`write` is copied, the rest is shared."""
        held, written = self.optimizer, self._written
        if held.replaced():
            held.adopt()
        unchanged = (
            written is not None
            and tuple(part.bucket for part in written.parts) == held.buckets
            and self.model.holds(self._pieces)
        )
        params = (
            written.params  # type: ignore[union-attr]
            if unchanged
            else [bucket.gather([p.detach() for p in self.params]) for bucket in held.buckets]
        )
        return State(tuple(map(Part, held.buckets, params, held.rule_states)), self.model.buffers())

    @contextmanager
    def at(
        self, state: State, moved_by: tuple[PerParameter, Tensor] | None = None, *, with_buffers: bool = True
    ) -> Iterator[None]:
        """Inside, the parameters are ``state``'s own memory, and the buffers have its values.

        Next to nothing is copied, and graphs made here stay valid when training goes on: they are gone back
        through inside another such block. Parameters must not be written to.

        Args:
            moved_by: a direction, one tensor for each parameter (None: zeros), and how far to go along it.
            with_buffers: if not, the buffers are left as they are.
        """
        if state is self._standing and moved_by is None:
            if with_buffers and state.buffers is not None:
                self.model.set_buffers(state.buffers)
            yield
            return
        values = self._pieces_of(state)
        if moved_by is not None:
            direction, distance = moved_by
            values = [
                p if v is None else torch.addcmul(p, v, distance.to(v)) for p, v in zip(values, direction)
            ]
        before = self.model.point_to(values)
        try:
            if with_buffers and state.buffers is not None:
                self.model.set_buffers(state.buffers)
            yield
        finally:
            self.model.point_back(before)

    @contextmanager
    def standing(self, state: State) -> Iterator[None]:
        """Inside, the parameters are those of ``state`` and nobody writes to them: to be :meth:`at` it,
        nothing has to be pointed elsewhere."""
        self._standing = state
        try:
            yield
        finally:
            self._standing = None

    def load(self, state: State) -> None:
        """Puts parameters and buffers into the model."""
        self.model.write_params(self._pieces_of(state))
        if state.buffers is not None:
            self.model.set_buffers(state.buffers)

    def write(self, state: State) -> None:
        """Puts parameters into the model, and the rule's states into the optimizer in torch's own format."""
        self._pieces = self._pieces_of(state)
        self._written = state
        self.model.write_params(self._pieces)
        self.optimizer.write(state.parts)
        self.model.mark_written()

    def _pieces_of(self, state: State) -> list[Tensor]:
        """The parameters as views in their own shapes, which are at hand for the state written last."""
        written = () if self._written is None else self._written.params
        if len(written) == len(state.params) and all(map(is_, written, state.params)):
            return self._pieces
        return state.per_parameter(len(self.params))  # type: ignore[return-value]

    def reset(self, state: State) -> None:
        """Makes ``state`` the current one, whatever was there before."""
        self.load(state)
        self.optimizer.reset(state.parts)
        self.model.mark_written()

    def forget(self) -> None:
        """The parameters will be written to by the optimizer itself."""
        self._written = None

    @contextmanager
    def undone_on_error(self, step: Step, buffers: Buffers | None) -> Iterator[None]:
        """Puts buffers, modes and random number generators back if ``step``, just begun, fails."""
        try:
            yield
        except BaseException:
            self.model.set_buffers(buffers or ())
            self.model.set_surroundings(step.surroundings)
            raise

    @contextmanager
    def preserved(self) -> Iterator[None]:
        """Restores parameters, buffers, modes and random number generators at the end."""
        state, surroundings = self.state(), self.model.surroundings()
        try:
            yield
        finally:
            self.load(state)
            self.model.set_surroundings(surroundings)
            self.model.mark_written()

    def begin(self, number: int, batch: Any, tampered: Tensor | None) -> Step:
        """A step about to be taken.

        Raises:
            ValueError: if the optimizer has other parameters than when it was wrapped.
        """
        groups = self.optimizer.optimizer.param_groups
        held = [p for group in groups for p in group["params"]]
        if len(held) != len(self.params) or any(a is not b for a, b in zip(held, self.params)):
            raise ValueError(
                "The optimizer's param groups hold other parameters than when it was wrapped: a group or "
                "parameter was added or replaced after the HyperOptimizer was made, and would not be "
                "trained. Make a new HyperOptimizer, or change the model before."
            )
        settings = tuple({k: _plain(v) for k, v in g.items() if k != "params"} for g in groups)
        if settings != self._settings:
            self._settings = settings
        own = recorded(batch)
        return Step(
            number, own, seen(own), self.model.surroundings(), self._settings, given=batch, tampered=tampered
        )


def _plain(value: Any) -> Any:
    """A setting that cannot change later: torch takes ``lr`` as a tensor, which schedulers write in place."""
    return float(value) if isinstance(value, Tensor) and value.numel() == 1 else value
