"""Batches as they are recorded: by reference, in containers of their own, and watched."""

from __future__ import annotations

import copy
import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from ..device import readings
from ..device.host_memory import sample_of_bytes

try:
    from numpy import ndarray as Array
except ModuleNotFoundError:  # and then there is no array

    class Array:  # type: ignore[no-redef]
        """What no batch holds."""


class Look(NamedTuple):
    """What a tensor or an array of a batch was like: which one, its version counter, and a checksum, of all
    its values where these can be written to without a trace, as memory shared with numpy can, else of a
    sample."""

    which: int
    version: int
    checksum: int
    of_all: bool


Seen: TypeAlias = tuple[Look, ...]

MAX_DEPTH = 5
"""Of objects in objects of no known kind that are looked into."""

NUM_SUMS = 16
"""Of a checksum of all values: sums of so many stretches, so that two examples that change places show."""


def recorded(batch: Any) -> Any:
    """The batch with the same tensors in containers of its own, which nobody else fills anew."""
    if isinstance(batch, Tensor) or _is_tuple_of_tensors(batch):
        return batch
    leaves, spec = tree_flatten(batch)
    return tree_unflatten([_own(leaf) for leaf in leaves], spec)


def _is_tuple_of_tensors(batch: Any) -> bool:
    return type(batch) is tuple and all(type(part) is Tensor for part in batch)


def _own(thing: Any) -> Any:
    """The same for what torch does not know as a container: dataclasses, and mappings and lists of other
    classes."""
    if isinstance(thing, Tensor) or not (
        isinstance(thing, (Mapping, list))
        or (dataclasses.is_dataclass(thing) and not isinstance(thing, type))
    ):
        return thing
    try:
        own = copy.copy(thing)
        for key, value in _items(own):
            inner = recorded(value)
            if inner is value:
                continue
            if isinstance(own, (Mapping, list)):
                own[key] = inner  # type: ignore[index]
            else:
                object.__setattr__(own, key, inner)
    except (TypeError, AttributeError):
        return thing  # its tensors are watched all the same
    return own


def _items(thing: Any) -> list[tuple[Any, Any]]:
    """What is in a container or an object, by key, position or name."""
    if isinstance(thing, Mapping):
        return list(thing.items())
    if isinstance(thing, (list, tuple)):
        return list(enumerate(thing))
    slots = [name for kind in type(thing).__mro__ for name in getattr(kind, "__slots__", ())]
    named = {name: getattr(thing, name) for name in slots if hasattr(thing, name)}
    return list({**named, **getattr(thing, "__dict__", {})}.items())


def _tensors(thing: Any, depth: int = 0) -> Iterator[Tensor | Array]:
    """Every tensor and array, wherever it is."""
    if isinstance(thing, (Tensor, Array)):
        yield thing
    elif depth < MAX_DEPTH and not isinstance(
        thing, (str, bytes, int, float, type, torch.nn.Module, type(None))
    ):
        for _, value in _items(thing):
            yield from _tensors(value, depth + 1)


def watched(batch: Any) -> list[Tensor | Array]:
    """The tensors and arrays of a batch."""
    if _is_tuple_of_tensors(batch):
        return list(batch)
    return [found for leaf in tree_leaves(batch) for found in _tensors(leaf)]


def seen(batch: Any) -> Seen:
    """What the tensors of the batch are like now."""
    return tuple(_look(found, of_all=_is_shared(found)) for found in watched(batch))


def is_as_seen(batch: Any, before: Seen) -> bool:
    """Whether nobody has put others in their place, or written to them."""
    now = watched(batch)
    return len(now) == len(before) and all(_look(f, of_all=b.of_all) == b for f, b in zip(now, before))


def seen_again(batch: Any, before: Seen) -> Seen:
    """As seen before, for a batch whose tensors were brought back from elsewhere, but for those that are
    new."""
    moved = {id(leaf) for leaf in tree_leaves(batch)}
    now = seen(batch)
    return (
        tuple(n if n.which in moved else b for n, b in zip(now, before))
        if len(now) == len(before)
        else before
    )


def _look(found: Tensor | Array, *, of_all: bool) -> Look:
    if isinstance(found, Array):
        content = b"" if found.dtype == object else found.tobytes()
        return Look(id(found), 0, zlib.crc32(content), of_all)
    version = 0 if found.is_inference() else found._version
    if (
        not readings.at_once(found)
        or found.layout is not torch.strided
        or found.is_quantized
        or not found.numel()
    ):
        return Look(id(found), version, 0, of_all)
    return Look(
        id(found), version, _checksum(found) if of_all else zlib.crc32(sample_of_bytes(found)), of_all
    )


def _checksum(tensor: Tensor) -> int:
    """Of sums, which cost a pass over memory and nothing more."""
    flat = tensor.detach().reshape(-1)
    flat = torch.view_as_real(flat.resolve_conj()).reshape(-1) if flat.is_complex() else flat
    size = len(flat) // NUM_SUMS * NUM_SUMS
    sums = torch.cat([flat[:size].view(NUM_SUMS, -1).sum(1), flat[size:].sum()[None]])
    return zlib.crc32(sums.double().numpy().tobytes())


def _is_shared(found: Tensor | Array) -> bool:
    """Whether others than torch may write to its memory: torch never resizes what it shares with numpy."""
    if isinstance(found, Array):
        return True
    if not readings.at_once(found) or found.layout is not torch.strided:
        return False
    return not found.untyped_storage().resizable()
