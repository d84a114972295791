"""How a server's process gives memory back, so that it holds as much after a thousand pictures as after a hundred."""

from __future__ import annotations

import ctypes
import os
import sys

# Bytes: less than a batch of pictures takes on its way through the encoder, more than a token in a small LLM.
MAPPED_FROM = 8 * 2**20
ARENAS = 2

# Of glibc's malloc.h, with the variable that says the same. Once the first is set, the second no longer follows it.
_SETTINGS = (
    (-3, "MALLOC_MMAP_THRESHOLD_", MAPPED_FROM),
    (-1, "MALLOC_TRIM_THRESHOLD_", 2 * MAPPED_FROM),
    (-8, "MALLOC_ARENA_MAX", ARENAS),
)


def give_back_large_blocks() -> bool:
    """Have the C library return large freed blocks to the system at once, and share heaps between threads.

    Left alone, glibc keeps ever larger freed blocks for itself, in a heap for each of a server's threads. To be called
    before threads begin; what the environment sets in glibc's own variables stays as it is.

    Returns:
        Whether it was done: glibc has such settings, others have not.
    """
    if not sys.platform.startswith("linux") or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    done = [mallopt(setting, value) == 1 for setting, variable, value in _SETTINGS if variable not in os.environ]
    return bool(done) and all(done)
