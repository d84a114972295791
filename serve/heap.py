"""How a server's process gives memory back, so that it holds as much after a thousand pictures as after a hundred."""

from __future__ import annotations

import ctypes
import os
import sys

MAPPED_FROM = (
    8 * 2**20
)  # bytes: more than a small LLM's weight unpacked, less than a batch of pictures on its way through the encoder
ARENAS = 2

_M_MMAP_THRESHOLD, _M_ARENA_MAX = -3, -8  # of glibc's malloc.h
_SETTINGS = ((_M_MMAP_THRESHOLD, "MALLOC_MMAP_THRESHOLD_", MAPPED_FROM), (_M_ARENA_MAX, "MALLOC_ARENA_MAX", ARENAS))


def give_back_large_blocks() -> bool:
    """Have the C library return large freed blocks to the system at once, and share heaps between threads.

    Left alone, glibc keeps ever larger freed blocks for itself, in a heap for each of a server's threads. To be called
    before threads begin; what the environment sets in glibc's own variables stays as it is.

    Returns:
        Whether it could: glibc has such settings, others have not.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return all(mallopt(setting, value) == 1 for setting, variable, value in _SETTINGS if variable not in os.environ)
