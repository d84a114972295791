"""Views of a training picture: the same in every run, known apart, mirrored only where no side is named."""

from __future__ import annotations

import io
import random
from collections import Counter
from dataclasses import replace

import numpy as np
import torch
from fake_encoder import picture
from PIL import Image
from torch import Tensor

from adapters.data.batches import Picture, Question, plan_epoch, plan_validation
from adapters.data.captioned import Captioned, draw, image_numbers
from adapters.data.images import ImageRef, open_image
from adapters.data.views import all_views, cut_view, draw_view, names_a_side
from adapters.prefetch import decoded_batches


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
    assert cut_view(whole, image) is whole
    shares = []
    for ref in all_views(image, 9)[1:]:
        red, green, _ = pixels_of(cut_view(whole, ref))
        steps = red.diff(dim=1).unique().tolist()
        assert steps == ([-1] if ref.view % 2 == 0 else [1])
        assert green.diff(dim=0).unique().tolist() == [1]
        shares.append(red.numel() / (200 * 120))
        again = cut_view(whole, ref)
        assert again.tobytes() == cut_view(whole, replace(ref, label="other")).tobytes()
    assert 0.45 < min(shares) < max(shares) <= 1 and len(set(shares)) == 8


def test_a_view_has_a_name_of_its_own_and_the_picture_s_content() -> None:
    views = all_views(picture(3), 5)
    assert len({ref.digest() for ref in views}) == 5
    assert {ref.content_digest() for ref in views} == {picture(3).digest()}
    assert all(len(ref.digest()) == 64 for ref in views)
    captions = [(Captioned(ref, ("a",)), ["a"]) for ref in views]
    assert len(image_numbers(captions).unique()) == 1  # whichever view: captions of one picture are no negatives


def test_views_come_as_likely_and_unmirrored_where_a_side_is_named() -> None:
    rng = random.Random(0)
    drawn = Counter(draw_view(picture(1), 5, rng).view for _ in range(1000))
    assert set(drawn) == set(range(5)) and min(drawn.values()) > 150
    assert {draw_view(picture(1), 5, rng, sided=True).view for _ in range(100)} == {0, 1, 3}
    assert draw_view(picture(1), 1, rng) == picture(1)


def test_left_and_right_are_words() -> None:
    assert names_a_side(["what is Left of the bed?"]) and names_a_side(["a dog", "他的右手"])
    assert not names_a_side(["a bright cleft", "leftovers"])


def test_an_epoch_s_rows_show_views_and_validation_shows_pictures() -> None:
    def made(sided: bool) -> list[Picture]:
        asked = tuple(Question((q,), ((1,),), "") for q in range(4))
        return [Picture((picture(p),), (3,), asked, sided) for p in range(30)]

    def seen(sided: bool, views: int) -> set[int]:
        steps = plan_epoch(made(sided), seed=0, epoch=0, batch_size=8, row_tokens=0, views=views)
        return {image.view for step in steps for row in step.rows for image in row.images}

    assert (seen(False, 4), seen(True, 4), seen(False, 1)) == ({0, 1, 2, 3}, {0, 1, 3}, {0})
    step = plan_validation(made(False), row_tokens=0)
    assert {image.view for row in step.rows for image in row.images} == {0}


def test_the_first_stage_draws_a_view_with_its_captions() -> None:
    rng = random.Random(0)
    plain, sided = Captioned(picture(1), ("a dog", "a cat")), Captioned(picture(1), ("a dog on the left",))
    assert {draw(plain, 1, rng, views=3)[0].image.view for _ in range(60)} == {0, 1, 2}
    assert {draw(sided, 1, rng, views=3)[0].image.view for _ in range(60)} == {0, 1}


def test_features_are_made_of_the_view() -> None:
    refs = all_views(slope(), 3)
    size = torch.Size((3, 8, 8))
    ((_, pixels),) = decoded_batches(
        refs, lambda images: torch.stack([pixels_of(image.resize((8, 8))) for image in images]), 3
    )
    assert pixels.shape[1:] == size
    red = pixels[:, 0]
    assert (red[0, 0, -1] > red[0, 0, 0]) and (red[1, 0, -1] > red[1, 0, 0]) and (red[2, 0, -1] < red[2, 0, 0])
