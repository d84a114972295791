"""Pictures that two sets share: found by bytes, by pixels and as near copies, and nothing else is."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageEnhance

from adapters.data import duplicates
from adapters.data.duplicates import MAX_LEVELS, Copy, copies_between, copies_between_rows, describe_copies
from adapters.data.examples import Example
from adapters.data.image_ref import ImageRef

pytestmark = pytest.mark.usefixtures("cache_here")


def picture(seed: int, size: int = 96) -> Image.Image:
    """Soft patches of colour, as a photo has."""
    cells = np.random.default_rng(seed).integers(0, 256, (6, 6, 3)).astype(np.uint8)
    return Image.fromarray(cells).resize((size, size), Image.Resampling.BICUBIC)


def saved(image: Image.Image, label: str, kind: str = "PNG", **options: int) -> ImageRef:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return ImageRef(label, data=buffer.getvalue())


def gauge(angle: tuple[int, int]) -> Image.Image:
    image = Image.new("RGB", (128, 128), "white")
    draw = ImageDraw.Draw(image)
    draw.ellipse((8, 8, 120, 120), outline="black", width=3)
    draw.line((64, 64, *angle), fill="red", width=5)
    return image


TRAIN = [saved(picture(number), f"train{number}") for number in range(4)]


def how_of(image: ImageRef) -> list[tuple[str, str]]:
    return [(pair.train, pair.how) for pair in copies_between(TRAIN, [image]).pairs]


def test_bytes_pixels_and_near_copies_are_told_apart() -> None:
    test = [
        saved(picture(2), "same"),
        saved(picture(1), "bitmap", "BMP"),
        saved(picture(9), "another"),
        saved(picture(3), "jpeg", "JPEG", quality=40),
        saved(picture(0).resize((48, 48)), "half"),
        saved(picture(0).resize((48, 48)), "half again"),
    ]
    found = copies_between(TRAIN * 2, test)
    assert found.pairs == (
        Copy("train2", "same", "bytes"),
        Copy("train1", "bitmap", "pixels"),
        Copy("train3", "jpeg", "near"),
        Copy("train0", "half", "near"),  # a picture counts once, whatever its names
    )
    assert found.unreadable == ()
    assert describe_copies(found.pairs, 2) == ["same is train2 (the same bytes)", "bitmap is train1 (the same pixels)"]
    assert describe_copies(found.pairs[2:], 1) == ["jpeg is train3 (a near copy)"]


def test_a_little_more_light_is_a_near_copy_and_another_picture_is_none() -> None:
    assert how_of(saved(ImageEnhance.Brightness(picture(1)).enhance(1.08), "light")) == [("train1", "near")]
    assert how_of(saved(picture(1).transpose(Image.Transpose.FLIP_LEFT_RIGHT), "mirrored")) == []
    assert how_of(saved(picture(1).convert("L").convert("RGB"), "grey")) == []


def test_colour_and_details_that_the_hash_does_not_see_keep_pictures_apart() -> None:
    plain = [saved(Image.new("RGB", (32, 32), colour), colour) for colour in ("red", "blue", "white")]
    assert copies_between(plain[:2], plain[2:]).pairs == ()
    low, high = saved(gauge((30, 30)), "low"), saved(gauge((46, 20)), "high")
    assert np.bitwise_count(look(low).hash ^ look(high).hash) <= duplicates.MAX_BITS
    assert copies_between([low], [high]).pairs == ()


def look(image: ImageRef) -> duplicates._Look:
    found = duplicates._look(image)
    assert isinstance(found, duplicates._Look)
    return found


def test_the_hash_by_hand() -> None:
    """Nine columns that grow brighter have every bit set, any others none: 8 rows of 8 bits; 2 levels are noise."""
    ramp = np.tile(np.arange(0, 180, 20, dtype=np.uint8), (8, 1))
    up, down = (Image.fromarray(rows).convert("RGB") for rows in (ramp, ramp[:, ::-1].copy()))
    assert int(look(saved(up, "up")).hash) == 2**64 - 1
    assert int(look(saved(down, "down")).hash) == 0
    faint = Image.fromarray(ramp // 10).convert("RGB")
    assert int(look(saved(faint, "faint")).hash) == 0
    assert look(saved(up, "up")).colours.shape == (16 * 16 * 3,)


@pytest.mark.parametrize(("levels", "copies"), [(MAX_LEVELS, 1), (MAX_LEVELS + 1, 0)])
def test_one_cell_decides(levels: int, copies: int) -> None:
    cells = np.full((16, 16, 3), 100, np.uint8)
    first = saved(Image.fromarray(cells), "first")
    cells[15, 15, 2] += levels
    assert len(copies_between([first], [saved(Image.fromarray(cells), "second")]).pairs) == copies


def test_the_nearest_of_several_is_named() -> None:
    plain = [saved(Image.new("RGB", (16, 16), (level,) * 3), str(level)) for level in (100, 110, 120)]
    (pair,) = copies_between(plain, [saved(Image.new("RGB", (16, 16), (112,) * 3), "112")]).pairs
    assert (pair.train, pair.how) == ("110", "near")


def test_what_cannot_be_read_is_named_once_and_the_rest_is_compared(tmp_path: Path) -> None:
    broken = ImageRef("broken", data=b"no picture")
    gone = ImageRef("gone.png", path=tmp_path / "gone.png")
    found = copies_between([*TRAIN, broken, gone], [saved(picture(1), "bitmap", "BMP"), gone])
    assert [(pair.train, pair.test) for pair in found.pairs] == [("train1", "bitmap")]
    assert len(found.unreadable) == 2
    assert any("image 'broken' is not a picture" in line for line in found.unreadable)
    assert any("image 'gone.png' is not there" in line for line in found.unreadable)


def test_nothing_is_decoded_if_the_bytes_settle_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "open_image", lambda ref: pytest.fail(f"{ref.label} was opened"))
    assert [pair.how for pair in copies_between(TRAIN, TRAIN[:2]).pairs] == ["bytes", "bytes"]
    assert copies_between([], []).pairs == ()


def test_each_picture_is_decoded_once_and_counted_a_few_times(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []
    really = duplicates.open_image

    def count(ref: ImageRef) -> Image.Image:
        opened.append(ref.label)
        return really(ref)

    monkeypatch.setattr(duplicates, "open_image", count)
    seen: list[tuple[int, int]] = []
    test = [saved(picture(number), f"test{number}") for number in (7, 8, 2)]
    copies_between(TRAIN * 3, test * 2, on_progress=lambda done, total: seen.append((done, total)))
    assert sorted(opened) == ["test7", "test8", "train0", "train1", "train2", "train3"]
    first = copies_between(TRAIN, test)  # and never again: how they look is remembered
    assert len(opened) == 6 and [pair.test for pair in first.pairs] == ["test2"]
    assert seen[-1] == (6, 6) and len(seen) <= 10


def test_rows_bring_all_their_pictures() -> None:
    train = [Example((TRAIN[0], TRAIN[1]), "?", ("x",), "", "1")]
    test = [Example((TRAIN[3], TRAIN[1]), "?", ("x",), "", "1"), Example((TRAIN[0],), "?", ("x",), "", "2")]
    assert [pair.test for pair in copies_between_rows(train, test).pairs] == ["train1", "train0"]
