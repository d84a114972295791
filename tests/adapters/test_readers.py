"""Rows of every format, every mistake in them, and what is said about it."""

from __future__ import annotations

import base64
import csv
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import qformer.sources
from adapters.data.examples import DataSet, Example, split_by_image
from adapters.data.readers import read_data
from qformer.errors import UserError

VQA = {"image": "a.png", "question": "What is it?", "answer": "a cat"}
CAPTION = {"image": "a.png", "caption": "A cat."}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four files with names of pictures: the reader looks for them and does not open them."""
    for name in ("a.png", "b.png", "c.png", "d.png"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


@pytest.fixture
def jsonl(folder: Path) -> Callable[..., Path]:
    def write(*rows: object) -> Path:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = folder / "data.jsonl"
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


def complaint(path: Path | str, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        read_data(path, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


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
    assert third.data == b"bytes"


def test_json_list(folder: Path) -> None:
    path = folder / "data.JSON"
    path.write_text(json.dumps([VQA, VQA | {"question": "Why?"}], indent=2))
    data = read_data(path)
    assert [example.question for example in data.examples] == ["What is it?", "Why?"]
    assert data.examples[1].where == f"{path} row 2 (line 7)"


def test_csv(folder: Path) -> None:
    path = folder / "data.csv"
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "question", "answer", "note"])
        writer.writerow(["a.png", 'What, "exactly",\nis it?', "3", ""])
        writer.writerow(["b.png", "Why?", "[odd, but text]", "n"])
    data = read_data(path)
    assert data.task == "vqa"
    assert data.examples[0].question == 'What, "exactly",\nis it?'
    assert [example.answers for example in data.examples] == [("3",), ("[odd, but text]",)]
    assert data.examples[1].where == f"{path} row 2 (line 4)"  # the first row takes two lines


def test_csv_lists_and_large_cells(folder: Path) -> None:
    path = folder / "data.csv"
    limit = csv.field_size_limit()
    uri = "data:image/png;base64," + base64.b64encode(b"x" * 200_000).decode()
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "captions"])
        writer.writerow([uri, '["one", "two"]'])
        writer.writerow(["a.png", "three"])
    data = read_data(path)
    assert [example.answers for example in data.examples] == [("one", "two"), ("three",)]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize("name", ["data.jsonl", "data.json", "data.csv"])
def test_byte_order_mark_windows_line_ends_and_blank_lines(name: str, folder: Path) -> None:
    text = {
        "data.jsonl": f"\r\n{json.dumps(VQA)}\r\n\r\n  \r\n{json.dumps(VQA | {'answer': 'ü'})}\r\n\r\n",
        "data.json": f"\r\n[\r\n{json.dumps(VQA)},\r\n\r\n\r\n{json.dumps(VQA | {'answer': 'ü'})}]\r\n",
        "data.csv": "\r\nimage,question,answer\r\n\r\n\r\na.png,What is it?,a cat\r\n,,\r\na.png,What is it?,ü\r\n",
    }[name]
    path = folder / name
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    data = read_data(path)
    assert [example.answers for example in data.examples] == [("a cat",), ("ü",)]
    line = {"data.jsonl": 5, "data.json": 6, "data.csv": 7}[name]
    assert data.examples[1].where == f"{path} row 2 (line {line})"


def test_line_separators_inside_text_do_not_break_a_line(jsonl: Callable[..., Path]) -> None:
    row = json.dumps(VQA | {"question": "one\u2028two\x85three"}, ensure_ascii=False)
    assert read_data(jsonl(row)).examples[0].question == "one\u2028two\x85three"


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
        ({"messages": [], "images": ["a.png"]}, ["a conversation ('messages') is not read yet"]),
    ],
)
def test_a_bad_row_is_named_counted_and_can_be_skipped(
    row: object, words: list[str], jsonl: Callable[..., Path]
) -> None:
    path = jsonl(VQA, "", row, VQA)
    message = complaint(path)
    assert message.startswith(f"{path} row 2 (line 3): ")
    assert message.endswith("1 of 3 rows are bad (--skip-bad-rows leaves them out)")
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


def test_rationales_are_read_as_plain_vqa_only_when_asked(jsonl: Callable[..., Path]) -> None:
    path = jsonl(VQA | {"rationale": "It purrs."})
    assert "--task vqa" in complaint(path)
    assert read_data(path, task="vqa").examples[0].answers == ("a cat",)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.jsonl", b"", ["empty (0 bytes)"]),
        ("data.jsonl", b"\n \r\n", ["no rows"]),
        ("data.json", b"[]", ["no rows"]),
        ("data.json", b" ", ["no rows"]),
        ("data.csv", b"image,question,answer\n", ["no rows"]),
        ("data.jsonl", b'{"image": "a.png"}\n{"image": "\xe4.png"}\n', ["line 2: not UTF-8", "0xe4"]),
        ("data.csv", "image,question\n".encode("utf-16"), ["line 1: not UTF-8"]),
        ("data.jsonl", b"\x89PNG\r\n\x1a\n", ["line 1: not UTF-8"]),
        ("data.jsonl", b'[{"image": "a.png"}]', ["JSON list", ".json"]),
        ("data.json", b'{"image": "a.png"}\n{"image": "b.png"}', ["list of rows", ".jsonl"]),
        ("data.json", b'[{"image": "a.png"},\n{"image": }]', ["row 2 (line 2): broken JSON in line 2"]),
        ("data.json", b'[{"image": "a.png"}\n{"image": "b.png"}]', ["after row 1", "comma"]),
        ("data.json", b'[{"image": "a.png"}', ["breaks off after row 1"]),
        ("data.json", b'[{"image": "a.png"},', ["breaks off after row 1"]),
        ("data.json", b'[{"image": "a.png"}] x', ["goes on after its list"]),
        ("data.json", b"[" * 100_000, ["row 1 (line 1): unreadable JSON"]),
        ("data.csv", b"image;question;answer\na.png;x;y\n", ["commas"]),
        ("data.csv", b"image,question,image\na.png,x,y\n", ["image twice"]),
        ("data.csv", b"image,question,answer\na.png,Why, oh?,x\n", ["row 1 (line 2): 4 cells under a header of 3"]),
        ("data.csv", b'image,captions\na.png,"[""x"""\n', ["'captions' is not a JSON list"]),
        ("data.parquet", b"PAR1", ["'.parquet' data files are not read", ".jsonl"]),
        ("data", b"{}", ["'' data files are not read"]),
    ],
)
def test_a_bad_file_is_named(name: str, content: bytes, words: list[str], folder: Path) -> None:
    path = folder / name
    path.write_bytes(content)
    message = complaint(path)
    assert str(path) in message
    for word in words:
        assert word in message, message


