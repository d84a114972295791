"""Pictures that stand in two sets of data: the same bytes, the same pixels, or a near copy, such as one saved again.

A near copy is found by a difference hash of 64 bits (N. Krawetz, "Kind of like that", 2013) and confirmed on 16 x 16
colours, since the hash alone takes X-rays of two patients, or two gauges, for one picture. The bounds are measured.
Different photos that pass the hash differ by at least 35 levels in some cell, X-rays by 62, drawn gauges by 30; of
twelve million pairs of easy-VQA's drawings seven are within 24, each the same shape at the same place. Photos and
X-rays that are saved as JPEG of quality 30, halved, doubled or made 10 % brighter are found in 99 of 100 cases or more,
those of a quarter of the size in 92, those that lose 1 % at each side in 70. Pictures that are cut by more, mirrored
or made grey are not found.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Literal

import numpy as np
from PIL import Image

from adapters.data.examples import Example
from adapters.data.image_ref import ImageRef
from adapters.data.images import open_image
from adapters.data.known_pictures import known_pictures
from qformer.errors import UserError

MAX_BITS = 8
"""Of the 64 bits of the hash, so many may differ between near copies."""
MAX_LEVELS = 24
"""Of 255 levels of a colour, no cell of the 16 x 16 may differ by more between near copies."""
_NOISE = 2  # levels: so much may a plain ground vary when a picture is saved again
_SIDE = 16
_LOOK_BYTES = 32 + 8 + 3 * _SIDE * _SIDE
_THREADS = min(4, os.cpu_count() or 1)
_VERSION = 1  # of what is remembered of a picture's look; raise it if that is computed otherwise

How = Literal["bytes", "pixels", "near"]


@dataclass(frozen=True)
class Copy:
    """A picture of the test data that training has too.

    Attributes:
        train: as the training data name it.
        test: as the test data name it.
        how: "bytes" are the same, or "pixels", or it is a "near" copy.
    """

    train: str
    test: str
    how: How


@dataclass(frozen=True)
class Copies:
    """What two sets of pictures share.

    Attributes:
        pairs: one for each distinct picture of the test data that training has too, in the order of the test data.
        unreadable: what is wrong with each picture that could not be compared, of both sets.
    """

    pairs: tuple[Copy, ...]
    unreadable: tuple[str, ...]


@dataclass(frozen=True)
class _Look:
    pixels: bytes  # their SHA-256
    hash: np.uint64
    colours: np.ndarray  # [768], uint8

    def pack(self) -> bytes:
        return self.pixels + self.hash.tobytes() + self.colours.tobytes()

    @classmethod
    def unpack(cls, packed: bytes) -> _Look:
        numbers = np.frombuffer(packed, np.uint8)
        return cls(packed[:32], numbers[32:40].view(np.uint64)[0], numbers[40:])


def copies_between(
    train: Iterable[ImageRef], test: Iterable[ImageRef], *, on_progress: Callable[[int, int], None] | None = None
) -> Copies:
    """Find the pictures of one set that another has too.

    Every distinct picture is decoded once, by the first run that compares it, and none if its bytes settle the matter.

    Args:
        train: pictures that were, or are to be, learned from; one may come several times.
        test: pictures to look for among them; likewise.
        on_progress: called with (pictures looked at, pictures in all), ten times or fewer.
    """
    unreadable: dict[str, None] = {}
    learned, asked = _by_bytes(train, unreadable), _by_bytes(test, unreadable)
    open_questions = [digest for digest in asked if digest not in learned]
    to_see = {digest: learned[digest] for digest in learned} if open_questions else {}
    to_see |= {digest: asked[digest] for digest in open_questions}
    looks = _look_at_all(to_see, unreadable, on_progress)
    known = [digest for digest in learned if digest in looks]
    by_pixels = {looks[digest].pixels: digest for digest in reversed(known)}  # the first of equal ones
    hashes = np.array([looks[digest].hash for digest in known], dtype=np.uint64)
    colours = np.array([looks[digest].colours for digest in known], dtype=np.uint8).reshape(-1, 3 * _SIDE * _SIDE)

    def match(digest: str) -> tuple[str, How] | None:
        if digest in learned:
            return digest, "bytes"
        if digest not in looks:
            return None
        look = looks[digest]
        if look.pixels in by_pixels:
            return by_pixels[look.pixels], "pixels"
        nearest = _nearest(look, hashes, colours)
        return None if nearest is None else (known[nearest], "near")

    pairs = []
    for digest, image in asked.items():
        if (found := match(digest)) is not None:
            pairs.append(Copy(learned[found[0]].label, image.label, found[1]))
    return Copies(tuple(pairs), tuple(unreadable))


def copies_between_rows(
    train: Iterable[Example], test: Iterable[Example], *, on_progress: Callable[[int, int], None] | None = None
) -> Copies:
    """As `copies_between`, of the pictures that rows name."""
    return copies_between(
        (image for example in train for image in example.images),
        (image for example in test for image in example.images),
        on_progress=on_progress,
    )


def describe_copies(pairs: Sequence[Copy], most: int) -> list[str]:
    """A line for each of the first so many pairs, such as "b.png is a.png (the same pixels)"."""
    words = {"bytes": "the same bytes", "pixels": "the same pixels", "near": "a near copy"}
    return [f"{pair.test} is {pair.train} ({words[pair.how]})" for pair in pairs[:most]]


def _by_bytes(images: Iterable[ImageRef], unreadable: dict[str, None]) -> dict[str, ImageRef]:
    """The first reference to each distinct content; what cannot be read is added to `unreadable`."""
    found: dict[str, ImageRef] = {}
    for image in dict.fromkeys(images):
        try:
            found.setdefault(image.content_digest(), image)
        except UserError as error:
            unreadable[str(error)] = None
    return found


def look_at(images: Mapping[str, ImageRef], on_progress: Callable[[int, int], None] | None = None) -> list[str]:
    """Decode the pictures that no run has decoded before, and remember how they look.

    Args:
        images: by the digest of their bytes.
        on_progress: called with (pictures looked at, pictures in all) after each few hundred.

    Returns:
        What is wrong with each that cannot be decoded.
    """
    known = known_pictures()
    unreadable = []
    new = {digest: image for digest, image in images.items() if known.look(_key(digest)) is None}
    for done, (_, look) in enumerate(_looks_of(new), start=1):
        if not isinstance(look, _Look):
            unreadable.append(look)
        if on_progress and done % 500 == 0:
            on_progress(done, len(new))
    return unreadable


def _look_at_all(
    images: dict[str, ImageRef], unreadable: dict[str, None], on_progress: Callable[[int, int], None] | None
) -> dict[str, _Look]:
    known = known_pictures()
    looks: dict[str, _Look] = {}
    new: dict[str, ImageRef] = {}
    for digest, image in images.items():
        remembered = known.look(_key(digest))
        if remembered is not None and len(remembered) == _LOOK_BYTES:
            looks[digest] = _Look.unpack(remembered)
        else:
            new[digest] = image
    for done, (digest, look) in enumerate(_looks_of(new), start=1):
        if isinstance(look, _Look):
            looks[digest] = look
        else:
            unreadable[look] = None
        if on_progress and (done == len(new) or done % -(-len(new) // 10) == 0):
            on_progress(done, len(new))
    return looks


def _looks_of(images: Mapping[str, ImageRef]) -> Iterator[tuple[str, _Look | str]]:
    """Each picture's look, which is remembered, or what is wrong with it; decoded in threads, some at a time."""
    known = known_pictures()
    pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="look")
    try:
        digests = list(images)
        for start in range(0, len(digests), 256):
            part = digests[start : start + 256]
            for digest, look in zip(part, pool.map(_look, [images[digest] for digest in part]), strict=True):
                if isinstance(look, _Look):
                    known.remember_look(_key(digest), look.pack())
                yield digest, look
    finally:
        pool.shutdown(cancel_futures=True)  # Ctrl-C does not wait for the rest


