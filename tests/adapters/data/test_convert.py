"""A converted file says what its source said: the same questions, answers, turns and pictures, read from elsewhere."""

from __future__ import annotations

import base64
import datetime
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pandas
import pytest
import webdataset
from data_rows import VQA
from PIL import Image
from pyarrow import parquet

from adapters.data.convert import convert_data
from adapters.data.preview_page import preview_page
from adapters.data.reading import read_data
from qformer.errors import UserError

TALK = {
    "messages": [
        {"role": "system", "content": "Be short."},
        {"role": "user", "content": "<image>Why?"}, {"role": "assistant", "content": "So."},
        {"role": "user", "content": "Sure?"}, {"role": "assistant", "content": "Yes."},
    ],
    "images": ["b.png"],
}  # fmt: skip


def encoded(colour: str) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), colour).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def pictures(folder: Path) -> Path:
    """Pictures a to d."""
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "lime"), ("d", "teal")):
        (folder / f"{name}.png").write_bytes(encoded(colour))
    return folder


def said(path: Path | str, **options: Any) -> list[tuple[object, ...]]:
    return [
        (
            row.question, row.answers, row.choices, row.context, row.kind, row.language, row.rationale,
            [image.content_digest() for image in row.images], [(turn.role, turn.text) for turn in row.history],
        )
        for row in read_data(path, **options).examples
    ]  # fmt: skip


def sets(folder: Path) -> dict[str, list[dict[str, Any]]]:
    part = {"type": "image_url", "image_url": {"url": "c.png"}}
    parts = [{"role": "user", "content": [part, {"type": "text", "text": "And?"}]}, TALK["messages"][2]]
    return {
        "questions": [
            VQA | {"id": 7, "kind": "open", "note": {"by": ["me"]}},
            VQA | {"image": str(folder / "b.png"), "answer": ["a", "a", "b"], "language": "de"},
            {"images": ["c.png", "d.png"], "question": "<image> or <image>?", "answers": [3.0, 3]},
            {"file_name": "a.png", "question": "which?", "choices": ["x, y", "z"], "answer": "z", "context": "It is."},
        ],
        "captions": [{"image": "a.png", "caption": "One."}, {"image": "b.png", "captions": ["Two.", "Zwei."]}],
        "reasons": [VQA | {"rationale": "because", "steps": 2}, VQA | {"image": "c.png", "rationale": ""}],
        "turns": [TALK, TALK | {"images": ["c.png"]}],
        "parts": [TALK, {"messages": parts}],
    }


