"""The contact sheet: which rows are on it, where their pictures lie, and what it never writes over."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from data_rows import VQA
from PIL import Image

from adapters.data import lettering
from adapters.data.preview import CELL, GAP, PICTURE, preview_data
from qformer.errors import UserError

COLOURS = {"a": (255, 0, 0), "b": (0, 0, 255), "c": (0, 128, 0)}


@pytest.fixture
def rows(folder: Path, jsonl: Callable[..., Path]) -> Path:
    """Thirty rows about three pictures of one colour each."""
    for name, colour in COLOURS.items():
        Image.new("RGB", (64, 48), colour).save(folder / f"{name}.png")
    return jsonl(*(VQA | {"image": f"{'abc'[number % 3]}.png", "question": f"{number}?"} for number in range(30)))


def middle(sheet: Image.Image, column: int, top: int) -> tuple[int, ...]:
    """The colour in the middle of the picture of a cell."""
    place = (GAP + column * (CELL + GAP) + CELL // 2, top + PICTURE // 2)
    return tuple(sheet.convert("RGB").getpixel(place))  # type: ignore[arg-type]


def test_the_first_rows_lie_side_by_side_with_their_pictures(rows: Path, tmp_path: Path) -> None:
    made = preview_data(rows, tmp_path / "sheet.png", rows=6)
    assert (made.rows, made.bad_rows, made.bad_pictures, made.escaped) == ((1, 2, 3, 4, 5, 6), 0, 0, False)
    with Image.open(made.out) as sheet:
        assert (sheet.format, sheet.width) == ("PNG", GAP + 4 * (CELL + GAP))
        top = next(y for y in range(sheet.height) if middle(sheet, 0, y - PICTURE // 2) == COLOURS["a"])
        assert [middle(sheet, column, top) for column in range(4)] == [COLOURS[name] for name in "abca"]
        second = next(
            y for y in range(top + PICTURE, sheet.height) if middle(sheet, 0, y - PICTURE // 2) == COLOURS["b"]
        )
        assert [middle(sheet, column, second) for column in range(3)] == [*(COLOURS[n] for n in "bc"), (255, 255, 255)]


def test_the_texts_are_drawn(rows: Path, tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    """The same sheet with another answer differs below the picture and nowhere else."""
    one = Image.open(preview_data(rows, tmp_path / "one.png", rows=1).out).convert("RGB")
    path = jsonl(VQA | {"image": "a.png", "question": "0?", "answer": "a dog"})
    other = Image.open(preview_data(path, tmp_path / "other.png").out).convert("RGB")
    assert one.size == other.size
    picture_ends = max(y for y in range(one.height) if one.getpixel((one.width // 2, y)) == COLOURS["a"])
    head = (0, GAP + 24, one.width, picture_ends + 1)
    assert one.crop(head).tobytes() == other.crop(head).tobytes()
    below = (0, picture_ends + 1, one.width, one.height)
    assert one.crop(below).tobytes() != other.crop(below).tobytes()


def test_rows_are_drawn_by_lot_and_again_the_same(rows: Path, tmp_path: Path) -> None:
    drawn = [preview_data(rows, tmp_path / "sheet.png", rows=5, sample=seed).rows for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 5 and list(drawn[0]) == sorted(drawn[0]) and drawn[0] != (1, 2, 3, 4, 5)
    assert preview_data(rows, tmp_path / "sheet.png", rows=99, sample=0).rows == tuple(range(1, 31))


def test_several_pictures_share_the_box(rows: Path, tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    path = jsonl({"images": ["a.png", "b.png"], "question": "<image> or <image>?"})
    sheet = Image.open(preview_data(path, tmp_path / "sheet.png").out).convert("RGB")
    box = sheet.crop((GAP, 0, GAP + CELL, sheet.height))
    colours = {colour for _, colour in box.crop((0, 0, CELL // 2, sheet.height)).getcolors(1 << 20)}
    assert COLOURS["a"] in colours and COLOURS["b"] not in colours
    colours = {colour for _, colour in box.crop((CELL // 2, 0, CELL, sheet.height)).getcolors(1 << 20)}
    assert COLOURS["b"] in colours and COLOURS["a"] not in colours


def test_bad_rows_are_counted_and_a_bad_picture_shows_what_is_wrong(
    rows: Path, tmp_path: Path, jsonl: Callable[..., Path]
) -> None:
    path = jsonl(VQA, "broken", VQA | {"image": "d.png"}, VQA | {"image": "gone.png"})
    made = preview_data(path, tmp_path / "sheet.png")
    assert (made.rows, made.bad_rows, made.bad_pictures) == ((1, 3), 2, 1)
    with pytest.raises(UserError, match=r"row 1 \(line 1\): broken JSON"):
        preview_data(jsonl("broken"), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_letters_that_no_font_has_are_told(
    rows: Path, tmp_path: Path, jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lettering, "CJK_FONTS", ())
    assert preview_data(jsonl(VQA | {"answer": "一只猫"}), tmp_path / "sheet.png").escaped
    assert not preview_data(jsonl(VQA | {"answer": "un café"}), tmp_path / "sheet.png").escaped


def test_tiny_and_long_pictures_and_endless_texts(folder: Path, tmp_path: Path, jsonl: Callable[..., Path]) -> None:
    Image.new("RGB", (1, 1)).save(folder / "a.png")
    Image.new("L", (5000, 1)).save(folder / "b.png")
    rows = [VQA | {"image": name, "question": "why? " * 2000, "answer": "x" * 5000} for name in ("a.png", "b.png")]
    made = preview_data(jsonl(*rows), tmp_path / "sheet.png")
    with Image.open(made.out) as sheet:
        assert sheet.height < 1000


def test_only_an_earlier_sheet_is_written_over(rows: Path, folder: Path, tmp_path: Path) -> None:
    before = (folder / "a.png").read_bytes()
    with pytest.raises(UserError, match=r"--out .*a\.png: another file stands there"):
        preview_data(rows, folder / "a.png")
    assert (folder / "a.png").read_bytes() == before
    (tmp_path / "notes.png").write_text("mine")
    for name, says in {
        "notes.png": "another file stands there",
        "sheet.jpg": r"ends in \.png",
        "nowhere/sheet.png": "there is no folder",
    }.items():
        with pytest.raises(UserError, match=says):
            preview_data(rows, tmp_path / name)
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match="this is a folder"):
        preview_data(rows, tmp_path / "folder.png")
    first = preview_data(rows, tmp_path / "sheet.png", rows=1).out.read_bytes()
    assert preview_data(rows, tmp_path / "sheet.png", rows=2).out.read_bytes() != first
