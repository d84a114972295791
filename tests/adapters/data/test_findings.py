"""What a check finds in rows that are read well: each number against one that was worked out by hand."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_rows import VQA
from PIL import Image

from adapters.data.check import check_data
from adapters.data.examples import Example
from adapters.data.image_ref import ImageRef
from adapters.data.question_alone import question_alone


@pytest.fixture
def pictures(folder: Path) -> Path:
    """Real pictures a to d; d is c under another name."""
    for name, colour in (("a", "red"), ("b", "blue"), ("c", "lime"), ("d", "lime")):
        Image.new("RGB", (8, 8), colour).save(folder / f"{name}.png")
    return folder


def test_repetitions_and_contradictions(pictures: Path, jsonl: Callable[..., Path]) -> None:
    rows = [
        VQA | {"image": "c.png", "question": "What?", "answer": "Cat"},
        VQA | {"image": "d.png", "question": "what?", "answer": "cat."},  # the same bytes, the same words
        VQA | {"image": "c.png", "question": "What?", "answer": "dog"},
        VQA | {"image": "c.png", "question": "What?", "answer": "dog", "context": "At night."},
        VQA | {"image": "a.png", "question": "What?", "answer": "cat"},
    ]
    found = check_data(jsonl(*rows)).findings
    assert (found.repeated, found.repeated_rows) == (1, ((1, 2),))
    assert (found.contradicting, found.contradicting_rows) == (1, ((1, 3),))
    assert found.same_pictures == (("c.png", "d.png"),)
    assert (found.distinct_answers, found.commonest_answers) == (2, (("cat", 3), ("dog", 2)))
    assert (found.longest_answer, found.longest_answer_row) == (4, 2)
    assert found.question_alone is None  # too few pictures
    assert [note.split(" ")[0] for note in found.notes] == ["1", "1", "1"]


def test_captions_may_be_many(pictures: Path, jsonl: Callable[..., Path]) -> None:
    rows = [{"image": "a.png", "caption": text} for text in ("One.", "Two.", "one")]
    found = check_data(jsonl(*rows)).findings
    assert (found.repeated_rows, found.contradicting) == (((1, 3),), 0)


def test_fields_that_nothing_reads_are_named_once(pictures: Path, jsonl: Callable[..., Path]) -> None:
    found = check_data(jsonl(VQA | {"note": 1, "split": "x"}, VQA | {"image": "b.png", "split": "y"}))
    assert found.unread == {"note": 1, "split": 2}
    assert "fields that nothing reads: 'note' (1 rows), 'split';" in found.findings.notes[0]


def test_other_letters_without_a_language(pictures: Path, jsonl: Callable[..., Path]) -> None:
    rows = [
        {"image": "a.png", "caption": "一只猫 (cat)。一只黑猫。"},
        {"image": "b.png", "caption": "一只狗。", "language": "zh"},
        {"image": "c.png", "caption": "Ein Käse."},
    ]
    found = check_data(jsonl(*rows)).findings
    assert found.scripts == {"CJK": 2, "LATIN": 1}
    assert found.notes[-1].startswith("1 rows are not in Latin letters and say no language")


def test_one_answer_teaches_nothing(pictures: Path, jsonl: Callable[..., Path]) -> None:
    found = check_data(jsonl(VQA, VQA | {"image": "b.png"})).findings
    assert "all rows have the same answer" in found.notes[-1]


# -- the question alone ------------------------------------------------------------------------------------------------


def row(picture: int, question: str, answer: str) -> Example:
    return Example((ImageRef(f"{picture}.png", data=b"x"),), question, (answer,), "", "")


def test_questions_that_give_their_answers_away() -> None:
    said = (("big", "yes"), ("odd", "no"))
    rows = [row(n, f"is thing {n} {word}?", answer) for n in range(40) for word, answer in said]
    found = question_alone(rows)
    assert found is not None
    assert (found.rows, found.commonest_answer, found.by_question) == (80, 0.5, 0.5)  # each is asked once
    assert found.bag_of_words == 1.0
    same = question_alone([row(n, "which?", "left" if n % 4 else "right") for n in range(40)])
    assert same is not None
    assert same.commonest_answer == same.by_question == same.bag_of_words == 0.75


def test_the_regression_is_the_one_of_the_textbook() -> None:
    """Against numpy's least squares on rows with the penalty written as rows of their own."""
    random = np.random.default_rng(0)
    words = ["red", "big", "old", "far"]
    rows = []
    for picture in range(30):
        said = [word for word in words if random.random() < 0.5]
        answer = "yes" if "red" in said and random.random() < 0.8 else str(random.choice(["no", "maybe"]))
        rows.append(row(picture, " ".join(said) or "none", answer))
    found = question_alone(rows)
    assert found is not None

    order = sorted({f"{n}.png" for n in range(30)}, key=lambda name: hashlib.sha256(name.encode()).digest())
    part = {name: place % 5 for place, name in enumerate(order)}
    vocabulary = sorted({word for one in rows for word in one.question.split()})
    answers = ["maybe", "no", "yes"]
    features = np.array([[*(word in one.question.split() for word in vocabulary), 1] for one in rows], float)
    targets = np.array([[one.answer == answer for answer in answers] for one in rows], float)
    parts = np.array([part[one.images[0].label] for one in rows])
    hits = 0
    for left_out in range(5):
        kept = parts != left_out
        penalty = np.eye(features.shape[1])
        stacked = np.vstack([features[kept], penalty])
        weights, *_ = np.linalg.lstsq(stacked, np.vstack([targets[kept], np.zeros((len(penalty), 3))]), rcond=None)
        guessed = (features[~kept] @ weights).argmax(axis=1)
        hits += sum(answers[g] == one.answer for g, one in zip(guessed, np.array(rows, object)[~kept], strict=True))
    assert found.bag_of_words == pytest.approx(hits / 30)


def test_too_little_is_not_scored() -> None:
    assert question_alone([row(n, "", "x") for n in range(9)]) is None
    assert question_alone([row(n, "why?", "x") for n in range(4)]) is None
