"""Rows of every kind, every mistake in them, and what is said about it; the packaged set; the fingerprint."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from data_rows import CAPTION, VQA, complaint
from PIL import Image

import qformer.sources
from adapters.data.reading import read_data, read_rows

# -- what is read ------------------------------------------------------------------------------------------------


def test_vqa_rows(jsonl: Callable[..., Path], folder: Path) -> None:
    ten = ["yes"] * 7 + ["no"] * 3
    data = read_data(
        jsonl(VQA, VQA | {"image": "b.png", "answer": ten, "question_id": 77}, VQA | {"answer": 3, "id": "x"})
    )
    assert (data.name, data.task, data.terms, data.skipped) == ("data.jsonl", "vqa", None, ())
    assert [example.answers for example in data.examples] == [("a cat",), tuple(ten), ("3",)]
    assert [example.id for example in data.examples] == ["1", "77", "x"]
    assert data.examples[1].images[0].path == folder / "b.png"
    assert data.examples[1].images[0].label == "b.png"
    assert data.examples[1].where == f"{folder / 'data.jsonl'} row 2 (line 2)"
    # One reference for a picture, so that its digest is computed once.
    assert data.examples[0].images[0] is data.examples[2].images[0]


def test_caption_rows(jsonl: Callable[..., Path]) -> None:
    chinese = {"image": "b.png", "captions": ["一只猫", "猫"], "language": "zh"}
    data = read_data(jsonl(CAPTION, chinese))
    assert data.task == "caption"
    assert [example.question for example in data.examples] == ["", ""]
    assert [example.answers for example in data.examples] == [("A cat.",), ("一只猫", "猫")]
    assert [example.language for example in data.examples] == ["en", "zh"]


def test_file_name_and_absolute_path_and_data_uri(jsonl: Callable[..., Path], folder: Path) -> None:
    uri = "data:image/png;base64," + base64.b64encode(b"bytes").decode()
    rows = [
        {"file_name": "a.png", "caption": "x"},
        CAPTION | {"image": str(folder / "b.png")},
        CAPTION | {"image": uri},
    ]
    first, second, third = (example.images[0] for example in read_data(jsonl(*rows)).examples)
    assert first.path == folder / "a.png"
    assert second.path == folder / "b.png"
    assert third.read() == b"bytes"


def test_answers_may_be_absent_where_they_are_not_needed(jsonl: Callable[..., Path], folder: Path) -> None:
    data = read_data(jsonl({"image": "a.png", "question": "Why?"}, VQA, VQA | {"answer": ""}), need_answers=False)
    assert data.task == "vqa"
    assert [example.answers for example in data.examples] == [(), ("a cat",), ()]
    data = read_data(jsonl({"image": "a.png"}), need_answers=False)
    assert (data.task, data.examples[0].question, data.examples[0].answers) == ("caption", "", ())
    table = folder / "ask.csv"
    table.write_text("image,question,answer\na.png,Why?,\n")
    assert read_data(table, need_answers=False).examples[0].answers == ()


def test_task_is_told_by_the_fields_or_chosen_among_them(jsonl: Callable[..., Path]) -> None:
    both = VQA | CAPTION
    assert read_data(jsonl(both)).task == "vqa"
    assert read_data(jsonl(both), task="caption").examples[0].answers == ("A cat.",)
    message = complaint(jsonl(VQA), task="caption")
    assert "--task caption" in message and "row 1 (line 1)" in message and "--task vqa" in message
    message = complaint(jsonl(CAPTION), task="vqa")
    assert "--task vqa" in message and "--task caption" in message
    assert "--task 'chat'" in complaint(jsonl(VQA), task="chat")


def test_a_forgotten_question_is_told_where_it_was_forgotten(jsonl: Callable[..., Path]) -> None:
    picture, asked = {"image": "a.png"}, {"image": "b.png", "question": "Why?"}
    path = jsonl(picture, asked)
    message = complaint(path, need_answers=False)
    assert message.startswith(f"{path} row 1 (line 1): field 'question' is missing, which {path} row 2 (line 2) has")
    message = complaint(path, need_answers=False, task="caption")
    assert message.startswith(f"{path} row 2") and f"but {path} row 1 (line 1), a picture alone" in message
    assert len(read_data(path, need_answers=False, task="caption", skip_bad_rows=True).examples) == 1
    assert "row 2 (line 2): field 'question' is missing" in complaint(jsonl(asked, picture), need_answers=False)
    assert "there is 'qestion'" in complaint(jsonl({"image": "a.png", "qestion": "Why?"}), need_answers=False)


def test_limit_takes_the_first_rows(jsonl: Callable[..., Path]) -> None:
    path = jsonl(VQA, "", VQA | {"answer": "b"}, "broken", VQA)
    assert [example.answers for example in read_data(path, limit=2).examples] == [("a cat",), ("b",)]
    assert len(read_data(path, limit=3, skip_bad_rows=True).examples) == 3
    assert "--limit 0" in complaint(path, limit=0)


# -- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ('{"image": "a.png", "question": "Why?" "answer": "x"}', ["broken JSON at column 39", "Why?"]),
        ('{"image": "a.png"', ["broken JSON"]),
        ("[" * 100_000, ["unreadable JSON"]),
        ('{"image": ' + "1" * 5000 + "}", ["unreadable JSON"]),
        ("5", ["the row is a number (5)"]),
        ('["a.png", "Why?"]', ["the row is a list"]),
        ({"question": "Why?", "answer": "x"}, ["'image' is missing", "question, answer"]),
        ({"image": "a.png", "question": "Why?"}, ["'answer' is missing"]),
        ({"image": "a.png", "answer": "x"}, ["'question' is missing"]),
        ({"Image": "a.png", "text": "x"}, ["'question' or 'caption' is missing", "Image, text"]),
        ({}, ["is missing", "nothing"]),
        (VQA | {"question": 5}, ["'question' is a number (5)"]),
        (VQA | {"question": "  "}, ["'question' is empty"]),
        (VQA | {"question": None}, ["'question' is null"]),
        (VQA | {"answer": None}, ["'answer' holds null"]),
        (VQA | {"answer": ""}, ["'answer' is empty"]),
        (VQA | {"answer": []}, ["'answer' is an empty list"]),
        (VQA | {"answer": ["yes", {"no": 1}]}, ["'answer' holds an object"]),
        (VQA | {"answer": True}, ["'answer' holds true or false"]),
        (VQA | {"image": 7}, ["'image' is a number (7)"]),
        (VQA | {"image": ""}, ["'image' is empty"]),
        (VQA | {"image": "gone.png"}, ["'gone.png' is not there"]),
        (VQA | {"image": "a.png/b.png"}, ["'a.png/b.png' is not there"]),
        (VQA | {"image": "."}, ["'.' is not a file"]),
        (VQA | {"image": "https://example.org/a.png"}, ["download it first"]),
        (VQA | {"image": "nul\0l.png"}, ["not a usable path"]),
        (VQA | {"image": "iVBORw0KGgo" * 1000}, ["not a usable path", "data:image/png;base64,"]),
        (VQA | {"image": "data:image/png;base64,#"}, ["broken base64"]),
        (VQA | {"id": ["x"]}, ["'id' holds a list"]),
        (VQA | {"language": 1}, ["'language' is a number"]),
        (CAPTION, ["a caption row among vqa rows"]),
        ({"messages": [], "images": ["a.png"]}, ["'messages' is empty: write a list of turns"]),
    ],
)
def test_a_bad_row_is_named_counted_and_can_be_skipped(
    row: object, words: list[str], jsonl: Callable[..., Path]
) -> None:
    path = jsonl(VQA, "", row, VQA)
    message = complaint(path)
    assert message.startswith(f"{path} row 2 (line 3): ")
    assert message.endswith(
        "1 of 3 rows are bad (--skip-bad-rows leaves them out; in training, --set data.skip_bad_rows=true)"
    )
    assert len(message) < len(str(path)) * 2 + 400
    for word in words:
        assert word in message, message
    data = read_data(path, skip_bad_rows=True)
    assert len(data.examples) == 2
    assert len(data.skipped) == 1 and data.skipped[0].startswith(f"{path} row 2 (line 3): ")
    assert data.examples[1].id == "3"  # the number in the file, not among the good


def test_missing_pictures_are_counted_and_the_first_three_named(jsonl: Callable[..., Path]) -> None:
    rows = [VQA | {"image": f"gone{number}.png"} for number in (0, 0, 1, 2, 3)]
    message = complaint(jsonl(VQA, *rows))
    assert "row 2 (line 2): image 'gone0.png' is not there" in message
    assert "5 rows name pictures that are not there: gone0.png, gone1.png, gone2.png, …" in message
    assert "gone3.png" not in message
    assert "5 of 6 rows are bad" in message


def test_all_rows_bad_is_an_error_even_when_skipping(jsonl: Callable[..., Path]) -> None:
    message = complaint(jsonl("x", "y"), skip_bad_rows=True)
    assert "2 of 2 rows are bad" in message and "none are left" in message


def test_good_and_bad_rows_bear_their_number_in_the_file(jsonl: Callable[..., Path]) -> None:
    path = jsonl("broken", "", VQA, VQA | {"image": "gone.png"}, VQA | {"answer": 7}, "[]")
    data = read_data(path, skip_bad_rows=True)
    assert [example.row for example in data.examples] == [2, 4]
    assert [fault.row for fault in data.faults] == [1, 3, 5]
    assert [fault.where for fault in data.faults] == [
        f"{path} row {row} (line {line})" for row, line in ((1, 1), (3, 4), (5, 6))
    ]
    assert [fault.missing for fault in data.faults] == [None, "gone.png", None]
    assert data.skipped == tuple(f"{fault.where}: {fault.message}" for fault in data.faults)
    assert "broken JSON" in data.skipped[0] and "is not there" in data.skipped[1] and "a list" in data.skipped[2]


def test_rows_are_handed_over_where_none_is_good(jsonl: Callable[..., Path]) -> None:
    found = read_rows(jsonl("x", VQA | {"image": "gone.png"}))
    assert (found.examples, [fault.row for fault in found.faults], found.rows) == ((), [1, 2], 2)


# -- the packaged set --------------------------------------------------------------------------------------------


@pytest.fixture
def easy_vqa(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for part in ("train", "test"):
        (tmp_path / part / "images").mkdir(parents=True)
        for number in range(2):
            (tmp_path / part / "images" / f"{number}.png").write_bytes(b"x")
        rows = [["what shape is it?", "circle", 0], ["is it red?", "no", 1], ["is it blue?", "yes", 1]]
        (tmp_path / part / "questions.json").write_text(json.dumps(rows))

    def resolve(name: str, **_: object) -> Path:
        assert name == "easy-vqa"
        return tmp_path

    monkeypatch.setattr(qformer.sources, "resolve_wheel_data", resolve)
    return tmp_path


def test_easy_vqa_by_name(easy_vqa: Path) -> None:
    data = read_data("easy-vqa:train")
    assert (data.name, data.task) == ("easy-vqa:train", "vqa")
    assert data.terms is not None and data.terms.startswith("MIT")
    assert [example.answers for example in data.examples] == [("circle",), ("no",), ("yes",)]
    assert data.examples[2].images[0].path == easy_vqa / "train" / "images" / "1.png"
    assert data.examples[2].where == "easy-vqa:train row 3"
    assert len(read_data("easy-vqa:test", limit=1).examples) == 1
    assert "--task caption" in complaint("easy-vqa:train", task="caption")


def test_easy_vqa_damaged(easy_vqa: Path) -> None:
    (easy_vqa / "train" / "questions.json").write_text("[[1]]")
    assert "damaged" in complaint("easy-vqa:train")
    (easy_vqa / "test" / "images" / "1.png").unlink()
    assert "easy-vqa:test row 2: image 'test/images/1.png' is not there" in complaint("easy-vqa:test")


@pytest.mark.parametrize("typo", ["easy-vqa:trian", "easy-vqa", "easyvqa:train"])
def test_a_typo_in_the_packaged_name(typo: str) -> None:
    message = complaint(typo)
    assert typo in message and "did you mean" in message and "easy-vqa:train" in message


# -- the fingerprint and speed -------------------------------------------------------------------------------------


def test_fingerprint_follows_the_content(jsonl: Callable[..., Path], folder: Path) -> None:
    first = read_data(jsonl(VQA, VQA)).fingerprint
    assert first.startswith("sha256:") and len(first) == 7 + 64
    assert read_data(jsonl(VQA, "", VQA)).fingerprint == first
    others = {
        read_data(jsonl(*rows)).fingerprint
        for rows in (
            [VQA],
            [VQA, VQA | {"answer": "x"}],
            [VQA, VQA | {"question": "x"}],
            [VQA, VQA | {"image": "b.png"}],
            [VQA, VQA | {"id": "x"}],
            [VQA, VQA | {"language": "zh"}],
        )
    }
    (folder / "a.png").write_bytes(b"another size")
    others.add(read_data(jsonl(VQA, VQA)).fingerprint)
    assert first not in others and len(others) == 7


def test_forty_thousand_rows_are_read_quickly(folder: Path) -> None:
    """At most thirty times what the JSON alone takes, in turn and the better of two: a busy machine slows both."""
    (folder / "images").mkdir()
    for number in range(400):
        (folder / "images" / f"{number}.png").touch()
    path = folder / "many.jsonl"
    with path.open("w") as file:
        for number in range(40_000):
            row = {"image": f"images/{number % 400}.png", "question": f"Is it {number}?", "answer": "yes"}
            file.write(json.dumps(row) + "\n")
    ours, plain = [], []
    for _ in range(2):
        start = time.process_time()
        with path.open() as file:
            assert sum(1 for line in file if json.loads(line)) == 40_000
        plain.append(time.process_time() - start)
        start = time.process_time()
        assert len(read_data(path).examples) == 40_000
        ours.append(time.process_time() - start)
    print(f"{min(ours):.2f} s, JSON alone {min(plain):.2f} s")
    assert min(ours) < 30 * min(plain)


def test_a_picture_that_cannot_be_decoded_makes_a_bad_row_where_that_is_asked(jsonl: Callable[..., Path]) -> None:
    path = jsonl(VQA, VQA | {"image": "b.png"}, VQA)
    Image.new("RGB", (9, 9)).save(path.parent / "a.png")
    whole = (path.parent / "a.png").read_bytes()
    (path.parent / "b.png").write_bytes(whole[: len(whole) // 2])
    assert len(read_data(path, skip_bad_rows=True).examples) == 3  # they are looked for, not opened
    assert len(read_data(path, broken_pictures_too=True).examples) == 3  # what opens it later says what is wrong
    data = read_data(path, skip_bad_rows=True, broken_pictures_too=True)
    assert [example.row for example in data.examples] == [1, 3]
    assert [fault.row for fault in data.faults] == [2] and "b.png" in str(data.faults[0])
