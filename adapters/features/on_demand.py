"""Features of pictures that are encoded each time they are needed, for data that the cache cannot hold."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from adapters.data.image_ref import ImageRef
from adapters.features.cache import FeatureCache
from adapters.features.prefetch import THREADS, decoded

_PICTURES_AHEAD = 64  # decoded and waiting: 38 MiB at 224 pixels a side, 87 MiB at 336


class FeaturesOnDemand:
    """The features that a cache would hold, bit for bit, with nothing read from it and nothing kept.

    Threads decode the pictures that are expected; the encoder runs in the thread that asks for their features.

    Args:
        cache: whose encoder and precision are used.
        ahead: the most pictures that are decoded before they are asked for.
    """

    def __init__(self, cache: FeatureCache, *, ahead: int = _PICTURES_AHEAD) -> None:
        self.cache = cache
        self.ahead = ahead
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="decode")
        self._pixels: dict[str, Future[Tensor]] = {}

    def expect(self, refs: Sequence[ImageRef]) -> None:
        """Begin to decode pictures that `load` will be asked for soon; what is too much is left for later."""
        for ref in refs:
            digest = ref.digest()
            if digest not in self._pixels and len(self._pixels) < self.ahead:
                self._pixels[digest] = self._decode(ref)

    def load(self, refs: Sequence[ImageRef]) -> Tensor:
        """Features [B, P, D] on the CPU, as `FeatureCache.load` gives them; B is at least 1.

        Raises:
            UserError: a picture cannot be read.
        """
        wanted = {ref.digest(): ref for ref in refs}
        waiting = {
            digest: self._pixels.pop(digest) if digest in self._pixels else self._decode(ref)
            for digest, ref in wanted.items()
        }
        arrays: dict[str, np.ndarray] = {}
        digests, step = list(wanted), max(16, self.cache.together)
        for start in range(0, len(digests), step):
            part = digests[start : start + step]
            pixels = torch.cat([waiting.pop(digest).result() for digest in part])  # [b, 3, H, W]
            arrays |= zip(part, self.cache.encode([wanted[digest] for digest in part], pixels), strict=True)
        return torch.from_numpy(np.stack([arrays[ref.digest()] for ref in refs]))

    def _decode(self, ref: ImageRef) -> Future[Tensor]:
        return self._pool.submit(decoded, ref, self.cache.encoder.preprocess)
