"""Features read from the cache ahead of the step that needs them, on a thread, into memory that a GPU copies from."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

from torch import Tensor

from adapters.data.image_ref import ImageRef
from adapters.features.cache import FeatureCache

_BATCHES_AHEAD = 3


class FeatureSource(Protocol):
    """Where one tower's features come from in training."""

    def expect(self, refs: Sequence[ImageRef]) -> None:
        """Begin to prepare what `load` will be asked for soon; it changes no result."""
        ...

    def load(self, refs: Sequence[ImageRef]) -> Tensor:
        """Features [B, P, D] on the CPU."""
        ...


class FeaturesReadAhead:
    """A cache whose files are read on a thread.

    Args:
        cache: it has been filled.
        pinned: put features into page-locked memory, from which a GPU copies beside its work.
        ahead: the most batches that are read before they are asked for.
    """

    def __init__(self, cache: FeatureCache, *, pinned: bool = False, ahead: int = _BATCHES_AHEAD) -> None:
        self.cache = cache
        self.pinned = pinned
        self.ahead = ahead
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="features")
        self._reading: dict[tuple[str, ...], Future[Tensor]] = {}

    def expect(self, refs: Sequence[ImageRef]) -> None:
        """Begin to read a batch, unless as many are read already as may be."""
        key = _key(refs)
        if refs and key not in self._reading and len(self._reading) < self.ahead:
            self._reading[key] = self._pool.submit(self._read, refs)

    def load(self, refs: Sequence[ImageRef]) -> Tensor:
        """As `FeatureCache.load`; what was expected is there already, or soon will be."""
        reading = self._reading.pop(_key(refs), None)
        return self._read(refs) if reading is None else reading.result()

    def _read(self, refs: Sequence[ImageRef]) -> Tensor:
        features = self.cache.load(refs)
        return features.pin_memory() if self.pinned else features


def _key(refs: Sequence[ImageRef]) -> tuple[str, ...]:
    return tuple(ref.digest() for ref in refs)
