"""Which pictures of a data file can be decoded: every one is opened, some at a time."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from adapters.data.examples import Example, Fault
from adapters.data.image_ref import ImageRef
from adapters.data.images import open_image
from adapters.data.lazy import Picked, places_where
from qformer.errors import UserError

_THREADS = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class PictureScan:
    """What became of pictures.

    Args:
        pictures: how many there are, files and data URIs, each counted once.
        digests: of the bytes of those that can be decoded, by picture.
        broken: what is wrong with the others.
    """

    pictures: int
    digests: dict[ImageRef, str]
    broken: dict[ImageRef, str]

    def sort(self, examples: Sequence[Example]) -> tuple[Sequence[Example], list[Fault]]:
        """The rows whose pictures can all be decoded, and a fault for each of the others."""
        faults: list[Fault] = []

        def is_good(example: Example) -> bool:
            wrong = next((image for image in example.images if image in self.broken), None)
            if wrong is not None:
                faults.append(Fault(example.row, example.where, self.broken[wrong]))
            return wrong is None

        return Picked(examples, places_where(examples, is_good)), faults


def scan_pictures(examples: Sequence[Example], on_progress: Callable[[int, int], None] | None = None) -> PictureScan:
    """Open every picture that rows name.

    Args:
        examples: the rows.
        on_progress: called with (pictures opened, pictures in all), ten times or fewer.
    """
    refs = list(dict.fromkeys(image for example in examples for image in example.images))
    broken: dict[ImageRef, str] = {}
    digests: dict[ImageRef, str] = {}
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="open")
    try:
        for done, (ref, result) in enumerate(zip(refs, pool.map(_examine, refs), strict=True), start=1):
            if isinstance(result, UserError):
                broken[ref] = str(result)
            else:
                digests[ref] = result
            if on_progress and (done == len(refs) or done % -(-len(refs) // 10) == 0):
                on_progress(done, len(refs))
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest
    return PictureScan(len(refs), digests, broken)


def _examine(ref: ImageRef) -> str | UserError:
    """The digest of a picture's bytes, or what is wrong with it, without the row that names it."""
    try:
        content = ref.read()
        open_image(ImageRef(ref.label, data=content))
    except UserError as error:
        return UserError(str(error).removeprefix(f"{ref.where}: "))
    return hashlib.sha256(content).hexdigest()
