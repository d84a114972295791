"""Other views of a training picture: a part and a mirrored part by turns.

The frozen encoder's features are kept on disk, so without views a bridge sees the same few thousand inputs in
every epoch and memorises them. A handful of views of each picture costs encoding and disk, once. BLIP's pretraining
(arXiv 2201.12086, section 4.1) crops too; no picture is mirrored if its words name a side.

Features are kept by the picture's bytes and the view's number: whoever changes how views are cut raises `_VERSION` in
`adapters/features/cache.py`.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable

from PIL import Image, ImageOps

from adapters.data.image_ref import ImageRef

_AREA = (0.5, 1.0)  # of the picture
_ASPECT = (3 / 4, 4 / 3)  # of the part's width to its height, beside the picture's own
_SIDES = re.compile(r"(?<![a-z])(left|right)(most|-?hand(ed)?|wards?)?(?![a-z])|clockwise|[左右]", re.IGNORECASE)


def all_views(images: Iterable[ImageRef], views: int) -> list[ImageRef]:
    """Each distinct picture itself and its `views` - 1 other views."""
    distinct = {image.digest(): image for image in images}
    return [image.seen_as(number) for image in distinct.values() for number in range(views)]


def draw_view(
    images: tuple[ImageRef, ...], views: int, rng: random.Random, *, sided: bool = False
) -> tuple[ImageRef, ...]:
    """One of a picture's `views` views, each as likely. Several pictures stay as they are: they are to be compared.

    Args:
        images: what one question is about.
        views: how many there are, with the picture itself; 1 draws nothing.
        rng: draws.
        sided: what is said of the picture names a side, so it is not mirrored.
    """
    if views == 1 or len(images) != 1:
        return images
    number = rng.choice([number for number in range(views) if not (sided and _is_mirrored(number))])
    return (images[0].seen_as(number),)


def names_a_side(texts: Iterable[str]) -> bool:
    """Whether any text says left or right, in English or Chinese."""
    return any(_SIDES.search(text) for text in texts)


def cut_view(picture: Image.Image, digest: str, view: int) -> Image.Image:
    """The part of a decoded picture that a view shows; the picture itself for view 0.

    Args:
        picture: the whole.
        digest: of the picture's bytes. Part and mirroring depend on it and on the number alone.
        view: its number.
    """
    if not view:
        return picture
    rng = random.Random(f"{digest}:{view}")
    width, height = picture.size
    share = rng.uniform(*_AREA)
    aspect = math.exp(rng.uniform(*map(math.log, _ASPECT)))
    wide = max(1, min(width, round(width * math.sqrt(share * aspect))))
    high = max(1, min(height, round(height * math.sqrt(share / aspect))))
    left, top = rng.randint(0, width - wide), rng.randint(0, height - high)
    part = picture.crop((left, top, left + wide, top + high))
    return ImageOps.mirror(part) if _is_mirrored(view) else part


def _is_mirrored(number: int) -> bool:
    return number > 0 and number % 2 == 0
