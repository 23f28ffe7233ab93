"""Memory of the CPU: how much there is, what is kept of it, and how it compares."""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

KEPT = 2**30
"""Bytes of freed memory that stay with the process."""

LARGEST = 2**25
"""Bytes of the largest block that is kept: glibc takes no higher number."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


@cache
def keep_freed_memory() -> bool:
    """Has glibc keep memory that was freed, up to a gigabyte, for this process, instead of giving it back to
    the system at once.

    A setting of the whole process, so nothing here makes it but this call: make it once, at the start of a
    program that trains on a CPU. Each training step frees the graph that the next one needs again, and each
    hyper step the window that the next one needs. By default glibc gives such memory back, and gets it again
    page by page, cleared, which counts beside the arithmetic of a small network. The price is memory that
    other processes cannot have. PyTorch keeps memory of CUDA devices in the same way.

    Returns:
        Whether the C library is glibc; elsewhere nothing happens.
    """
    libc = _c_library()
    if libc is None or not hasattr(libc, "gnu_get_libc_version"):
        return False
    libc.mallopt(_M_MMAP_THRESHOLD, LARGEST)
    libc.mallopt(_M_TRIM_THRESHOLD, KEPT)
    return True


def total_memory(device: torch.device) -> int:
    """Bytes of memory that this process may have at most: the device's, or of host memory what the machine
    has and its control group allows."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    limits = [_of_the_machine()]
    for path in _CGROUP_LIMITS:
        if path.exists() and (text := path.read_text().strip()).isdigit():
            limits.append(int(text))
    return min(limits)


def _of_the_machine() -> int:
    """8 GiB where the system does not tell: Windows."""
    if not hasattr(os, "sysconf"):
        return 2**33
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


_CGROUP_LIMITS = (
    Path("/sys/fs/cgroup/memory.max"),
    Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)  # of both versions


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors of one shape and dtype in CPU memory are equal bit by bit, NaN included, where they
    can be compared as memory, which is several times faster; elsewhere whether all numbers are equal."""
    libc, addresses = _c_library(), (a.data_ptr(), b.data_ptr())
    if libc is None or not all(addresses) or not (a.is_contiguous() and b.is_contiguous()):
        return torch.equal(a, b)
    return libc.memcmp(*addresses, a.nbytes) == 0


NUM_STRETCHES, STRETCH = 8, 256
"""Of a sample of bytes."""


def sample_of_bytes(tensor: Tensor) -> bytes:
    """Stretches of the memory of a tensor on the CPU, evenly spaced; all of a small one."""
    if not tensor.is_contiguous():
        tensor = tensor.contiguous()
    start, size = tensor.data_ptr(), tensor.nbytes
    if size <= NUM_STRETCHES * STRETCH:
        return ctypes.string_at(start, size)
    spacing = (size - STRETCH) // (NUM_STRETCHES - 1)
    content = memoryview((ctypes.c_char * size).from_address(start)).cast("B")
    return b"".join([content[k * spacing : k * spacing + STRETCH] for k in range(NUM_STRETCHES)])


@cache
def _c_library() -> ctypes.CDLL | None:
    try:
        libc = ctypes.CDLL(None)
        libc.memcmp.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t
        return libc
    except (OSError, TypeError):
        return None  # a system that gives it another name
