"""Compressed text, tables of every kind and Excel's files, made by the libraries that people make them with."""

from __future__ import annotations

import datetime
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import openpyxl
import pandas
import pytest
import zstandard
from data_rows import VQA, complaint

from adapters.data.reading import read_data, read_rows
from adapters.data.sources import open_source

ROWS = [VQA, VQA | {"image": "b.png", "question": "Wie heißt es; und, warum?", "answer": "Käse"}]


def told(path: Path | str) -> list[tuple[str, str, str]]:
    return [(row.images[0].label, row.question, row.answer) for row in read_data(path).examples]


EXPECTED = [(row["image"], row["question"], row["answer"]) for row in ROWS]


@pytest.mark.parametrize("compression", ["gzip", "zstd", None])
@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.json"])
def test_json_by_pandas(name: str, compression: str | None, folder: Path) -> None:
    path = folder / (name + {"gzip": ".gz", "zstd": ".zst", None: ""}[compression])
    frame = pandas.DataFrame(ROWS)
    frame.to_json(path, orient="records", lines=name != "rows.json", compression=compression)
    assert told(path) == EXPECTED
    swapped = path.with_name("swapped" + path.name.removeprefix("rows"))  # told by what they hold, not by the ending
    frame.to_json(swapped, orient="records", lines=name == "rows.json", compression=compression)
    assert told(swapped) == EXPECTED


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_several_compressed_parts_are_one_file_and_a_cut_one_is_an_error(suffix: str, folder: Path) -> None:
    pack = gzip.compress if suffix == "gz" else zstandard.ZstdCompressor().compress
    lines = [json.dumps(row).encode() + b"\n" for row in ROWS * 500]
    path = folder / f"rows.jsonl.{suffix}"
    path.write_bytes(pack(b"".join(lines[:500])) + pack(b"".join(lines[500:])))
    assert told(path) == EXPECTED * 500
    assert read_rows(path).examples[999].where == f"{path} row 1000 (line 1000)"
    path.write_bytes(path.read_bytes()[:-9])
    assert "cannot be unpacked" in complaint(path)


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.csv.gz"])
@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_tables_by_pandas(name: str, separator: str, encoding: str, folder: Path) -> None:
    pandas.DataFrame(ROWS).to_csv(folder / name, sep=separator, encoding=encoding, index=False)
    assert told(folder / name) == EXPECTED


def test_the_separator_is_told_by_the_header(folder: Path) -> None:
    path = folder / "t.csv"
    path.write_text("image;question;answer\na.png;what, exactly, is it?;1,5\n")
    assert told(path) == [("a.png", "what, exactly, is it?", "1,5")]
    path.write_text("sep=;\nimage;question;answer\na.png;why;x\n")
    (row,) = read_data(path).examples
    assert (row.answer, row.where) == ("x", f"{path} row 1 (line 3)")
    path.write_text('"image","a;b","question","answer"\na.png,,why;not,x\n')
    assert told(path) == [("a.png", "why;not", "x")]


def test_broken_utf16(folder: Path) -> None:
    path = folder / "t.csv"
    path.write_bytes("image,question,answer\na.png,x,y\n".encode("utf-16")[:-1])
    assert "not UTF-16" in complaint(path)


def test_excel(folder: Path) -> None:
    path = folder / "t.xlsx"
    frame = pandas.DataFrame([*ROWS, VQA | {"answer": 3}, VQA | {"answer": None}])
    frame["choices"] = ['["a cat", "3"]', None, None, None]
    frame.to_excel(path, index=False, engine="openpyxl")
    assert "row 4 (line 5): field 'answer' is missing" in complaint(path)
    found = read_data(path, skip_bad_rows=True)
    assert [row.answer for row in found.examples] == ["a cat", "Käse", "3"]
    assert found.examples[0].choices == ("a cat", "3")


def test_numbers_are_read_as_people_see_them(folder: Path) -> None:
    """One missing cell makes a column of whole numbers one of floats, in pandas."""
    frame = pandas.DataFrame({"image": ["a.png"] * 3, "question": ["how many?"] * 3, "answer": [3, 2.5, None]})
    for path, write in ((folder / "t.xlsx", frame.to_excel), (folder / "t.parquet", frame.to_parquet)):
        write(path, index=False)
        found = read_rows(path)
        assert [row.answer for row in found.examples] == ["3", "2.5"]
        assert [fault.row for fault in found.faults] == [3]


def test_what_is_wrong_with_a_sheet(folder: Path) -> None:
    path = folder / "t.xlsx"
    book = openpyxl.Workbook()
    sheet = book.active
    assert sheet is not None
    book.save(path)
    assert "no rows" in complaint(path)
    sheet.append([])
    sheet.append(["image", "question", "answer"])
    sheet.append(["a.png", "why?", "x", "beyond"])
    sheet.append(["a.png", "why?", "#REF!"])
    sheet["C4"].data_type = "e"
    sheet.append(["a.png", "when?", datetime.date(2020, 1, 1)])
    sheet.append([None, None])
    sheet.append([" a.png", "why?", " x "])
    book.save(path)
    found = read_rows(path)
    assert [fault.message.split(":")[0] for fault in found.faults] == [
        "cell D3 has no name above it",
        "cell C4 holds the error #REF!",
        "'answer' holds a date or time (datetime.datetime(2020, 1, 1, 0, 0))",
    ]
    assert [(row.answer, row.where) for row in found.examples] == [("x", f"{path} row 4 (line 7)")]
    book.create_sheet("notes")["B2"] = "something"
    book.save(path)
    assert "several sheets hold something (Sheet, notes)" in complaint(path)


def test_a_pattern_is_several_files_as_one(folder: Path, jsonl: Callable[..., Path]) -> None:
    for number in (2, 1):
        pandas.DataFrame([VQA | {"answer": str(number)}]).to_json(
            folder / f"part-{number}.jsonl", orient="records", lines=True
        )
    data = read_data(folder / "part-*.jsonl")
    assert [(row.answer, row.row) for row in data.examples] == [("1", 1), ("2", 2)]
    assert data.examples[1].where == f"{folder / 'part-2.jsonl'} row 1 (line 1)"
    assert "no file has such a name" in complaint(folder / "gone-*.jsonl")


def test_a_missing_cell_does_not_make_a_fraction_of_whole_numbers(folder: Path) -> None:
    frame = pandas.DataFrame(
        {"image": ["a.png", "b.png", "a.png"], "question": ["how many?"] * 3, "answer": [4, 12, None],
         "id": [1, None, 3],
         "price": [2.0, 3.0, 4.0], "depth": [1.0, 2.5, None]}
    )  # fmt: skip
    frame.to_csv(folder / "rows.csv", index=False)
    frame.to_csv(folder / "rows.tsv", index=False, sep="\t")
    frame.to_parquet(folder / "rows.parquet")
    for name in ("rows.csv", "rows.tsv", "rows.parquet"):
        examples = read_rows(folder / name, need_answers=False).examples
        assert [row.answers for row in examples] == [("4",), ("12",), ()], name
        assert [row.id for row in examples] == ["1", "2", "3"]
    rows = list(open_source(folder / "rows.csv").rows)
    assert [row.fields["price"] for row in rows] == ["2.0", "3.0", "4.0"]  # no cell is missing: they are prices
    assert [row.fields.get("depth") for row in rows] == ["1.0", "2.5", None]
