"""Letters: drawn in a font that has them, or written as escapes; never boxes, never lost."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image, ImageDraw

from adapters.data import lettering
from adapters.data.lettering import Lettering


@pytest.fixture
def no_cjk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lettering, "CJK_FONTS", ())


@pytest.fixture
def cjk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A font of 中 and 文 that draws each as a full square, and what it lacks as a thin bar."""

    def box(right: int) -> object:
        pen = TTGlyphPen(None)
        pen.moveTo((0, 0))
        for point in ((0, 1000), (right, 1000), (right, 0)):
            pen.lineTo(point)
        pen.closePath()
        return pen.glyph()

    builder = FontBuilder(1000, isTTF=True)
    builder.setupGlyphOrder([".notdef", "zhong", "wen"])
    builder.setupCharacterMap({ord("中"): "zhong", ord("文"): "wen"})
    builder.setupGlyf({".notdef": box(50), "zhong": box(1000), "wen": box(1000)})
    builder.setupHorizontalMetrics({name: (1000, 0) for name in (".notdef", "zhong", "wen")})
    builder.setupHorizontalHeader(ascent=1000, descent=-200)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    builder.save(tmp_path / "squares.ttf")
    monkeypatch.setattr(lettering, "CJK_FONTS", ("no such font.ttf", str(tmp_path / "squares.ttf")))


def ink(letters: Lettering, text: str) -> np.ndarray:
    """What is drawn of a line, as True where it is dark."""
    picture = Image.new("L", (400, 40), 255)
    letters.draw(ImageDraw.Draw(picture), (0, 0), text, "black")
    return np.asarray(picture) < 128


def test_plain_text_stays_as_it_is(no_cjk: None) -> None:
    letters = Lettering(16)
    assert letters.drawable("What is\tit?\n ") == "What is it?"
    assert not letters.escaped
    assert ink(letters, "What is it?").any()


def test_accents_greek_and_cyrillic_are_drawn(no_cjk: None) -> None:
    letters = Lettering(16)
    for text in ("café à gauche", "αβγ", "Какого цвета?"):
        assert letters.drawable(text) == text
    assert not letters.escaped
    assert not np.array_equal(ink(letters, "é"), ink(letters, "à"))  # boxes would be alike


def test_chinese_without_a_font_becomes_escapes(no_cjk: None) -> None:
    letters = Lettering(16)
    assert letters.drawable("a 中文 b") == "a \\u4e2d\\u6587 b"
    assert letters.escaped


def test_chinese_with_a_font_is_drawn_in_it(cjk: None) -> None:
    letters = Lettering(16)
    assert letters.drawable("中文") == "中文"
    assert not letters.escaped
    assert letters.width("中文") == 32
    drawn = ink(letters, "中文")
    assert drawn[:, :32].sum() == pytest.approx(32 * 16, rel=0.1) and not drawn[:, 34:].any()
    assert letters.drawable("中国") == "中\\u56fd"  # what that font lacks
    assert letters.escaped


def test_a_line_of_two_scripts_keeps_both(cjk: None) -> None:
    letters = Lettering(16)
    drawn = ink(letters, "il 中")
    start = round(letters.width("il "))
    assert drawn[:, start : start + 16].sum() > 200  # the square
    assert 0 < drawn[:, :start].sum() < 150  # two thin letters


def test_lines_are_as_wide_as_they_may_be(cjk: None) -> None:
    letters = Lettering(16)
    for text in ("one two three four five six seven", "a" * 60, "中文" * 20, "中文 " * 20, "one " + "b" * 40 + " two"):
        lines = letters.wrap(text, 100, 99)
        assert all(letters.width(line) <= 100 for line in lines), text
        assert "".join(lines).replace(" ", "") == text.replace(" ", "")  # nothing lost
        for line, following in pairwise(lines):  # nothing that would have fitted above
            assert letters.width(f"{line} {following.split(' ')[0]}") > 100 or letters.width(line + following[0]) > 100
    assert letters.wrap("one two three", 1000, 1) == ["one two three"]
    assert letters.wrap("", 100, 3) == [""]


def test_what_is_too_long_ends_in_dots(no_cjk: None) -> None:
    letters = Lettering(16)
    lines = letters.wrap("word " * 100_000, 100, 3)
    assert len(lines) == 3 and lines[-1].endswith("…") and letters.width(lines[-1]) <= 100
    lines = letters.wrap("w" * 500_000, 100, 2)
    assert len(lines) == 2 and lines[-1].endswith("w…")
