"""Rows and files of rows for the tests of readers and batch jobs."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from adapters.data.images import open_image
from adapters.data.reading import read_data
from qformer.errors import UserError

VQA = {"image": "a.png", "question": "What is it?", "answer": "a cat"}
CAPTION = {"image": "a.png", "caption": "A cat."}


def complaint(path: Path | str, **options: object) -> str:
    """What is said, in one line, about data that cannot be read."""
    with pytest.raises(UserError) as caught:
        read_data(path, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    """Write rows, as objects or as they are, a line each."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def borrowed(picture: Path, folder: Path) -> str:
    """A picture of another folder as a data file in this one may name it: it lies here too; its path, absolute."""
    place = folder / "borrowed" / picture.name
    place.parent.mkdir(exist_ok=True)
    if not place.exists():
        shutil.copy(picture, place)
    return str(place)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the rows back; only a line feed ends a line."""
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]


COLOURS = ("red", "lime", "blue")


def encoded(colour: str, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, kind)
    return buffer.getvalue()


def colours(source: Path | str, **options: Any) -> list[tuple[tuple[int, int, int], str]]:
    """The colour of each row's picture, as it is decoded, and the row's answer."""
    found = read_data(source, **options).examples
    return [(open_image(row.images[0]).getpixel((4, 4)), row.answer) for row in found]  # type: ignore[misc]


EXPECTED = [((255, 0, 0), "stop"), ((0, 255, 0), "sea"), ((0, 0, 255), "go")]
