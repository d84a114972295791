"""Retrieval among pictures and their captions: recall at 1, 5 and 10, both ways."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qformer.errors import UserError

CUTS = (1, 5, 10)


def recalls(scores: Tensor, image_of_text: Sequence[int]) -> dict[str, float]:
    """`i2t_R@1`, `i2t_R@5`, `i2t_R@10`, `t2i_R@1`, … as fractions of the pictures and of the texts.

    A picture is a hit at k if any of its own texts is among the k best for it; a text is one if its picture is
    among the k best. Karpathy & Fei-Fei 2015 (arXiv 1412.2306), section 4.1. A tie counts against us: whatever scores
    as high as the right one comes before it, and so does NaN. A model that gives one score to all pairs finds nothing.

    Args:
        scores: [I, T], the higher the better; floating point.
        image_of_text: T row numbers: the picture that each text belongs to.

    Raises:
        UserError: a picture has no text.
        ValueError: the shapes or the row numbers don't fit.
    """
    images, texts = scores.shape
    owner = torch.as_tensor(image_of_text, dtype=torch.long, device=scores.device)  # [T]
    if owner.shape != (texts,):
        raise ValueError(f"scores has {texts} columns, image_of_text {len(image_of_text)} entries")
    if texts and not 0 <= int(owner.min()) <= int(owner.max()) < images:
        raise ValueError(f"image_of_text has row numbers outside of 0 to {images - 1}")
    own = owner == torch.arange(images, device=scores.device)[:, None]  # [I, T]
    without = (~own.any(dim=1)).nonzero()
    if len(without):
        raise UserError(f"picture {int(without[0]) + 1} of {images} has no caption: give at least one, or drop it")

    best_own = scores.masked_fill(~own, -torch.inf).amax(dim=1, keepdim=True)  # [I, 1]
    text_rank = (~(scores < best_own) & ~own).sum(dim=1)  # [I], 0 is the best place
    right = scores.gather(0, owner[None])  # [1, T]
    image_rank = (~(scores < right) & ~own).sum(dim=0)  # [T]
    return {
        f"{way}_R@{cut}": float((rank < cut).double().mean())
        for way, rank in (("i2t", text_rank), ("t2i", image_rank))
        for cut in CUTS
    }