@pytest.mark.parametrize("name", ["questions", "captions", "reasons", "turns", "parts"])
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_nothing_changes_on_the_way(
    name: str, ending: str, pictures: Path, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    source = jsonl(*sets(pictures)[name])
    (tmp_path / "elsewhere").mkdir()
    out = tmp_path / "elsewhere" / f"rows.{ending}"
    made = convert_data(source, out)
    assert made.outside is (ending == "jsonl")
    assert (made.rows, made.bad_rows) == (len(sets(pictures)[name]), 0)
    assert said(out, allow_outside=True) == said(source)
    again = tmp_path / "elsewhere" / "again.jsonl"
    assert convert_data(out, again, allow_outside=True).out == again
    assert said(again, allow_outside=True) == said(source)
    if ending == "parquet":
        (pictures / "a.png").rename(pictures / "moved.png")  # the pictures are inside
        assert len(said(out)) == len(said(again))


def test_fields_that_nothing_reads_keep_their_kind_in_parquet(pictures: Path, tmp_path: Path) -> None:
    frame = pandas.DataFrame([{**VQA, "score": 1.5, "day": datetime.date(2020, 1, 2)}, {**VQA, "score": 2.0}])
    frame.to_parquet(pictures / "rows.parquet")
    convert_data(pictures / "rows.parquet", tmp_path / "out.parquet")
    first, second = parquet.read_table(tmp_path / "out.parquet").to_pylist()
    assert (first["score"], second["score"]) == (1.5, 2.0)
    assert (first["day"], second["day"]) == ("2020-01-02", None)


@pytest.mark.parametrize("row", [
    {"images": ["a.png"], "texts": [{"user": "What is it?", "assistant": "a cat"}]},
    {"image": "a.png", "instruction": "And now?", "output": "a dog", "history": [["What is it?", "a cat"]]},
])  # fmt: skip
def test_turns_of_every_shape_come_back(
    row: dict[str, Any], pictures: Path, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    path = jsonl(row)
    convert_data(path, tmp_path / "out.parquet")
    assert said(tmp_path / "out.parquet") == said(path)


def test_hugging_face_reads_what_is_written(pictures: Path, jsonl: Callable[..., Path], tmp_path: Path) -> None:
    for name, rows in sets(pictures).items():
        out = tmp_path / f"{name}.parquet"
        convert_data(jsonl(*rows), out)
        theirs = datasets.Dataset.from_parquet(str(out), cache_dir=str(tmp_path / "cache"))
        assert len(theirs) == len(rows)
        shown = [*filter(None, (theirs[0].get("image"), *(theirs[0].get("images") or [])))]
        assert all(isinstance(picture, Image.Image) for picture in shown) and len(shown) == 1
    assert theirs[0]["images"][0].getpixel((0, 0)) == (0, 0, 255)


def test_pictures_out_of_an_archive_become_files(tmp_path: Path) -> None:
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as sink:
        for number, colour in enumerate(("red", "red", "blue")):
            sink.write({"__key__": str(number), "png": encoded(colour), "json": {"question": "?", "answer": colour}})
    made = convert_data(tmp_path / "a.tar", tmp_path / "out.jsonl")
    assert (made.rows, made.pictures) == (3, 2)
    first = json.loads((tmp_path / "out.jsonl").read_text().splitlines()[0])
    assert re.fullmatch(r"out\.pictures/[0-9a-f]{32}\.png", first["image"])
    assert said(tmp_path / "out.jsonl") == said(tmp_path / "a.tar")


def test_columns_and_bad_rows(pictures: Path, jsonl: Callable[..., Path], tmp_path: Path) -> None:
    source = jsonl({"photo": "a.png", "question": "?", "answer": "x"}, {"photo": "gone.png"}, "broken")
    out = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match="2 of 3 rows are bad"):
        convert_data(source, out, columns={"image": "photo"})
    assert not out.exists()
    made = convert_data(source, out, columns={"image": "photo"}, skip_bad_rows=True)
    assert (made.rows, made.bad_rows) == (1, 2)
    assert json.loads(out.read_text()) == {"image": "a.png", "question": "?", "answer": "x"}
    for wrong, words in ((out, "a file stands there"), (tmp_path / "x.csv", "ends in .jsonl or .parquet")):
        with pytest.raises(UserError, match=words):
            convert_data(source, wrong, columns={"image": "photo"}, skip_bad_rows=True)
    with pytest.raises(UserError, match="there is no folder"):
        convert_data(source, tmp_path / "none" / "x.jsonl", columns={"image": "photo"}, skip_bad_rows=True)
    assert not list(tmp_path.glob("*.partial"))


# -- the page ----------------------------------------------------------------------------------------------------------


def test_the_page_stands_by_itself_and_shows_words_as_they_are(
    pictures: Path, jsonl: Callable[..., Path], tmp_path: Path
) -> None:
    (pictures / "broken.png").write_bytes(b"no picture")
    nasty = "<script>alert(1)</script> & \u4e2d"
    source = jsonl(VQA | {"question": nasty}, TALK, VQA | {"image": "broken.png"}, VQA | {"image": "<gone>.png"})
    out = tmp_path / "page.html"
    made = preview_page(source, out)
    assert (made.rows, made.bad_rows, made.bad_pictures) == ((1, 2, 3), 1, 1)
    text = out.read_text(encoding="utf-8")
    assert "<script" not in text and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; \u4e2d" in text
    assert "&lt;gone&gt;.png" in text and "broken.png&#x27; is not a picture" in text
    assert "assistant: So." in text and "system: Be short." in text
    assert text.count("data:image/jpeg;base64,") == 2
    assert not re.search(r"(src|href)=[\"'](?!data:)", text) and "http" not in text.replace("http-equiv", "")
    preview_page(source, out)  # an earlier page may be replaced
    wrong = {"x.txt": "ends in .html", "none/x.html": "there is no folder", "own.html": "another file"}
    for name, words in wrong.items():
        (tmp_path / "own.html").write_text("<p>mine</p>")
        with pytest.raises(UserError, match=words):
            preview_page(source, tmp_path / name)


def test_pictures_without_a_name_get_the_ending_of_their_format(tmp_path: Path) -> None:
    pandas.DataFrame([{**VQA, "image": encoded("red")}]).to_parquet(tmp_path / "rows.parquet")
    convert_data(tmp_path / "rows.parquet", tmp_path / "out.jsonl")
    assert json.loads((tmp_path / "out.jsonl").read_text())["image"].endswith(".png")


def test_a_picture_as_bare_base64_is_told_what_it_lacks(jsonl: Callable[..., Path]) -> None:
    bare = "/" + base64.b64encode(encoded("red") * 3).decode()
    with pytest.raises(UserError, match="a base64 picture begins with 'data:image/png;base64,'"):
        read_data(jsonl({**VQA, "image": bare}))
