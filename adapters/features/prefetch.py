"""Pictures decoded ahead of the image encoder, in threads, so that it does not wait for files."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from PIL.Image import Image
from torch import Tensor

from adapters.data.image_ref import ImageRef
from adapters.data.images import open_image
from qformer.errors import UserError

THREADS = min(4, os.cpu_count() or 1)
_BATCHES_AHEAD = 2


def decoded_batches(
    refs: Sequence[ImageRef], preprocess: Callable[[Sequence[Image]], Tensor], batch_size: int
) -> Generator[tuple[list[ImageRef], Tensor], None, None]:
    """Yield the pictures in order, in batches, each with its pixels.

    A thread decodes and preprocesses one picture at a time, so at most a few are held at full size. Close the
    generator when leaving it early: that ends its threads.

    Args:
        refs: N pictures.
        preprocess: pictures → pixels [B, 3, H, W]; called from several threads with one picture each.
        batch_size: pictures in a batch; the last may have fewer.

    Yields:
        References and pixels [b, 3, H, W].

    Raises:
        UserError: a picture cannot be read, or its bytes are not those of its digest any more.
    """

    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="decode")
    ahead: deque[tuple[list[ImageRef], list[Future[Tensor]]]] = deque()
    try:
        for start in range(0, len(refs), batch_size):
            batch = list(refs[start : start + batch_size])
            ahead.append((batch, [pool.submit(decoded, ref, preprocess) for ref in batch]))
            if len(ahead) > _BATCHES_AHEAD:
                yield _finished(*ahead.popleft())
        while ahead:
            yield _finished(*ahead.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def decoded(ref: ImageRef, preprocess: Callable[[Sequence[Image]], Tensor]) -> Tensor:
    """A picture's pixels [1, 3, H, W].

    Raises:
        UserError: it cannot be read, or its bytes are not those of its digest any more.
    """
    content = ref.read()
    # Features stored under the name of other bytes would stay wrong for ever.
    if hashlib.sha256(content).hexdigest() != ref.content_digest():
        raise UserError(f"{ref.where or 'image'}: '{ref.label}' has changed since it was first read: run again")
    return preprocess([open_image(replace(ref, path=None, part=None, data=content))])


def _finished(batch: list[ImageRef], futures: list[Future[Tensor]]) -> tuple[list[ImageRef], Tensor]:
    return batch, torch.cat([future.result() for future in futures])  # [b, 3, H, W]
