"""Views of a training picture: the same in every run, known apart, mirrored only where no side is named."""

from __future__ import annotations

import io
import random
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_encoder import picture
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer

from adapters.data.batches import TokenisedPicture, TokenisedQuestion, plan_epoch, plan_validation, tokenise
from adapters.data.caption_batches import CaptionedPicture, draw_batch, image_numbers
from adapters.data.examples import DataSet, Example
from adapters.data.image_ref import ImageRef
from adapters.data.images import open_image
from adapters.data.prompts import PromptBuilder
from adapters.data.views import all_views, cut_view, draw_view, names_a_side
from adapters.features.prefetch import decoded_batches


def slope(width: int = 200, height: int = 120) -> ImageRef:
    """Red grows to the right, green downwards: a pixel tells where it comes from."""
    image = Image.new("RGB", (width, height))
    image.putdata([(x, y, 0) for y in range(height) for x in range(width)])
    file = io.BytesIO()
    image.save(file, format="PNG")
    return ImageRef("slope", data=file.getvalue())


def pixels_of(image: Image.Image) -> Tensor:
    """[3, H, W] of whole numbers."""
    return torch.from_numpy(np.array(image)).long().permute(2, 0, 1)


def test_a_view_is_a_part_of_the_picture_and_every_second_one_is_mirrored() -> None:
    image = slope()
    whole = open_image(image)
    assert cut_view(whole, image.digest(), 0) is whole
    shares = []
    for ref in all_views([image], 9)[1:]:
        red, green, _ = pixels_of(open_image(ref))
        steps = red.diff(dim=1).unique().tolist()
        assert steps == ([-1] if ref.view % 2 == 0 else [1])
        assert green.diff(dim=0).unique().tolist() == [1]
        shares.append(red.numel() / (200 * 120))
        assert open_image(ref).tobytes() == cut_view(whole, image.digest(), ref.view).tobytes()
    assert 0.45 < min(shares) < max(shares) <= 1 and len(set(shares)) == 8


def test_a_view_has_a_name_of_its_own_and_the_picture_s_content() -> None:
    views = all_views([picture(3), replace(picture(3), label="again")], 5)
    assert len({ref.digest() for ref in views}) == 5
    assert {ref.content_digest() for ref in views} == {picture(3).digest()}
    assert all(len(ref.digest()) == 64 for ref in views)
    captions = [(CaptionedPicture(ref, ("a",)), ["a"]) for ref in views]
    assert len(image_numbers(captions).unique()) == 1  # whichever view: captions of one picture are no negatives


def test_views_come_as_likely_and_unmirrored_where_a_side_is_named() -> None:
    rng = random.Random(0)
    one = (picture(1),)
    drawn = Counter(draw_view(one, 5, rng)[0].view for _ in range(1000))
    assert set(drawn) == set(range(5)) and min(drawn.values()) > 150
    assert {draw_view(one, 5, rng, sided=True)[0].view for _ in range(100)} == {0, 1, 3}
    assert draw_view(one, 1, rng) == one
    two = (picture(1), picture(2))
    assert all(draw_view(two, 5, rng) == two for _ in range(20))  # before and after: seen alike


def test_a_file_is_read_once_for_all_its_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture(1).data or b"")
    opened = []
    monkeypatch.setattr(ImageRef, "open", lambda self, was=ImageRef.open: opened.append(self) or was(self))
    image = ImageRef("a.png", path=path)
    views = all_views([image] * 3, 4)
    rng = random.Random(0)
    views += [draw_view((image,), 4, rng)[0] for _ in range(20)]
    assert len({ref.digest() for ref in views}) == 4 and len(opened) == 1


def test_left_and_right_are_words() -> None:
    for text in (
        "what is Left of the bed?",
        "他的右手",
        "the leftmost shape",
        "left_arrow",
        "left-handed",
        "rightwards",
    ):
        assert names_a_side(["a dog", text]), text
    assert not names_a_side(["a bright cleft", "leftovers", "righteous"])


def test_reasons_that_name_a_side_keep_a_picture_unmirrored(language_folders: dict[str, Path]) -> None:
    prompts = PromptBuilder(AutoTokenizer.from_pretrained(language_folders["llama"]), 2, is_encoder_decoder=False)
    for rationale, sided in (("From left to right: a circle.", True), ("There is a circle.", False)):
        row = Example((picture(1),), "Is it round?", ("yes",), "row 1", "1", rationale=rationale)
        data = DataSet("data", "reason", (row,), "")
        (found,) = tokenise(data, prompts, max_tokens=999, stages=["answer"])
        assert found.sided is sided


def test_an_epoch_s_rows_show_views_and_validation_shows_pictures() -> None:
    def made(sided: bool) -> list[TokenisedPicture]:
        asked = tuple(TokenisedQuestion((q,), ((1,),), "") for q in range(4))
        return [TokenisedPicture((picture(p),), (3,), asked, sided) for p in range(30)]

    def seen(sided: bool, views: int) -> set[int]:
        steps = plan_epoch(made(sided), seed=0, epoch=0, batch_size=8, row_tokens=0, views=views)
        return {image.view for step in steps for row in step.rows for image in row.images}

    assert (seen(False, 4), seen(True, 4), seen(False, 1)) == ({0, 1, 2, 3}, {0, 1, 3}, {0})
    step = plan_validation(made(False), row_tokens=0)
    assert {image.view for row in step.rows for image in row.images} == {0}


def test_the_first_stage_draws_a_view_with_its_captions() -> None:
    rng = random.Random(0)
    plain, sided = (
        CaptionedPicture(picture(1), ("a dog", "a cat")),
        CaptionedPicture(picture(1), ("a dog on the left",)),
    )
    assert {shown.image.view for shown, _ in draw_batch([plain] * 60, 1, rng, views=3)} == {0, 1, 2}
    assert {shown.image.view for shown, _ in draw_batch([sided] * 60, 1, rng, views=3)} == {0, 1}


def test_features_are_made_of_the_view() -> None:
    refs = all_views([slope()], 3)
    size = torch.Size((3, 8, 8))
    ((_, pixels),) = decoded_batches(
        refs, lambda images: torch.stack([pixels_of(image.resize((8, 8))) for image in images]), 3
    )
    assert pixels.shape[1:] == size
    red = pixels[:, 0]
    assert (red[0, 0, -1] > red[0, 0, 0]) and (red[1, 0, -1] > red[1, 0, 0]) and (red[2, 0, -1] < red[2, 0, 0])
