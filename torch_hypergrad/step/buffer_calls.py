"""Calls that move or read buffers, and what torch's own functions do with running statistics and padding
rows."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

Values: TypeAlias = Mapping[str, Tensor]


class Call(NamedTuple):
    """A call that moves or reads buffers: where these stand, what they are after it, and its output as a
    function of them (None where it does not read them)."""

    held: Mapping[str, int]
    after: Callable[[Values], Values]
    reads: Callable[[Values], Tensor | None]
    reads_late: bool = False
    """Whether its gradient reads the buffers anew, as they are then."""

    def values(self, buffers: Mapping[int, Tensor]) -> Values:
        """Its own among all buffers."""
        return {name: buffers[i] for name, i in self.held.items()}


class Follower(Protocol):
    """What is told of calls."""

    def begin(self, **buffers: Tensor | None) -> dict[str, int]:
        """Before a call that is given buffers: where these stand, empty if they are none of the model's."""

    def follow(self, call: Call, output: Any) -> Any:
        """After it: its output, with its derivative in the buffers."""

    def pad(self, ids: Tensor, weight: Tensor, padding_idx: int, output: Tensor) -> Tensor:
        """After a look-up: its output, with its derivative in the padding row."""


@contextmanager
def intercepted(trace: Follower) -> Iterator[None]:
    """Inside, normalizations and look-ups are traced, whoever calls them, in whatever thread. A
    TorchFunctionMode would not see those that a backward pass calls again."""
    replaced: dict[str, Any] = {name: getattr(F, name) for name in _TRACED}
    try:
        for name, original in replaced.items():
            setattr(F, name, _Intercepted(trace, name, original))
        yield
    finally:
        for name, original in replaced.items():
            setattr(F, name, original)


class _Intercepted:
    """One of torch's functions, traced. torch calls it by name once more where tensors or modes override
    it."""

    def __init__(self, trace: Follower, name: str, original: Any) -> None:
        self._trace, self._name, self._original, self._is_inside = trace, name, original, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_inside:
            return self._original(*args, **kwargs)
        self._is_inside = True
        try:
            given = _SIGNATURES[self._name].bind(*args, **kwargs)
            given.apply_defaults()
            return _TRACED[self._name](self._trace, self._original, *given.args)
        finally:
            self._is_inside = False


def _normalize(
    statistics: Callable[[Tensor], Values],
    trace: Follower,
    original: Any,
    x: Tensor,
    mean: Any,
    var: Any,
    *rest: Any,
) -> Tensor:
    """Moves statistics by ``r' = (1 - momentum) r + momentum stat``, or reads them."""
    held = trace.begin(mean=mean, var=var)
    if not held:
        return original(x, mean, var, *rest)
    output = original(x, mean.detach(), var.detach(), *rest)
    weight, bias, training, momentum, eps = rest

    def after(buffers: Values) -> Values:
        stats = statistics(x.to(buffers["mean"].dtype)) if training else {}
        return {name: buffers[name] + (stat - buffers[name]) * momentum for name, stat in stats.items()}

    def reads(buffers: Values) -> Tensor | None:
        return None if training else _normalized(x, buffers["mean"], buffers["var"], weight, bias, eps)

    return trace.follow(Call(held, after, reads, reads_late=True), output)


def _look_up(
    trace: Follower, original: Any, ids: Tensor, weight: Tensor, padding_idx: int | None, *rest: Any
) -> Tensor:
    output = original(ids, weight, padding_idx, *rest)
    return output if padding_idx is None else trace.pad(ids, weight, padding_idx, output)


def _over_batch(x: Tensor) -> Values:
    """The mean and the unbiased variance of each channel."""
    var, mean = torch.var_mean(x, [d for d in range(x.ndim) if d != 1])
    return {"mean": mean, "var": var}


def _over_instances(x: Tensor) -> Values:
    """The means over the examples of each one's."""
    var, mean = torch.var_mean(x, list(range(2, x.ndim)))
    return {"mean": mean.mean(0), "var": var.mean(0)}


def _normalized(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias``."""
    shape = [-1] + [1] * (x.ndim - 2)
    y = (x - mean.reshape(shape)) * (var + eps).rsqrt().reshape(shape)
    y = y if weight is None else y * weight.reshape(shape)
    return y if bias is None else y + bias.reshape(shape)


_TRACED: dict[str, Callable[..., Tensor]] = {
    "batch_norm": partial(_normalize, _over_batch),
    "instance_norm": partial(_normalize, _over_instances),
    "embedding": _look_up,
}
_SIGNATURES = {name: inspect.signature(getattr(F, name)) for name in _TRACED}
