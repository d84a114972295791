"""Rows with reasons: what is read of them, as what, and what is wrong with them; ScienceQA's problems as such rows."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from data_rows import CAPTION, VQA, complaint

from adapters.data.check import check_data
from adapters.data.image_ref import blank_image
from adapters.data.reading import read_data

REASON = {
    "image": "a.png",
    "question": "Is it awake?",
    "context": "It is noon.",
    "choices": ["yes", "no"],
    "rationale": "Its eyes are open.",
    "answer": "yes",
    "kind": "state",
    "steps": 2,
}


def without(*names: str) -> dict[str, Any]:
    return {name: value for name, value in REASON.items() if name not in names}


def test_rows_with_reasons_are_told_by_their_field(jsonl: Callable[..., Path]) -> None:
    data = read_data(jsonl(REASON, without("context", "choices", "kind", "steps"), REASON | {"rationale": ""}))
    assert data.task == "reason"
    first, plain, none = data.examples
    assert (first.question, first.answer, first.answers) == ("Is it awake?", "yes", ("yes",))
    assert (first.context, first.choices, first.rationale) == ("It is noon.", ("yes", "no"), "Its eyes are open.")
    assert (first.kind, first.steps) == ("state", 2)
    assert (plain.context, plain.choices, plain.kind, plain.steps) == ("", (), None, None)
    assert none.rationale == ""


def test_they_are_read_as_questions_alone_where_that_is_asked(jsonl: Callable[..., Path]) -> None:
    (example,) = read_data(jsonl(REASON), task="vqa").examples
    assert example.answers == ("yes",)
    assert (example.context, example.choices, example.rationale, example.steps) == ("", (), "", None)


def test_reasons_may_be_absent_where_there_are_questions_to_answer(jsonl: Callable[..., Path]) -> None:
    asked = without("rationale", "answer")
    assert read_data(jsonl(asked), need_answers=False).task == "vqa"
    (example,) = read_data(jsonl(asked), task="reason", need_answers=False).examples
    assert (example.choices, example.answer, example.rationale) == (("yes", "no"), "", "")


def test_an_answer_is_taken_in_the_words_of_its_choice(jsonl: Callable[..., Path]) -> None:
    (example,) = read_data(jsonl(REASON | {"answer": " YES."})).examples
    assert example.answers == ("yes",)
    counted = REASON | {"choices": [0, 1, 2], "answer": 2}
    assert read_data(jsonl(counted)).examples[0].choices == ("0", "1", "2")


def test_fields_of_other_meaning_are_no_kind_and_no_steps(jsonl: Callable[..., Path]) -> None:
    (example,) = read_data(jsonl(REASON | {"kind": 3, "steps": ["look", "say"]})).examples
    assert (example.kind, example.steps) == (None, None)


def test_choices_in_a_table_are_a_json_list(folder: Path) -> None:
    table = folder / "rows.csv"
    table.write_text('image,question,choices,rationale,answer\na.png,Is it?,"[""yes"", ""no""]",So.,no\n')
    (example,) = read_data(table).examples
    assert (example.choices, example.rationale, example.answer) == (("yes", "no"), "So.", "no")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (without("rationale"), ["field 'rationale' is missing", '""']),
        (without("answer"), ["'answer' is missing"]),
        (REASON | {"rationale": 5}, ["'rationale' is a number (5)"]),
        (REASON | {"rationale": "  "}, ["'rationale' is empty"]),
        (REASON | {"context": ["x"]}, ["'context' is a list"]),
        (REASON | {"choices": "yes, no"}, ["'choices' is text", "list of texts"]),
        (REASON | {"choices": ["yes"]}, ["'choices' holds 1", "at least two"]),
        (REASON | {"choices": []}, ["'choices' holds 0"]),
        (REASON | {"choices": ["yes", None]}, ["'choices' holds null"]),
        (REASON | {"answer": "perhaps"}, ["the answer 'perhaps' is none of the choices (yes, no)"]),
        (CAPTION, ["a caption row among reason rows"]),
    ],
)
def test_a_bad_row_is_named_and_can_be_skipped(row: object, words: list[str], jsonl: Callable[..., Path]) -> None:
    path = jsonl(REASON, row)
    message = complaint(path)
    assert message.startswith(f"{path} row 2 (line 2): ")
    for word in words:
        assert word in message, message
    assert len(read_data(path, skip_bad_rows=True).examples) == 1
    assert len(check_data(path).faults) >= 1


def test_reasons_are_not_dropped_in_silence(jsonl: Callable[..., Path]) -> None:
    path = jsonl(VQA, REASON)
    assert "a row with a rationale among rows without" in complaint(path)
    assert len(read_data(path, task="vqa").examples) == 2


def test_reasons_asked_of_a_file_without_any(jsonl: Callable[..., Path]) -> None:
    assert "--task reason" in complaint(jsonl(VQA), task="reason")
    assert "'rationale' is missing" in complaint(jsonl(VQA), task="reason")
    assert "--task caption" in complaint(jsonl(CAPTION), task="reason")


def test_the_fingerprint_follows_reasons_context_and_choices(jsonl: Callable[..., Path]) -> None:
    rows: list[dict[str, Any]] = [
        REASON,
        REASON | {"rationale": "It moves."},
        REASON | {"context": "It is night."},
        REASON | {"choices": ["no", "yes"]},
    ]
    assert len({read_data(jsonl(row)).fingerprint for row in rows}) == 4
    assert len({read_data(jsonl(row), task="vqa").fingerprint for row in rows}) == 1


# -- ScienceQA -------------------------------------------------------------------------------------------------------


@pytest.fixture
def scienceqa(tmp_path: Path) -> Path:
    """Two problems of a test split, one with a picture, and one of a training split whose picture is not there."""
    problem = {
        "question": "Which rusts?", "choices": ["iron", "gold"], "answer": 0, "hint": " ", "image": None,
        "grade": "grade7", "subject": "natural science", "topic": "", "lecture": "Iron rusts.",
        "solution": "So does a nail.", "split": "test",
    }  # fmt: skip
    problems = {
        "7": problem | {"image": "image.png", "hint": "Look at the nail.", "answer": 1},
        "9": problem | {"lecture": "", "solution": ""},
        "1": problem | {"image": "image.png", "split": "train"},
    }
    folder = tmp_path / "scienceqa"
    picture = folder / "images" / "test" / "7" / "image.png"
    picture.parent.mkdir(parents=True)
    picture.write_bytes(b"a picture")
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"test": ["9", "7"], "train": ["1", "9"]}))
    return folder


def test_scienceqa_is_read_by_its_folder_and_split(scienceqa: Path) -> None:
    data = read_data(f"{scienceqa}:test")
    assert (data.name, data.task) == ("scienceqa:test", "reason")
    assert data.terms is not None and "CC BY-NC-SA" in data.terms
    plain, seen = data.examples
    assert (plain.id, plain.answer, plain.rationale, plain.context) == ("9", "iron", "", "")
    assert plain.images[0].digest() == blank_image().digest()  # there is none
    assert (seen.id, seen.answer, seen.choices) == ("7", "gold", ("iron", "gold"))
    assert (seen.rationale, seen.context) == ("Iron rusts. So does a nail.", "Look at the nail.")
    assert seen.images[0].path == scienceqa / "images" / "test" / "7" / "image.png"
    assert seen.where == f"{scienceqa / 'problems.json'} problem 7"
    assert len(read_data(f"{scienceqa}:test", limit=1).examples) == 1
    assert read_data(f"{scienceqa}:test", task="vqa").examples[1].answers == ("gold",)


def test_mistakes_with_scienceqa(scienceqa: Path) -> None:
    assert f"name a split of it, such as {scienceqa}:train" in complaint(scienceqa)
    assert "has no list 'dev': take one of test, train" in complaint(f"{scienceqa}:dev")
    message = complaint(f"{scienceqa}:train")
    assert "problem 1: image 'images/train/1/image.png' is not there" in message and "1 of 2 rows are bad" in message
    assert len(read_data(f"{scienceqa}:train", skip_bad_rows=True).examples) == 1
    assert "FOLDER:SPLIT" in complaint("nowhere:test")
