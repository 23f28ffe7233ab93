"""Functions of tensors recorded once and replayed as a whole: one launch in the place of hundreds."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import TreeSpec, tree_flatten, tree_leaves, tree_unflatten

NUM_WARM_UPS = 3
"""Eager calls before a recording: libraries choose their algorithms in the first ones, and make their
workspaces."""

MAX_RECORDINGS = 8
"""Each holds the memory of its forward and backward pass."""


class Recorder(Protocol):
    """What can record the work that a function gives to a device."""

    device: torch.device

    def warm_up(self, function: Callable[[], Any]) -> tuple[Any, str | None]:
        """Calls the function as it will be called for the recording: what it returned, and what speaks
        against one."""

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """What the function returned, whose memory stays its own, and a call that does the work again into
        this memory. The recording itself does no work."""


class CudaRecorder:
    """CUDA graphs."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._stream = device, torch.cuda.Stream(device)

    def warm_up(self, function: Callable[[], Any]) -> tuple[Any, str | None]:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream), _noting_waits() as waits:
            found = function()
        current.wait_stream(self._stream)
        for leaf in tree_leaves(found):
            if isinstance(leaf, Tensor) and leaf.is_cuda:
                leaf.record_stream(current)
        return found, waits[0] if waits else None

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        # Random numbers stay right: the default generator belongs to every graph, which begins at the
        # generator's state when it is replayed, moves it on as far as the eager call does, and numbers its
        # kernels in the same order.
        graph = torch.cuda.CUDAGraph()
        # thread_local: a data loader's thread may pin memory meanwhile, which would end a global recording.
        # The outer context brings the current stream back where a recording fails, which older versions of
        # the inner one do not.
        with (
            torch.cuda.stream(torch.cuda.current_stream(self.device)),
            torch.cuda.graph(graph, stream=self._stream, capture_error_mode="thread_local"),
        ):
            found = function()
        return found, graph.replay


@contextmanager
def _noting_waits() -> Iterator[list[str]]:
    """What waits for the device in the block. Noticed here, it never breaks a recording off, after which
    torch's random number generator may be left in the midst of it."""
    waits: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield waits
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for warning in caught:
        if "synchronizing CUDA" in str(warning.message):
            waits.append(f"it waits for the device, in {warning.filename}, line {warning.lineno}")
        elif "ynchronization debug mode" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def recorder_for(tensors: Sequence[Tensor]) -> Recorder | None:
    """What records work on these tensors; None, with a warning, if nothing can."""
    devices = sorted({str(t.device) for t in tensors})
    if len(devices) == 1 and tensors[0].device.type == "cuda":
        return CudaRecorder(tensors[0].device)
    warnings.warn(
        f"capture=True: everything is computed eagerly, because the parameters are on {', '.join(devices)}, "
        "and only work on one CUDA device can be recorded. Move the model there first, or leave out "
        "capture=True.",
        stacklevel=2,
    )
    return None


@dataclass(frozen=True)
class Recording:
    """One recording: memory to copy inputs to, memory that outputs appear in, and the replay between."""

    inputs: list[Tensor]
    outputs: list[Any]
    spec: TreeSpec
    replay: Callable[[], None]

    def run(self, inputs: Sequence[Tensor]) -> Any:
        with torch.no_grad():
            if self.inputs:
                torch._foreach_copy_(self.inputs, list(inputs))
            self.replay()
            # Copies: the next replay writes to the same memory.
            held = [leaf for leaf in self.outputs if isinstance(leaf, Tensor)]
            fresh = [torch.empty_like(leaf) for leaf in held]
            if held:
                torch._foreach_copy_(fresh, held)
        copies = iter(fresh)
        return tree_unflatten(
            [next(copies) if isinstance(leaf, Tensor) else leaf for leaf in self.outputs], self.spec
        )


class CannotCaptureError(Exception):
    """Why something cannot be recorded."""


