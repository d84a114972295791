"""Pictures with all their captions, and what a step of the first stage draws of them."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from adapters.data.examples import Example
from adapters.data.image_ref import ImageRef
from adapters.data.views import draw_view, names_a_side


@dataclass(frozen=True)
class CaptionedPicture:
    """A picture with all its captions."""

    image: ImageRef
    captions: tuple[str, ...]


Batch = list[tuple[CaptionedPicture, list[str]]]
"""Pictures, each with the captions that were drawn of it."""


def group_captions(examples: Sequence[Example]) -> list[CaptionedPicture]:
    """The distinct pictures of caption rows, each with the captions of all its rows.

    Rows of other tasks, of several pictures, or in another language than the text side reads, English, are no captions
    to compare pictures with, and are passed over.
    """
    captions: dict[str, list[str]] = {}
    images: dict[str, ImageRef] = {}
    for example in examples:
        if example.task not in (None, "caption") or len(example.images) != 1 or example.language != "en":
            continue
        image = example.images[0]
        images.setdefault(image.digest(), image)
        captions.setdefault(image.digest(), []).extend(example.answers)
    return [CaptionedPicture(images[digest], tuple(texts)) for digest, texts in captions.items()]


def draw_captions(picture: CaptionedPicture, count: int, rng: random.Random) -> list[str]:
    """`count` captions of a picture in chance order; all come before one comes twice."""
    drawn: list[str] = []
    while len(drawn) < count:
        drawn += rng.sample(picture.captions, len(picture.captions))
    return drawn[:count]


def draw_batch(pictures: Sequence[CaptionedPicture], captions: int, rng: random.Random, *, views: int = 1) -> Batch:
    """So many captions of each picture, and one of its views."""
    batch: Batch = []
    for picture in pictures:
        drawn = draw_captions(picture, captions, rng)
        (view,) = draw_view((picture.image,), views, rng, sided=names_a_side(picture.captions))
        batch.append((replace(picture, image=view), drawn))
    return batch


def image_numbers(batch: Batch) -> torch.Tensor:
    """A number a picture, the same on every process and in every run: from the digest of its bytes."""
    digests = [hashlib.sha256(picture.image.content_digest().encode()).digest()[:8] for picture, _ in batch]
    return torch.tensor([int.from_bytes(digest, "big", signed=True) for digest in digests])
