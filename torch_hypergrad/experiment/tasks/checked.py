"""What is wrong with a task of one's own, found before anything is trained: one line for each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..config import ConfigError
from ..messages import one_line
from .base import Examples, Split, Task


def loaded(task: Task, seed: int, device: torch.device) -> Split:
    """The examples of a task, on a device, and the task with them.

    Raises:
        ConfigError: where :meth:`Task.load` fails, or gives or sets something else than it should.
    """
    name = type(task).__name__
    with blamed(f"task: {name}.load"):
        split = task.load(seed)
    _check_sets(name, split)
    for key in ("input_shape", "num_outputs"):
        if not hasattr(task, key):
            raise ConfigError(f"task: {name}.load did not set self.{key}. Set it there.")
    with blamed(f"task: moving {name} to {device}"):
        split = split.to(device)
        task.to(device)
    for part in ("train", "val", "test"):
        _check_some(task, getattr(split, part), f"{name}'s {part} set", torch.empty(0, device=device).device)
    with blamed(f"task: {name}.state, which must be of JSON's types,"):
        json.dumps(task.state())
    return split


@contextmanager
def blamed(what: str, kind: type[Exception] = ConfigError) -> Iterator[None]:
    """Whatever somebody's code raises inside is told in one line that begins with ``what``."""
    try:
        yield
    except (ConfigError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise kind(f"{what} failed ({type(error).__name__}: {one_line(error)}).") from error


def check_losses(task: Task, losses: object, num: int) -> None:
    """Raises ConfigError where these are not the losses of ``num`` examples."""
    if isinstance(losses, Tensor) and losses.shape == (num,) and losses.is_floating_point():
        return
    found = f"{_shape(losses)} of {losses.dtype}" if isinstance(losses, Tensor) else type(losses).__name__
    raise ConfigError(
        f"task: {type(task).__name__}.losses gave {found} for {num} examples, expected ({num},): one "
        'number for each, without a mean; functions of torch.nn.functional take reduction="none".'
    )


def _check_sets(name: str, split: object) -> None:
    if not isinstance(split, Split):
        raise ConfigError(f"task: {name}.load gave {type(split).__name__}, expected a Split of three sets.")
    for part in ("train", "val", "test"):
        examples = getattr(split, part)
        if not isinstance(examples, Examples):
            raise ConfigError(
                f"task: {name}'s {part} set is {type(examples).__name__}, expected Examples, such as "
                "InMemory(inputs, targets)."
            )
        if not len(examples):
            raise ConfigError(f"task: {name}'s {part} set is empty. Give it at least one example.")
    wrong, num = split.wrong, len(split.train)
    if wrong is not None and (wrong.shape != (num,) or wrong.dtype != torch.bool):
        raise ConfigError(
            f"task: {name}'s Split.wrong has shape {_shape(wrong)} of {wrong.dtype}, expected ({num},) "
            "of torch.bool: whether the target of each training example is wrong."
        )


def _check_some(task: Task, examples: Examples, name: str, device: torch.device) -> None:
    """Takes two examples and looks at them."""
    rows = torch.arange(min(len(examples), 2), device=device)
    with blamed(f"task: taking examples {rows.tolist()} of {name}"):
        inputs, targets = examples.take(rows)
        seen = task.inputs(inputs)
    for what, tensor in (("inputs", seen), ("targets", targets)):
        if not isinstance(tensor, Tensor) or tensor.shape[:1] != rows.shape:
            raise ConfigError(f"task: {name} gave {what} of shape {_shape(tensor)} for {len(rows)} rows.")
        if tensor.device != device:
            raise ConfigError(
                f"task: {name} gave {what} on {tensor.device}, and the network is on {device}. Move them in "
                "the method to(device) of the set."
            )
    if seen.shape[1:] != tuple(task.input_shape):
        raise ConfigError(
            f"task: {name} has inputs of shape {tuple(seen.shape[1:])}, and load set input_shape to "
            f"{tuple(task.input_shape)}."
        )


def _shape(thing: object) -> str:
    """Of a tensor; of anything else what it is."""
    return f"{tuple(thing.shape)}" if isinstance(thing, Tensor) else type(thing).__name__
