"""Bad rows in batch jobs: each has its line, under its own number, and is counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from data_rows import read_jsonl, write_jsonl

from qformer.errors import UserError
from serve.batch.ordered_lines import BatchReport
from serve.batch.predictor import VQAPredictor
from serve.batch.run import run_batch


class Stopped(Exception):
    """Stands for whatever ends a job in the middle."""


@pytest.fixture
def with_bad_row(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    """Row 6 names a text file: it is there, so only opening it shows that it is no picture."""
    (tmp_path / "text.jpg").write_text("not a picture", encoding="utf-8")
    rows[5]["image"] = "text.jpg"
    return write_jsonl(tmp_path / "rows.jsonl", rows)


@pytest.mark.parametrize("chunk", [3, 100])
def test_a_bad_picture_stops_the_job_and_keeps_what_came_before(
    predictor: VQAPredictor, with_bad_row: Path, tmp_path: Path, chunk: int
) -> None:
    out = tmp_path / "out.jsonl"

    with pytest.raises(UserError, match=r"rows\.jsonl row 6 .*'text\.jpg' is not a picture"):
        run_batch(with_bad_row, out, predictor, chunk=chunk)

    assert [line["row"] for line in read_jsonl(out)] == [1, 2, 3, 4, 5]
    assert all("answer" in line for line in read_jsonl(out))


@pytest.fixture
def with_every_fault(with_bad_row: Path, rows: list[dict[str, Any]]) -> Path:
    """Fourteen rows, of which eight are good: 1, 3, 5, 6, 8, 9, 12 and 14; a blank line is no row."""
    image = rows[0]["image"]
    good = [row for row in rows if row["image"] != "text.jpg"]
    lines: list[object] = [
        good[0],
        '{"image": "a.png", "question": "broken',
        good[1],
        {"image": image},
        good[2],
        good[3],
        {"image": image, "question": 7},
        good[4],
        "",
        good[5],
        {"image": "text.jpg", "question": "what?"},
        {"image": "gone.jpg", "question": "what?"},
        good[6],
        {"image": ["text.jpg", image], "question": "which?"},
        good[7],
    ]
    return write_jsonl(with_bad_row.parent / "faults.jsonl", lines)


@pytest.mark.parametrize("chunk", [3, 100])
def test_every_row_of_the_file_has_a_line_under_its_own_number(
    predictor: VQAPredictor, with_every_fault: Path, rows: list[dict[str, Any]], tmp_path: Path, chunk: int
) -> None:
    out = tmp_path / "out.jsonl"
    lines = [line for line in with_every_fault.read_text(encoding="utf-8").splitlines() if line]

    report = run_batch(with_every_fault, out, predictor, skip_bad_rows=True, chunk=chunk)
    found = read_jsonl(out)

    assert report == BatchReport(answered=8, already=0, failed=6)
    assert [line["row"] for line in found] == list(range(1, 15))
    for line in found:
        if "answer" in line:  # what stands under a number is what is asked there, in the file
            asked = json.loads(lines[line["row"] - 1])
            assert {key: line[key] for key in ("image", "question")} == asked
            assert line["answer"] == predictor.engine.ask(
                asked["image"], asked["question"], decoding=predictor.decoding
            )
    said = {line["row"]: line["error"] for line in found if "error" in line}
    assert not any("answer" in line for line in found if "error" in line)
    assert {row: text.split(": ", 1)[0] for row, text in said.items()} == {
        row: f"{with_every_fault} row {row} (line {row if row < 9 else row + 1})" for row in (2, 4, 7, 10, 11, 13)
    }
    for row, words in {
        2: "broken JSON",
        4: "field 'question' is missing, which the other rows have",
        7: "'question' is a number",
        10: "'text.jpg' is not a picture",
        11: "'gone.jpg' is not there",
        13: "'text.jpg' is not a picture",
    }.items():
        assert words in said[row]
    assert found[9]["image"] == "text.jpg" and found[12]["images"][0] == "text.jpg"


def test_a_job_with_bad_rows_goes_on_too(predictor: VQAPredictor, with_every_fault: Path, tmp_path: Path) -> None:
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run_batch(with_every_fault, whole, predictor, skip_bad_rows=True)

    def stop(done: int, total: int) -> None:
        assert total == 14
        if done == 8:
            raise Stopped

    with pytest.raises(Stopped):
        run_batch(with_every_fault, cut, predictor, skip_bad_rows=True, chunk=4, write_every=0, on_progress=stop)
    report = run_batch(with_every_fault, cut, predictor, skip_bad_rows=True, chunk=4)

    assert report == BatchReport(answered=3, already=5, failed=6)
    assert cut.read_bytes() == whole.read_bytes()


def test_a_missing_picture_can_be_put_there_and_its_row_asked_again(
    predictor: VQAPredictor, with_every_fault: Path, rows: list[dict[str, Any]], tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    run_batch(with_every_fault, out, predictor, skip_bad_rows=True)
    Path(tmp_path / "gone.jpg").write_bytes(Path(rows[0]["image"]).read_bytes())
    assert run_batch(with_every_fault, out, predictor, skip_bad_rows=True) == BatchReport(0, 8, 6)
    write_jsonl(out, [line for line in read_jsonl(out) if line["row"] != 11])

    assert run_batch(with_every_fault, out, predictor, skip_bad_rows=True) == BatchReport(1, 8, 5)
    assert read_jsonl(out)[-1]["row"] == 11
    assert read_jsonl(out)[-1]["answer"] == predictor.engine.ask(rows[0]["image"], "what?", decoding=predictor.decoding)


def test_a_row_that_only_the_prompt_refuses_is_a_bad_row_too(
    predictor: VQAPredictor, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = predictor.engine.assembly.prompts
    real = prompts.vqa

    def refuse(question: str, num_images: int = 1, *, where: str = "question", **asked: Any) -> Any:
        if question == "is it red?":
            raise UserError(f"{where}: not that one")
        return real(question, num_images, where=where, **asked)

    monkeypatch.setattr(prompts, "vqa", refuse)
    report = run_batch(source, tmp_path / "out.jsonl", predictor, skip_bad_rows=True)

    assert report == BatchReport(answered=7, already=0, failed=3)
    said = {line["row"]: line.get("error") for line in read_jsonl(tmp_path / "out.jsonl")}
    assert [row for row, error in said.items() if error] == [3, 6, 9]
    assert said[6] == f"{source} row 6 (line 6): not that one"


def test_a_full_disk_is_no_fault_of_the_rows(
    predictor: VQAPredictor, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(refs: object) -> None:
        raise UserError("no space left")

    monkeypatch.setattr(predictor.engine.assembly.caches[0], "load", full)
    with pytest.raises(UserError, match="no space left"):
        run_batch(source, tmp_path / "out.jsonl", predictor, skip_bad_rows=True)
