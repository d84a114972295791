"""Other views of a training picture: a part of it, every second one mirrored.

The frozen encoder's features are kept on disk, so a bridge sees the same few thousand inputs again and again, and
learns them by heart. A handful of views of each picture costs encoding and disk, once. BLIP's pretraining (arXiv
2201.12086, section 4.1) crops too; nothing is mirrored where words say which side.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Iterable
from dataclasses import replace

from PIL import Image, ImageOps

from adapters.data.images import ImageRef

_AREA = (0.5, 1.0)  # of the picture
_ASPECT = (3 / 4, 4 / 3)  # of the part's width to its height, beside the picture's own
_SIDES = re.compile(r"\b(left|right)\b|[左右]", re.IGNORECASE)


def all_views(image: ImageRef, views: int) -> list[ImageRef]:
    """A picture itself and its `views` - 1 other views."""
    return [image, *(replace(image, view=number) for number in range(1, views))]


def draw_view(image: ImageRef, views: int, rng: random.Random, *, sided: bool = False) -> ImageRef:
    """One of `views` views of a picture, each as likely.

    Args:
        image: the picture itself.
        views: how many there are, with the picture itself; 1 draws nothing.
        rng: draws.
        sided: what is said of the picture names a side, so it is not mirrored.
    """
    if views == 1:
        return image
    number = rng.choice([number for number in range(views) if not (sided and _is_mirrored(number))])
    return replace(image, view=number) if number else image


def names_a_side(texts: Iterable[str]) -> bool:
    """Whether any text says left or right, in English or Chinese."""
    return any(_SIDES.search(text) for text in texts)


def cut_view(picture: Image.Image, ref: ImageRef) -> Image.Image:
    """The part of a decoded picture that a reference's view shows; the picture itself for view 0.

    It hangs on the picture's bytes and the view's number alone, so every run and process cuts the same.
    """
    if not ref.view:
        return picture
    rng = random.Random(f"{ref.content_digest()}:{ref.view}")
    width, height = picture.size
    share = rng.uniform(*_AREA)
    aspect = math.exp(rng.uniform(*map(math.log, _ASPECT)))
    wide = max(1, min(width, round(width * math.sqrt(share * aspect))))
    high = max(1, min(height, round(height * math.sqrt(share / aspect))))
    left, top = rng.randint(0, width - wide), rng.randint(0, height - high)
    part = picture.crop((left, top, left + wide, top + high))
    return ImageOps.mirror(part) if _is_mirrored(ref.view) else part


def _is_mirrored(number: int) -> bool:
    return number > 0 and number % 2 == 0
