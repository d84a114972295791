"""`querybridge data`: what it prints for people and for programs, and its exit codes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Call
from data_rows import write_jsonl
from PIL import Image

from adapters.data import lettering


@pytest.fixture
def bad_file(tmp_path: Path) -> Path:
    """One good row and 25 bad ones."""
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "text.png").write_text("text")
    rows: list[object] = [{"image": "a.png", "question": "what?", "answer": "x"}, "broken"]
    rows += [{"image": "text.png", "question": f"{number}?", "answer": "x"} for number in range(24)]
    return write_jsonl(tmp_path / "bad.jsonl", rows)


def test_a_good_file_passes(call: Call, data_file: Path) -> None:
    shown = call("data", "check", data_file)
    assert shown.code == 0
    assert shown.err.endswith("opened 12/12\n")
    assert {line[:20].rstrip(): line[20:] for line in shown.out.splitlines()} == {
        "task": "vqa",
        "rows": "24",
        "pictures": "12, 12 distinct",
        "answers": "24",
        "languages": "en (24)",
        "longest question": "18 characters (row 1)",
        "distinct answers": "5: no (6), yes (6), blue (4), green (4), red (4)",
        "longest answer": "5 characters (row 3)",
        "question alone": "20.8% commonest answer, 25.0% by question, 25.0% by its words",
        "bad rows": "0",
    }
    quiet = call("data", "check", data_file, "--json", "--quiet")
    assert quiet.err == ""
    assert quiet.values == {
        "name": "data.jsonl",
        "task": "vqa",
        "rows": 24,
        "pictures": 12,
        "distinct_pictures": 12,
        "answers": 24,
        "languages": {"en": 24},
        "longest_question": len("what colour is it?"),
        "longest_question_row": 1,
        "bad": 0,
        "bad_rows": [],
        "unread": {},
        "distinct_answers": 5,
        "commonest_answers": [["no", 6], ["yes", 6], ["blue", 4], ["green", 4], ["red", 4]],
        "scripts": {"LATIN": 24},
        "longest_answer": 5,
        "longest_answer_row": 3,
        "repeated": 0,
        "repeated_rows": [],
        "contradicting": 0,
        "contradicting_rows": [],
        "same_pictures": [],
        "question_alone": {"rows": 24, "commonest_answer": 5 / 24, "by_question": 0.25, "bag_of_words": 0.25},
        "notes": [],
    }


def test_bad_rows_give_code_2_and_are_listed(call: Call, bad_file: Path) -> None:
    shown = call("data", "check", bad_file, "--quiet")
    assert (shown.code, shown.err) == (2, "")
    listed = [line for line in shown.out.splitlines() if line.startswith("  ")]
    assert len(listed) == 21
    assert listed[0].startswith(f"  {bad_file} row 2 (line 2): broken JSON")
    assert listed[19].startswith(f"  {bad_file} row 21 (line 21): image 'text.png' is not a picture")
    assert listed[20] == "  … and 5 more; --json lists all"

    found = call("data", "check", bad_file, "--quiet", "--json")
    assert (found.code, found.err) == (2, "")
    values = json.loads(found.out)
    assert values["bad"] == 25
    assert [bad["row"] for bad in values["bad_rows"]] == list(range(2, 27))
    assert all(bad["error"] and bad["where"].endswith(f"(line {bad['row']})") for bad in values["bad_rows"])


def test_a_file_that_cannot_be_read_is_told(call: Call, tmp_path: Path) -> None:
    assert "is not there" in call("data", "check", tmp_path / "gone.jsonl").mistake()
    assert "is not there" in call("data", "preview", tmp_path / "gone.jsonl").mistake()


def test_questions_without_answers_can_be_checked(call: Call, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = write_jsonl(tmp_path / "ask.jsonl", [{"image": "a.png", "question": "what?"}])
    assert call("data", "check", path).code == 2
    assert call("data", "check", path, "--no-answers", "--json").values["bad"] == 0


def test_pictures_of_both_files_are_listed(call: Call, data_file: Path, tmp_path: Path) -> None:
    with Image.open(data_file.parent / "3.png") as picture:
        picture.save(tmp_path / "again.bmp")
    rows = [{"image": "again.bmp", "question": "what?", "answer": "x"}]
    val = write_jsonl(tmp_path / "val.jsonl", rows)
    found = call("data", "check", data_file, "--val", val, "--json", "--quiet").values
    alone = call("data", "check", data_file, "--json", "--quiet").values
    assert {name: found[name] for name in alone} == alone
    assert found["val"] == call("data", "check", val, "--json", "--quiet").values
    assert found["in_both"] == 1
    assert found["copies"] == [{"train": "3.png", "test": "again.bmp", "how": "pixels"}]

    shown = call("data", "check", data_file, "--val", val, "--quiet")
    assert (shown.code, shown.err) == (0, "")
    first, second, both = shown.out.split("\n\n")
    assert first.startswith("task ") and second.startswith(f"{val}\ntask ")
    assert both == "pictures in both    1\n  again.bmp is 3.png (the same pixels)\n"
    assert call("data", "check", data_file, "--val", tmp_path / "gone.jsonl").code == 2


def test_a_bad_row_of_the_second_file_gives_code_2(call: Call, data_file: Path, bad_file: Path) -> None:
    assert call("data", "check", data_file, "--val", bad_file, "--quiet").code == 2


def test_many_copies_are_cut_short(call: Call, tmp_path: Path) -> None:
    rows = []
    for number in range(22):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "what?", "answer": "x"})
    file = write_jsonl(tmp_path / "rows.jsonl", rows)
    lines = call("data", "check", file, "--val", file, "--quiet").out.splitlines()
    assert lines[-22:-19] == ["pictures in both    22", *(f"  {n}.png is {n}.png (the same bytes)" for n in range(2))]
    assert lines[-1] == "  … and 2 more; --json lists all"


def test_preview_leaves_a_sheet_here(
    call: Call, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shown = call("data", "preview", data_file)
    assert (shown.code, shown.out, shown.err) == (0, "preview.png: 12 rows\n", "")
    with Image.open("preview.png") as sheet:
        assert sheet.format == "PNG"
    drawn = call("data", "preview", data_file, "--rows", 3, "--sample", 5, "--out", "other.png", "--json").values
    assert drawn["out"] == "other.png" and len(drawn["rows"]) == 3
    assert drawn == {"out": "other.png", "rows": drawn["rows"], "bad_rows": 0, "bad_pictures": 0, "escaped": False}


def test_preview_says_what_is_not_as_it_is_in_the_file(
    call: Call, bad_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lettering, "CJK_FONTS", ())
    shown = call("data", "preview", bad_file, "--rows", 2, "--out", tmp_path / "sheet.png")
    assert shown.err == f"2 bad rows: querybridge data check {bad_file} lists them\n"
    chinese = write_jsonl(tmp_path / "zh.jsonl", [{"image": "a.png", "caption": "一只猫", "language": "zh"}])
    shown = call("data", "preview", chinese, "--out", tmp_path / "sheet.png")
    assert shown.code == 0
    assert (
        shown.err.count("\n") == 1 and "written as escapes such as \\u4e2d, because no font here has them" in shown.err
    )


def test_columns_have_other_names(call: Call, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    path = write_jsonl(tmp_path / "rows.jsonl", [{"photo": "a.png", "prompt": "what?", "answer": "x", "by": "me"}])
    columns = ("--columns", "image=photo,question=prompt")
    shown = call("data", "check", path, *columns)
    assert shown.code == 0
    assert shown.out.splitlines()[-1] == "note: fields that nothing reads: 'by'; --columns gives a field another name"
    assert call("data", "preview", path, *columns, "--out", tmp_path / "sheet.png").code == 0
    assert "no field is called 'imge'" in call("data", "check", path, "--columns", "imge=photo").mistake()
    assert "'image' is missing" in call("data", "check", path, "--columns", "question=prompt").out


def test_a_page_to_look_at(call: Call, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shown = call("data", "preview", data_file, "--html", "page.html", "--rows", 3)
    assert (shown.code, shown.out) == (0, "page.html: 3 rows\n")
    assert not Path("preview.png").exists() and "data:image/jpeg" in Path("page.html").read_text()
    both = call("data", "preview", data_file, "--html", "page.html", "--out", "sheet.png", "--json").values
    assert (both["html"], both["out"]) == ("page.html", "sheet.png")


def test_a_file_is_converted(call: Call, data_file: Path, bad_file: Path, tmp_path: Path) -> None:
    shown = call("data", "convert", data_file, "--out", tmp_path / "rows.parquet")
    assert (shown.code, shown.out) == (0, f"{tmp_path / 'rows.parquet'}: 24 rows\n")
    back = call("data", "convert", tmp_path / "rows.parquet", "--out", tmp_path / "rows.jsonl", "--json").values
    assert back == {"out": str(tmp_path / "rows.jsonl"), "rows": 24, "bad_rows": 0, "pictures": 12, "outside": False}
    assert "1 of 26 rows are bad" in call("data", "convert", bad_file, "--out", tmp_path / "x.jsonl").mistake()
    shown = call("data", "convert", bad_file, "--out", tmp_path / "x.jsonl", "--skip-bad-rows")
    assert shown.out.endswith("x.jsonl: 25 rows, 1 bad rows left out\n")
