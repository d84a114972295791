"""Rows of several pictures in every kind of file, their `<image>` marks, and what is wrong with such rows."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from data_rows import CAPTION, VQA, complaint, write_jsonl

from adapters.data.reading import read_data

TWO = ["a.png", "b.png"]
SEVERAL = {"images": TWO, "question": "Which is it?", "answer": "a cat"}


def write(folder: Path, suffix: str, rows: list[dict[str, object]]) -> Path:
    """Write rows of the same fields as the kind of file that the suffix says; in CSV a list is JSON in its cell."""
    path = folder / f"rows.{suffix}"
    if suffix == "jsonl":
        return write_jsonl(path, rows)
    if suffix == "json":
        path.write_text(json.dumps(rows, indent=1))
        return path
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(rows[0])
        for row in rows:
            writer.writerow([cell if isinstance(cell, str) else json.dumps(cell) for cell in row.values()])
    return path


@pytest.mark.parametrize(
    ("suffix", "field"),
    [
        *((suffix, field) for suffix in ("jsonl", "json", "csv") for field in ("images", "image")),
        ("jsonl", "file_name"),
    ],
)
def test_several_pictures_are_read_in_order(folder: Path, suffix: str, field: str) -> None:
    uri = "data:image/png;base64," + base64.b64encode(b"bytes").decode()
    pictures: list[object] = [["b.png", "a.png"], ["c.png"], [str(folder / "d.png"), uri, "d.png"], "a.png"]
    questions = ["<image> or <image>?", "What is it?", "<image>, <image>, <image>: which?", "Is <image> a cat?"]
    rows = [{field: images, "question": q, "answer": "x"} for images, q in zip(pictures, questions, strict=True)]

    data = read_data(write(folder, suffix, rows))

    assert data.skipped == ()
    paths = [[image.path and image.path.name for image in example.images] for example in data.examples]
    assert paths == [["b.png", "a.png"], ["c.png"], ["d.png", None, "d.png"], ["a.png"]]
    assert data.examples[2].images[1].read() == b"bytes"
    assert [example.question for example in data.examples] == questions


def test_a_caption_may_be_of_several_pictures(folder: Path) -> None:
    (example,) = read_data(write(folder, "jsonl", [{"images": TWO, "captions": ["One.", "Two."]}])).examples
    assert [image.label for image in example.images] == TWO
    assert example.answers == ("One.", "Two.")


def test_a_file_whose_name_begins_with_a_bracket_is_a_file(folder: Path) -> None:
    (folder / "[1].png").write_bytes(b"x")
    (example,) = read_data(write(folder, "csv", [{"image": "[1].png", "question": "?", "answer": "x"}])).examples
    assert [image.label for image in example.images] == ["[1].png"]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (SEVERAL | {"question": "Is it <image>?"}, ["1 <image> mark and the row 2 pictures", "make the two numbers"]),
        (SEVERAL | {"question": "<image><image><image>?"}, ["3 <image> marks and the row 2 pictures"]),
        (VQA | {"question": "<image> or <image>?"}, ["2 <image> marks and the row 1 picture:"]),
        (SEVERAL | {"image": "a.png"}, ["both 'image' and 'images'", "keep one"]),
        (SEVERAL | {"file_name": "a.png"}, ["both 'file_name' and 'images'"]),
        (SEVERAL | {"image": None}, ["both 'image' and 'images'"]),
        (SEVERAL | {"images": []}, ["'images' is an empty list"]),
        (SEVERAL | {"images": None}, ["'images' is null"]),
        (SEVERAL | {"images": {"a": "b"}}, ["'images' is an object"]),
        (SEVERAL | {"images": ["a.png", 7]}, ["'images' holds a number (7)"]),
        (SEVERAL | {"images": ["a.png", " "]}, ["'images' holds an empty text"]),
        (VQA | {"image": ["a.png", ["b.png"]]}, ["'image' holds a list"]),
        (SEVERAL | {"images": ["a.png", "gone.png"]}, ["'gone.png' is not there"]),
    ],
)
def test_a_bad_row_of_several_pictures_is_named(
    row: dict[str, object], words: list[str], jsonl: Callable[..., Path]
) -> None:
    path = jsonl(SEVERAL, row)
    message = complaint(path)
    assert message.startswith(f"{path} row 2 (line 2): ")
    for word in words:
        assert word in message, message
    assert len(read_data(path, skip_bad_rows=True).examples) == 1


def test_a_broken_list_in_a_cell_is_named(folder: Path) -> None:
    path = folder / "rows.csv"
    path.write_text('images,question,answer\n"[""a.png"", b.png]",Why?,x\n')
    assert "row 1 (line 2): 'images' is not a JSON list" in complaint(path)
    path.write_text('image,images,question,answer\na.png,"[""b.png""]",Why?,x\na.png,,Why?,x\n')
    assert "row 1 (line 2): the row has both 'image' and 'images'" in complaint(path)
    assert len(read_data(path, skip_bad_rows=True).examples) == 1  # an empty cell is no field


def test_a_language_without_a_request_for_captions_is_named(jsonl: Callable[..., Path]) -> None:
    message = complaint(jsonl(CAPTION | {"language": "zh"}, CAPTION | {"language": "fr"}))
    assert "row 2 (line 2): 'language' is 'fr': take one of en, zh" in message
    assert read_data(jsonl(VQA | {"language": "fr"})).examples[0].language == "fr"  # a question brings its own words


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("Two dogs , one of them wet , run . ", "Two dogs, one of them wet, run."),
        ("A boy shouts ' go ! '", "A boy shouts ' go! '"),
        ("A ball costs .5 dollars", "A ball costs .5 dollars"),
        ("A dog runs", "A dog runs"),
    ],
)
def test_punctuation_of_captions_is_closed_up(jsonl: Callable[..., Path], written: str, read: str) -> None:
    (example,) = read_data(jsonl({"image": "a.png", "caption": written})).examples
    assert example.answers == (read,)


def test_answers_stay_as_they_were_written(jsonl: Callable[..., Path]) -> None:
    (example,) = read_data(jsonl({"image": "a.png", "question": "what ?", "answer": "yes ."})).examples
    assert (example.question, example.answers) == ("what ?", ("yes .",))


def test_a_rows_kind_is_kept_and_changes_no_fingerprint(jsonl: Callable[..., Path]) -> None:
    plain = read_data(jsonl(VQA, VQA, VQA))
    kinds = read_data(jsonl(VQA | {"kind": "open"}, VQA | {"kind": 3}, VQA))
    assert [example.kind for example in kinds.examples] == ["open", None, None]
    assert kinds.fingerprint == plain.fingerprint
