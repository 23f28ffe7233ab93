"""Memory of the CPU that is used again and again."""

from __future__ import annotations

from functools import cache

import torch

JUST_UNDER_32_MB = 2**25 - 2**16


@cache
def keep_freed_memory() -> None:
    """Has glibc keep memory that was freed, up to 64 MB, instead of giving it back to the system at once.

    Each training step frees the graph that the next one needs again. As a process starts, glibc gives such memory back, and
    gets it again page by page, cleared, which takes up to a fifth of a step of a small network. It stops doing so for
    blocks as large as any that was ever freed, but at most 32 MB, and then keeps twice that: so this frees such a block. It
    is never written to, and so takes no memory itself. Elsewhere than on glibc nothing happens.
    """
    torch.empty(JUST_UNDER_32_MB, dtype=torch.uint8)