class Captured:
    """A function of a tree of tensors that is recorded for each kind of input, and replayed.

    Inputs of one kind have the same structure, shapes, dtypes and numbers; tensors besides the inputs have
    the same memory, and the rest of the surroundings is equal. A kind is called eagerly a few times, then
    recorded. What cannot be recorded is called eagerly for good, and one warning says why.

    Only work on the device is replayed, with Python's numbers as they were: the function must not depend on
    anything else that changes. So it suits a gradient, and not an update rule, whose step counts are numbers
    of Python.

    Args:
        function: from a tree to a tree, whose tensors have no graph.
        memory: the tensors that the function reads and writes besides its inputs.
        surroundings: everything else that it depends on.
        name: of the function, for the warning.
    """

    def __init__(
        self,
        function: Callable[[Any], Any],
        memory: Callable[[], Iterable[Tensor]],
        surroundings: Callable[[], Hashable],
        recorder: Recorder,
        name: str,
    ) -> None:
        self._function, self._memory, self._surroundings, self._name = function, memory, surroundings, name
        self._recorder: Recorder | None = recorder
        self._calls: dict[Hashable, int] = {}
        self._recordings: dict[Hashable, Recording] = {}

    def __call__(self, inputs: Any) -> Any:
        """``function(inputs)``."""
        if self._recorder is None:
            return self._function(inputs)
        try:
            kind = self._kind(inputs, self._recorder.device)
        except CannotCaptureError as reason:
            return self._give_up(reason)(inputs)
        if kind in self._recordings:
            return self._recordings[kind].run(
                [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
            )
        if kind not in self._calls and len(self._calls) == MAX_RECORDINGS:
            return self._give_up(f"there were more than {MAX_RECORDINGS} kinds of batches and surroundings")(
                inputs
            )
        self._calls[kind] = self._calls.get(kind, 0) + 1
        if self._calls[kind] <= NUM_WARM_UPS:
            found, objection = self._recorder.warm_up(lambda: self._function(inputs))
            if objection is not None:
                self._give_up(objection)
            return found
        return self._record(kind, inputs, self._recorder)

    def _record(self, kind: Hashable, inputs: Any, recorder: Recorder) -> Any:
        leaves, spec = tree_flatten(inputs)
        held = [
            leaf.detach().clone().requires_grad_(leaf.requires_grad) if isinstance(leaf, Tensor) else leaf
            for leaf in leaves
        ]
        try:
            found, replay = recorder.record(lambda: self._function(tree_unflatten(held, spec)))
        except Exception as error:  # whatever it was: the eager call will tell
            return self._give_up(f"{type(error).__name__}: {error}")(inputs)
        outputs, out_spec = tree_flatten(found)
        self._recordings[kind] = Recording(
            [leaf for leaf in held if isinstance(leaf, Tensor)], outputs, out_spec, replay
        )
        return self._recordings[kind].run([leaf for leaf in leaves if isinstance(leaf, Tensor)])

    def _kind(self, inputs: Any, device: torch.device) -> Hashable:
        leaves, spec = tree_flatten(inputs)
        memory = list(self._memory())
        elsewhere = [t for t in (*leaves, *memory) if isinstance(t, Tensor) and t.device != device]
        if elsewhere:
            # Its values would become numbers of the recording.
            raise CannotCaptureError(
                f"a tensor of shape {tuple(elsewhere[0].shape)} is on {elsewhere[0].device}, not {device}"
            )
        kind = (
            str(spec),
            tuple((_layout(leaf) if isinstance(leaf, Tensor) else (type(leaf), leaf)) for leaf in leaves),
            tuple((t.data_ptr(), _layout(t)) for t in memory),
            (torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)),
            self._surroundings(),
        )
        try:
            hash(kind)
        except TypeError as error:
            raise CannotCaptureError(
                f"the batch holds something else than tensors and plain values: {error}"
            ) from None
        return kind

    def _give_up(self, reason: object) -> Callable[[Any], Any]:
        """Calls the function eagerly from now on."""
        warnings.warn(
            f"capture=True: {self._name} is computed eagerly from now on, because it cannot be recorded: "
            f"{reason}. The training loss must do all its work on one CUDA device and never wait for it "
            "(.item(), print, boolean masks), and batches should have few shapes. Results are right in any "
            "case; leave out capture=True to silence this.",
            stacklevel=2,
        )
        self._recorder = None
        self._recordings.clear()
        return self._function


def _layout(tensor: Tensor) -> Hashable:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.requires_grad
