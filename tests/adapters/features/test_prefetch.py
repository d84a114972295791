"""Pictures decoded ahead: in order, in batches, in threads that end, and never other bytes than were named."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from fake_encoder import picture, pictures
from PIL import Image
from torch import Tensor

from adapters.data.image_ref import ImageRef
from adapters.features.prefetch import decoded_batches
from qformer.errors import UserError


def red(images: Sequence[Image.Image]) -> Tensor:
    """The red channel of each picture's first pixel, [B, 1, 1, 1]."""
    return torch.tensor([float(image.getpixel((0, 0))[0]) for image in images]).view(-1, 1, 1, 1)


def threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("decode")]


def test_batches_come_in_order_and_hold_their_own_pictures() -> None:
    refs = pictures(*range(11))
    batches = list(decoded_batches(refs, red, 4))
    assert [len(part) for part, _ in batches] == [4, 4, 3]
    assert [ref for part, _ in batches for ref in part] == refs
    assert torch.cat([pixels for _, pixels in batches]).flatten().tolist() == list(range(11))
    assert threads() == []


def test_no_more_than_a_few_batches_are_decoded_ahead() -> None:
    seen = []

    def note(images: Sequence[Image.Image]) -> Tensor:
        seen.append(len(images))
        return red(images)

    batches = decoded_batches(pictures(*range(40)), note, 2)
    next(batches)
    batches.close()  # waits for what was begun
    assert set(seen) == {1}  # one picture at a time in each thread
    assert 2 <= len(seen) <= 6  # the batch that was taken, and two ahead
    assert threads() == []


def test_a_bad_picture_ends_it_after_those_before_it() -> None:
    bad = ImageRef("bad.png", data=b"not a picture", where="data.jsonl row 3 (line 3)")
    batches = decoded_batches([*pictures(1, 2), bad, *pictures(3)], red, 2)
    assert next(batches)[1].flatten().tolist() == [1, 2]
    with pytest.raises(UserError, match=r"^data\.jsonl row 3 \(line 3\): image 'bad\.png' is not a picture"):
        next(batches)
    assert threads() == []


def test_bytes_that_changed_since_they_were_named_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture(1).data or b"")
    ref = ImageRef("a.png", path=path)
    ref.digest()
    path.write_bytes(picture(2).data or b"")
    with pytest.raises(UserError, match=r"'a\.png' has changed since it was first read"):
        list(decoded_batches([ref], red, 1))
