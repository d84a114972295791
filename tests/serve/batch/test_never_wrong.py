"""Batch jobs that could lose or double rows without a word: two at once, odd names, odd characters, long questions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from data_rows import read_jsonl, write_jsonl

from adapters.data.examples import Example
from adapters.data.reading import read_data
from adapters.inference.request import Completion
from qformer.errors import UserError
from qformer.file_lock import lock
from serve.batch import predictor as predictor_module
from serve.batch import run
from serve.batch.asking import Asking, Fields
from serve.batch.job import job_file
from serve.batch.ordered_lines import BatchReport
from serve.batch.predictor import VQAPredictor
from serve.batch.run import run_batch


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


# -- two at once -----------------------------------------------------------------------------------------------------


def test_a_second_job_on_the_same_file_is_refused(predictor: VQAPredictor, source: Path, out: Path) -> None:
    run_batch(source, out, predictor, limit=4)
    before = out.read_bytes()
    with out.open("ab") as other:
        assert lock(other)
        with pytest.raises(UserError) as caught:
            run_batch(source, out, predictor)
    assert str(caught.value) == (f"--out {out}: another job is writing to it; wait until it ends, or name another file")
    assert out.read_bytes() == before
    assert run_batch(source, out, predictor) == BatchReport(6, 4, 0)


def test_jobs_that_begin_together_write_each_row_once(
    predictor: VQAPredictor, source: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = run._survey

    def late(*arguments: Any, **options: Any) -> Any:
        """The other job is done while this one reads."""
        monkeypatch.setattr(run, "_survey", real)
        assert run_batch(source, out, predictor) == BatchReport(10, 0, 0)
        return real(*arguments, **options)

    monkeypatch.setattr(run, "_survey", late)
    with pytest.raises(UserError, match="another job wrote to it while this one read its input; start again"):
        run_batch(source, out, predictor)
    assert [line["row"] for line in read_jsonl(out)] == list(range(1, 11))


def test_a_job_that_begins_while_another_answers_is_refused(predictor: VQAPredictor, source: Path, out: Path) -> None:
    refused: list[str] = []

    def begin_another(done: int, total: int) -> None:
        with pytest.raises(UserError, match="another job is writing to it") as caught:
            run_batch(source, out, predictor)
        refused.append(str(caught.value))

    assert run_batch(source, out, predictor, chunk=4, write_every=0, on_progress=begin_another) == BatchReport(10, 0, 0)
    assert len(refused) == 3
    assert [line["row"] for line in read_jsonl(out)] == list(range(1, 11))


# -- names and characters --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["answers.tsv", "answers.JSON", "answers.xlsx", "answers.jsonl.gz"])
def test_a_name_of_another_format_is_refused(name: str, predictor: VQAPredictor, source: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--out .*: '\.\w+' is not written; name it answers\.jsonl, "):
        run_batch(source, tmp_path / name, predictor)
    assert not (tmp_path / name).exists()


def test_half_a_character_costs_its_row_and_no_other(
    predictor: VQAPredictor, rows: list[dict[str, Any]], tmp_path: Path, out: Path
) -> None:
    lines = [json.dumps(row) for row in rows]
    lines[4] = json.dumps(rows[4] | {"question": "what \ud83d?"})
    source = write_jsonl(tmp_path / "rows.jsonl", lines)
    with pytest.raises(UserError, match=r"row 5 \(line 5\): 'question' holds half a character"):
        run_batch(source, out, predictor)
    for report in (BatchReport(9, 0, 1), BatchReport(0, 9, 1)):
        assert run_batch(source, out, predictor, skip_bad_rows=True) == report
    found = read_jsonl(out)
    assert [line["row"] for line in found] == list(range(1, 11))
    assert "half a character (\\ud83d)" in found[4]["error"]


def test_a_column_with_half_a_character_is_refused(predictor: VQAPredictor, data_file: Path) -> None:
    with pytest.raises(UserError, match="row 0: the text holds half a character"):
        predictor({"image": [str(data_file.parent / "0.png")], "question": ["what \ud83d?"]})


def test_an_input_whose_name_is_not_utf_8_has_its_errors_told(
    predictor: VQAPredictor, rows: list[dict[str, Any]], tmp_path: Path, out: Path
) -> None:
    source = tmp_path / "rows\udce4.jsonl"  # as Python names a file whose name is not UTF-8
    try:
        write_jsonl(source, [rows[0], "broken"])
    except OSError:
        pytest.skip("this disk takes no such name")
    assert run_batch(source, out, predictor, skip_bad_rows=True) == BatchReport(1, 0, 1)
    assert read_jsonl(out)[1]["error"].startswith(f"{source} row 2")


# -- tasks and missing pictures --------------------------------------------------------------------------------------


def test_questions_under_another_name_are_not_captioned(
    predictor: VQAPredictor, rows: list[dict[str, Any]], tmp_path: Path, out: Path
) -> None:
    source = write_jsonl(tmp_path / "rows.jsonl", [{"image": row["image"], "prompt": row["question"]} for row in rows])
    for task in (None, "vqa"):
        with pytest.raises(UserError, match="there is 'prompt': is that it") as caught:
            run_batch(source, out, predictor, task=task)
        assert "caption" not in str(caught.value)
    assert not out.exists()


def test_a_missing_picture_is_told_before_anything_is_answered(
    predictor: VQAPredictor, rows: list[dict[str, Any]], tmp_path: Path, out: Path
) -> None:
    rows[3]["image"] = "gone.png"
    with pytest.raises(UserError, match=r"row 4 .*'gone\.png' is not there"):
        run_batch(write_jsonl(tmp_path / "rows.jsonl", rows), out, predictor)
    assert not out.exists() and not job_file(out).exists()


def test_choices_of_a_row_are_asked_with_its_question(
    predictor: VQAPredictor, rows: list[dict[str, Any]], tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Example] = []
    real = predictor.answer

    def answer(examples: Sequence[Example], asking: Asking) -> list[Fields]:
        asked.extend(examples)
        return real(examples, asking)

    monkeypatch.setattr(predictor, "answer", answer)
    source = write_jsonl(tmp_path / "rows.jsonl", [rows[0] | {"choices": ["red", "blue"], "context": "At noon."}])
    run_batch(source, out, predictor)
    assert [(example.choices, example.context) for example in asked] == [(("red", "blue"), "At noon.")]


# -- long questions --------------------------------------------------------------------------------------------------


def test_a_question_that_is_too_long_is_a_bad_row(
    predictor: VQAPredictor, rows: list[dict[str, Any]], tmp_path: Path, out: Path
) -> None:
    length = predictor.engine.context_length
    assert length is not None
    rows[4]["question"] = "what " * length
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    with pytest.raises(
        UserError, match=rf"row 5 \(line 5\): what is asked is \d+ tokens, .* reads {length}: shorten it"
    ):
        run_batch(source, out, predictor, chunk=3)
    assert [line["row"] for line in read_jsonl(out)] == [1, 2, 3, 4]
    assert run_batch(source, out, predictor, skip_bad_rows=True) == BatchReport(5, 4, 1)
    assert "what is asked is" in next(line for line in read_jsonl(out) if line["row"] == 5)["error"]
    with pytest.raises(UserError, match="row 0: what is asked is"):
        predictor({"image": [rows[4]["image"]], "question": [rows[4]["question"]]})


def test_a_long_question_is_answered_by_itself(
    predictor: VQAPredictor, rows: list[dict[str, Any]], tmp_path: Path, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the questions beside it would be filled up to its length."""
    rows[4]["question"] = "what is it, and what was it before it was so?"
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    lengths = [
        predictor.check_length(example, "vqa") for example in read_data(source, task="vqa", need_answers=False).examples
    ]
    monkeypatch.setattr(predictor_module, "_LONG", sorted(lengths)[-2])
    sizes: list[tuple[int, int]] = []
    real = predictor.engine.reply

    def reply(examples: Sequence[Example], task: str, **options: Any) -> list[Completion]:
        sizes.append((len(examples), options["batch_size"]))
        return real(examples, task, **options)

    monkeypatch.setattr(predictor.engine, "reply", reply)
    run_batch(source, out, predictor)
    assert sorted(sizes) == [(1, 4), (1, 4), (4, 4), (4, 4)]
    found = read_jsonl(out)
    assert [line["question"] for line in found] == [row["question"] for row in rows]
    assert found[4]["answer"] == predictor.engine.ask(
        rows[4]["image"], rows[4]["question"], decoding=predictor.decoding
    )
