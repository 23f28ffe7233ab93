"""One measurement in one process: seconds, growth of peak memory, and the answers.

Processes are forked from a server that has imported torch and computed nothing,
so that each starts clean and at once.
"""

from __future__ import annotations

import ctypes
import gc
import math
import multiprocessing
import os
import platform
import re
import signal
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from torch_hypergrad import keep_freed_memory

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
TOO_SLOW, OUT_OF_MEMORY = "too slow", "out of memory"


@dataclass(frozen=True)
class Limits:
    """What one measurement may take. ``threads=None`` leaves torch its default; with ``"kept"``
    every contestant's process begins with ``torch_hypergrad.keep_freed_memory()``."""

    seconds: float = 600.0
    gigabytes: float = 0.5 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    threads: int | None = None
    allocator: Literal["kept", "default"] = "kept"


@dataclass(frozen=True)
class Outcome:
    """What came of one measurement; a ``mark`` says why nothing did.

    Args:
        first, later: seconds of the first window and of each later one.
        memory: bytes by which the peak grew in the first.
        answers: of all windows, those that differ from the one before.
        functions: of a profile: name, calls, own seconds, and with what it calls.
    """

    first: float = math.nan
    later: tuple[float, ...] = ()
    memory: float = math.nan
    answers: list[np.ndarray] = field(default_factory=list)
    functions: list[tuple[str, int, float, float]] = field(default_factory=list)
    mark: str = ""

    @property
    def seconds(self) -> float:
        return self.first + sum(self.later)


class Meter:
    """Measures a ``with`` block: seconds, and bytes by which the process's peak memory grew.

    Args:
        released: first give back what the allocator has kept, which would hide as much of the growth.
    """

    seconds = memory = math.nan

    def __init__(self, *, released: bool = True) -> None:
        self.released = released

    def __enter__(self) -> Meter:
        gc.collect()
        if self.released:
            release_free_memory()
        self._before = reset_peak()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self._start
        self.memory = peak() - self._before


def release_free_memory() -> None:
    """Gives back what the allocator has kept."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)


def reset_peak() -> int:
    """Lets the peak begin at the present size where the system can, and returns it in bytes."""
    if os.access(CLEAR_REFS, os.W_OK):
        CLEAR_REFS.write_text("5")
    return peak()


def peak() -> int:
    """The largest resident size so far, in bytes."""
    if STATUS.exists() and (found := re.search(r"VmHWM:\s*(\d+) kB", STATUS.read_text())):
        return int(found[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if platform.system() == "Darwin" else 1024)


# ---- processes ---------------------------------------------------------------------------------------------


def in_own_process(work: Callable[..., Outcome], *args: Any, limits: Limits) -> Outcome:
    """``work(*args)`` in a fresh process, within the limits."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.work", "higher", "torchopt"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(sender, limits, work, *args), daemon=True)
    process.start()
    sender.close()
    try:
        if not receiver.poll(limits.seconds):
            return Outcome(mark=TOO_SLOW)
        return receiver.recv()
    except EOFError:
        process.join()
        if process.exitcode == -signal.SIGKILL:  # what the kernel sends when memory has run out
            return Outcome(mark=OUT_OF_MEMORY)
        return Outcome(mark=f"the process ended with code {process.exitcode}")
    finally:
        process.kill()
        process.join()


def _send(sender: Connection, limits: Limits, work: Callable[..., Outcome], *args: Any) -> None:
    warnings.simplefilter("ignore")  # of the peers, about torch
    _limit_memory(limits.gigabytes)
    if limits.threads is not None:
        torch.set_num_threads(limits.threads)
    if limits.allocator == "kept":
        keep_freed_memory()
    try:
        outcome = work(*args)
    except Exception as error:
        outcome = Outcome(mark=_mark(error))
    sender.send(outcome)


def _limit_memory(gigabytes: float) -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (int(gigabytes * 1e9), resource.RLIM_INFINITY))
    except (ImportError, OSError, ValueError):
        pass  # no such limit here: the system's own has to do


def _mark(error: Exception) -> str:
    text = str(error).strip().splitlines()[0] if str(error).strip() else ""
    if isinstance(error, MemoryError) or "can't allocate memory" in text or "not enough memory" in text:
        return OUT_OF_MEMORY
    return f"{type(error).__name__}: {text}"
