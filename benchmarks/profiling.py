"""Where a hyper step's time goes, by the names of the functions that it passes through."""

from __future__ import annotations

import pkgutil
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any
from unittest.mock import patch

# A function's time counts for its part, less what it spends inside functions of other parts.
PHASES = {
    "torch_hypergrad.hyper_optimizer:HyperOptimizer.step": "training steps",
    "torch_hypergrad.hyper_optimizer:HyperOptimizer.hypergradient": "hyper step",
}
PARTS = {
    "torch_hypergrad.step.gradient:GradientStage.evaluate": "forward and gradient",
    "torch_hypergrad.step.validation:Objective.at": "forward and gradient",
    "torch_hypergrad.step.update:UpdateStage.apply": "update rule",
    "torch_hypergrad.step.update:UpdateStage.pull": "update rule",
    "torch_hypergrad.step.live:Live.state": "copies",
    "torch_hypergrad.step.live:Live.write": "copies",
    "torch_hypergrad.ground.buckets:Bucket.gather": "copies",
}
OUTSIDE_PARTS = {
    "torch_hypergrad.ground.autodiff:gradients": "double backward"
}  # counts where no part is at work
REST = "rest"
NAMES = ["forward and gradient", "update rule", "double backward", "copies", REST]


class Clock:
    """A stack of what is at work; time goes to its top."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self._stack: list[tuple[str, str]] = []
        self._since = 0.0

    @property
    def idle(self) -> bool:
        """Whether no phase has begun."""
        return not self._stack

    @property
    def between_parts(self) -> bool:
        return bool(self._stack) and self._stack[-1][1] == REST

    @contextmanager
    def at(self, part: str, phase: str | None = None) -> Iterator[None]:
        self._settle()
        self._stack.append((phase or self._stack[-1][0], part))
        try:
            yield
        finally:
            self._settle()
            self._stack.pop()

    def _settle(self) -> None:
        now = time.perf_counter()
        if self._stack:
            self.seconds[self._stack[-1]] += now - self._since
        self._since = now


@contextmanager
def clocked(clock: Clock) -> Iterator[None]:
    """Replaces the named functions by ones that tell the clock."""

    def phase(inner: Callable, name: str) -> Callable:
        @wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Any:
            with clock.at(REST, name):
                return inner(*args, **kwargs)

        return call

    def part(inner: Callable, name: str, always: bool) -> Callable:
        @wraps(inner)
        def call(*args: Any, **kwargs: Any) -> Any:
            if clock.idle or not (always or clock.between_parts):
                return inner(*args, **kwargs)
            with clock.at(name):
                return inner(*args, **kwargs)

        return call

    with ExitStack() as stack:
        for target, name in PHASES.items():
            stack.enter_context(_patched(target, phase(pkgutil.resolve_name(target), name)))
        for target, name in (PARTS | OUTSIDE_PARTS).items():
            stack.enter_context(_patched(target, part(pkgutil.resolve_name(target), name, target in PARTS)))
        yield


def _patched(target: str, by: Callable) -> Any:
    owner, _, attribute = target.replace(":", ".").rpartition(".")
    return patch.object(pkgutil.resolve_name(owner), attribute, by)
