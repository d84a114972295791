"""How a process gives memory back: a server's for good, and any while it loads a model."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# Bytes: less than a batch of pictures takes on its way through the encoder, more than a token in a small LLM.
MAPPED_FROM = 8 * 2**20
ARENAS = 2

# Of glibc's malloc.h, with the variable that says the same. Once the first is set, the second no longer follows it.
_MAPPED = (-3, "MALLOC_MMAP_THRESHOLD_")
_TRIMMED = (-1, "MALLOC_TRIM_THRESHOLD_")
_ARENAS = (-8, "MALLOC_ARENA_MAX")
_USUAL = 32 * 2**20  # bytes: what glibc itself comes to, once a process has freed a few large blocks
_for_good = False


def give_back_large_blocks() -> bool:
    """Have the C library return large freed blocks to the system at once, and share heaps between threads.

    Left alone, glibc keeps ever larger freed blocks for itself, in a heap for each of a server's threads. To be called
    before threads begin; what the environment sets in glibc's own variables stays as it is.

    Returns:
        Whether it was done: glibc has such settings, others have not.
    """
    global _for_good
    _for_good = _set({_MAPPED: MAPPED_FROM, _TRIMMED: 2 * MAPPED_FROM, _ARENAS: ARENAS}) or _for_good
    return _for_good


@contextmanager
def large_blocks_given_back() -> Iterator[None]:
    """Have large blocks that are freed meanwhile go back to the system, as `give_back_large_blocks` does for good.

    While an LLM is quantised, each weight is there in full precision for a moment. An LLM of 2.7 B parameters, which
    takes 1.7 GiB in NF4, left glibc with 5.4 GiB more of what was freed. Outside of loading it would cost time: memory
    that comes from the system is cleared first.
    """
    changed = not _for_good and _set({_MAPPED: MAPPED_FROM, _TRIMMED: 2 * MAPPED_FROM})
    try:
        yield
    finally:
        if changed and not _for_good:
            _set({_MAPPED: _USUAL, _TRIMMED: 2 * _USUAL})


def _set(values: dict[tuple[int, str], int]) -> bool:
    """Set what the environment leaves open; whether all of that was done."""
    mallopt = _mallopt()
    if mallopt is None:
        return False
    done = [mallopt(number, value) == 1 for (number, name), value in values.items() if name not in os.environ]
    return bool(done) and all(done)


def _mallopt() -> Callable[[int, int], int] | None:
    """glibc's function; None elsewhere, or if the environment tunes glibc."""
    if not sys.platform.startswith("linux") or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return None
    found: Callable[[int, int], int] | None = getattr(ctypes.CDLL(None), "mallopt", None)
    return found