def test_a_missing_file_and_a_folder(folder: Path, jsonl: Callable[..., Path]) -> None:
    path = jsonl(VQA)
    assert f"did you mean {path}?" in complaint(folder / "dta.jsonl")
    assert "is not there" in complaint(folder / "nowhere" / "x.jsonl")
    assert "not a usable path" in complaint(json.dumps([VQA] * 100))
    message = complaint(folder)
    assert "is a folder" in message and str(path) in message


def test_an_unreadable_file(jsonl: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = jsonl(VQA)
    monkeypatch.setattr(Path, "open", refuse)  # as root, a file's rights refuse nothing
    assert "cannot be read (Permission denied)" in complaint(path)


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


# -- fingerprint and split ---------------------------------------------------------------------------------------


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
    (folder / "images").mkdir()
    for number in range(400):
        (folder / "images" / f"{number}.png").touch()
    path = folder / "many.jsonl"
    with path.open("w") as file:
        for number in range(40_000):
            row = {"image": f"images/{number % 400}.png", "question": f"Is it {number}?", "answer": "yes"}
            file.write(json.dumps(row) + "\n")
    start = time.process_time()
    assert len(read_data(path).examples) == 40_000
    assert time.process_time() - start < 2


def rows_of(data: DataSet) -> set[str]:
    return {example.id for example in data.examples}


def images_of(data: DataSet) -> set[str]:
    return {image.digest() for example in data.examples for image in example.images}


def test_split_holds_out_whole_pictures(jsonl: Callable[..., Path], folder: Path) -> None:
    (folder / "twin.png").write_bytes((folder / "b.png").read_bytes())  # the same picture under another name
    names = ["a.png", "b.png", "c.png", "d.png", "twin.png"]
    rows = [{"image": name, "question": f"{turn}?", "answer": "x"} for turn in range(3) for name in names]
    data = read_data(jsonl(*rows))
    seen = set()
    for seed in range(20):
        train, val = split_by_image(data, 0.25, seed)
        assert rows_of(train) | rows_of(val) == rows_of(data) and not rows_of(train) & rows_of(val)
        assert len(images_of(val)) == 1 and len(images_of(train)) == 3
        assert not images_of(train) & images_of(val)
        assert train.fingerprint != val.fingerprint != data.fingerprint
        assert split_by_image(data, 0.25, seed)[1] == val
        seen |= images_of(val)
    assert len(seen) == 4  # the seed matters
    shuffled = read_data(jsonl(*rows[::-1]))
    assert images_of(split_by_image(shuffled, 0.25, 3)[1]) == images_of(split_by_image(data, 0.25, 3)[1])


def test_split_keeps_joined_pictures_together(jsonl: Callable[..., Path]) -> None:
    data = read_data(jsonl(*(VQA | {"image": name} for name in ("a.png", "b.png", "c.png", "d.png"))))
    a, b, c, d = (example.images[0] for example in data.examples)
    pairs = [Example((x, y), "?", ("x",), "", "1") for x, y in ((a, b), (b, c), (d, d))]
    joined = DataSet("pairs", "vqa", tuple(pairs), "sha256:x")
    for seed in range(6):
        train, val = split_by_image(joined, 0.5, seed)
        assert not images_of(train) & images_of(val)


@pytest.mark.parametrize("fraction", [0.0, 1.0, -1, 5])
def test_split_refuses_a_bad_fraction(fraction: float, jsonl: Callable[..., Path]) -> None:
    data = read_data(jsonl(VQA, VQA | {"image": "b.png"}))
    with pytest.raises(UserError, match="between 0 and 1"):
        split_by_image(data, fraction, 0)


def test_split_needs_two_pictures(jsonl: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match="at least 2"):
        split_by_image(read_data(jsonl(VQA, VQA)), 0.1, 0)
    train, val = split_by_image(read_data(jsonl(VQA, VQA | {"image": "b.png"})), 0.001, 0)
    assert len(train.examples) == len(val.examples) == 1