def _key(digest: str) -> str:
    return f"{digest}:{_VERSION}"


def _look(image: ImageRef) -> _Look | str:
    """What a picture is compared by, or what is wrong with it."""
    try:
        picture = open_image(image)
    except UserError as error:
        return str(error)
    pixels = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes()).digest()
    grey = np.asarray(picture.convert("L").resize((9, 8), Image.Resampling.BILINEAR)).astype(np.int16)
    bits = np.packbits(grey[:, 1:] - grey[:, :-1] > _NOISE)  # brighter than its left neighbour: 8 rows of 8
    colours = np.asarray(picture.resize((_SIDE, _SIDE), Image.Resampling.BILINEAR)).reshape(-1)
    return _Look(pixels, bits.view(np.uint64)[0], colours)


def _nearest(look: _Look, hashes: np.ndarray, colours: np.ndarray) -> int | None:
    """The row of the picture that a picture is a near copy of, if there is one.

    Args:
        look: of the picture.
        hashes: [N] of the others.
        colours: [N, 768] of the others.
    """
    (alike,) = np.nonzero(np.bitwise_count(hashes ^ look.hash) <= MAX_BITS)
    if not len(alike):
        return None
    apart = np.abs(colours[alike].astype(np.int16) - look.colours).max(axis=1)
    best = int(apart.argmin())
    return int(alike[best]) if apart[best] <= MAX_LEVELS else None
