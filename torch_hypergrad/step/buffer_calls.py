"""Calls that move or read buffers, and what torch's own functions do with running statistics and padding
rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
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
            setattr(F, name, _Intercepted(trace, original, _TRACED[name]))
        yield
    finally:
        for name, original in replaced.items():
            setattr(F, name, original)


class _Intercepted:
    """One of torch's functions, traced. torch calls it by name once more where tensors or modes override
    it."""

    def __init__(self, trace: Follower, original: Any, traced: Any) -> None:
        self._trace, self._original, self._traced, self._is_inside = trace, original, traced, False

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._is_inside:
            return self._original(*args, **kwargs)
        self._is_inside = True
        try:
            return self._traced(self._trace, self._original, *args, **kwargs)
        finally:
            self._is_inside = False


def _batch_norm(
    trace: Follower,
    original: Any,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    rest = (weight, bias, training, momentum, eps)
    return _normalize(trace, original, _over_batch, input, running_mean, running_var, rest)


def _instance_norm(
    trace: Follower,
    original: Any,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    rest = (weight, bias, use_input_stats, momentum, eps)
    return _normalize(trace, original, _over_instances, input, running_mean, running_var, rest)


def _embedding(
    trace: Follower,
    original: Any,
    input: Tensor,
    weight: Tensor,
    padding_idx: int | None = None,
    *rest: Any,
    **options: Any,
) -> Any:
    output = original(input, weight, padding_idx, *rest, **options)
    if padding_idx is None:
        return output
    return trace.pad(input, weight, padding_idx, output)


def _normalize(
    trace: Follower,
    original: Any,
    statistics: Callable[[Tensor], Values],
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    rest: Any,
) -> Tensor:
    held = trace.begin(mean=mean, var=var)
    output = original(x, mean, var, *rest)
    if not held:
        return output
    weight, bias, training, momentum, eps = rest

    def after(buffers: Values) -> Values:
        stats = statistics(x.to(buffers["mean"].dtype)) if training else {}
        return {name: buffers[name] + (stat - buffers[name]) * momentum for name, stat in stats.items()}

    def reads(buffers: Values) -> Tensor | None:
        return None if training else _normalized(x, buffers["mean"], buffers["var"], weight, bias, eps)

    return trace.follow(Call(held, after, reads, reads_late=True), output)


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


_TRACED = {"batch_norm": _batch_norm, "instance_norm": _instance_norm, "embedding": _embedding}
