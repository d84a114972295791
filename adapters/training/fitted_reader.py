"""A closed-form reader as a run holds it, and how numbers of many pictures are read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adapters.data.image_ref import ImageRef
from adapters.loading.reader import LeftOut, Reader

_CHUNK = 64  # pictures whose features are in memory at once

Look = Callable[[Sequence[ImageRef]], Sequence[Tensor]]
"""Pictures to what is read of them, [B, P_i, D_i] each, on the CPU."""


@dataclass(frozen=True)
class FittedReader:
    """A reader with what it says of its own training data.

    Attributes:
        reader: the reader.
        line: one sentence for the run to print.
        left_out: scores of the training data, each picture by all others.
    """

    reader: Reader
    line: str
    left_out: LeftOut

    def __str__(self) -> str:
        return self.line


def apply_in_parts(look: Look, numbers_of: Callable[[Sequence[Tensor]], Tensor], images: Sequence[ImageRef]) -> Tensor:
    """The numbers of all images, [M, r], of which few features are in memory at once."""
    chunks = [images[start : start + _CHUNK] for start in range(0, len(images), _CHUNK)]
    return torch.cat([numbers_of(look(chunk)) for chunk in chunks])
