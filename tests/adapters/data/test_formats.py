"""Files of every format: what is read from them, where each row stands, and what is wrong with a whole file."""

from __future__ import annotations

import base64
import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from data_rows import VQA, complaint

from adapters.data.reading import read_data


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


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("data.jsonl", b"", ["empty (0 bytes)"]),
        ("data.jsonl", b"\n \r\n", ["no rows"]),
        ("data.json", b"[]", ["no rows"]),
        ("data.json", b" ", ["no rows"]),
        ("data.csv", b"image,question,answer\n", ["no rows"]),
        ("data.jsonl", b'{"image": "a.png"}\n{"image": "\xe4.png"}\n', ["line 2: not UTF-8", "0xe4"]),
        ("data.csv", "image,question,answer\n".encode("utf-16"), ["no rows"]),
        ("data.jsonl", b"\x89PNG\r\n\x1a\n", ["line 1: not UTF-8"]),
        ("data.jsonl", b'[{"image": "a.png"}', ["breaks off after row 1"]),
        ("data.json", b'{"image": "a.png"}\n{"image": "b.png"}', ["row 1 (line 1): field 'question' or 'caption'"]),
        ("data.json", b'{"rows": [\n', ["does not hold a list of rows"]),
        ("data.json", b'"text"', ["but text"]),
        ("data.json", b'[{"image": "a.png"},\n{"image": }]', ["row 2 (line 2): broken JSON in line 2"]),
        ("data.json", b'[{"image": "a.png"}\n{"image": "b.png"}]', ["after row 1", "comma"]),
        ("data.json", b'[{"image": "a.png"}', ["breaks off after row 1"]),
        ("data.json", b'[{"image": "a.png"},', ["breaks off after row 1"]),
        ("data.json", b'[{"image": "a.png"}] x', ["goes on after its list"]),
        ("data.json", b"[" * 100_000, ["row 1 (line 1): unreadable JSON"]),
        ("data.csv", b"image;question;answer\na.png;x;y;z\n", ["4 cells under a header of 3", "semicolons"]),
        ("data.csv", b"image,question,image\na.png,x,y\n", ["image twice"]),
        ("data.csv", b"image,question,answer\na.png,Why, oh?,x\n", ["row 1 (line 2): 4 cells under a header of 3"]),
        ("data.csv", b'image,captions\na.png,"[""x"""\n', ["'captions' is not a JSON list"]),
        ("data.parquet", b"PAR1", ["cannot be read as Parquet"]),
        ("data.arrow", b"ARROW1 and no more", ["cannot be read as Arrow"]),
        ("data.arrow", b"", ["empty (0 bytes)"]),
        ("data.xlsx", b"image,question,answer\n", ["cannot be read as an Excel file"]),
        ("data.tar", b"x" * 2000, ["cannot be read as a tar archive"]),
        ("data.jsonl.gz", b"{}", ["cannot be unpacked", "its ending is wrong"]),
        ("data.jsonl.zst", b"{}", ["cannot be unpacked", "its ending is wrong"]),
        ("data.parquet.gz", b"PAR1", ["'.gz' data files are not read"]),
        ("data.xls", b"x", ["'.xls' data files are not read", "save it as .xlsx"]),
        ("data.xml", b"<annotation/>", ["no task learns boxes"]),
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
