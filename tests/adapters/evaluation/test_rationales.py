"""Scores of answers and reasons against values worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from adapters.evaluation.rationales import language_control, score_reasons
from qformer.errors import UserError


@dataclass(frozen=True)
class Row:
    answer: str
    rationale: str = "The star is red."
    choices: tuple[str, ...] = ("red", "blue")
    kind: str | None = "colour"
    steps: int | None = 1
    question: str = "What colour is the star?"


COUNTS = ("0", "1", "2")
ROWS = [
    Row("red"),
    Row("blue", "The star is blue."),
    Row("2", "The stars are: red, blue. That is 2.", COUNTS, "count", 2, "How many stars are there?"),
    Row("0", "There are no stars. That is 0.", COUNTS, "count", 2, "How many stars are there?"),
]


def test_accuracy_overall_by_steps_and_by_kind() -> None:
    assert score_reasons([" Red.", "red", "2", "0"], None, ROWS) == {
        "n": 4,
        "no_choice": 0,
        "accuracy": 0.75,
        "accuracy_single_step": 0.5,
        "accuracy_multi_step": 1.0,
        "accuracy_colour": 0.5,
        "accuracy_count": 1.0,
    }


@pytest.mark.parametrize("said", ["reddish", "the red one", "red, blue", "", "(A)"])
def test_the_nearest_choice_is_not_guessed(said: str) -> None:
    scores = score_reasons([said, "blue", "2", "0"], None, ROWS)
    assert (scores["accuracy"], scores["no_choice"]) == (0.75, 1)


def test_without_choices_anything_may_be_said() -> None:
    scores = score_reasons(["crimson", "red"], None, [Row("red", choices=()), Row("red", choices=())])
    assert (scores["accuracy"], scores["no_choice"]) == (0.5, 0)


def test_rouge_l_of_the_reasons() -> None:
    said = ["The star is red.", "The star is red", "", "There are stars. That is 0."]
    scores = score_reasons(["red"] * 4, said, ROWS)
    # all right; 3 of 4 words each way; nothing; 6 of 6 said and 6 of 7 given, recall weighing 1.2² to 1
    precision, recall, square = 6 / 6, 6 / 7, 1.2**2
    last = (1 + square) * precision * recall / (recall + square * precision)
    assert scores["rationale_ROUGE-L"] == pytest.approx((1 + 0.75 + 0 + last) / 4)
    assert scores["rationale_ROUGE-L_single_step"] == pytest.approx(1.75 / 2)
    assert scores["rationale_ROUGE-L_count"] == pytest.approx(last / 2)


def test_a_row_without_a_rationale_is_in_no_mean_of_them() -> None:
    scores = score_reasons(["red", "red"], ["The star is red.", "Whatever."], [Row("red"), Row("red", rationale="")])
    assert scores["rationale_ROUGE-L"] == 1.0 and scores["n"] == 2


def test_chinese_rationales_are_compared_by_characters() -> None:
    scores = score_reasons(["red"], ["星是蓝色"], [Row("red", rationale="星是红色。")], language="zh")
    assert scores["rationale_ROUGE-L"] == pytest.approx(0.75)


def test_rows_that_do_not_say_their_kind_or_steps() -> None:
    assert set(score_reasons(["red"], None, [Row("red", kind=None, steps=None)])) == {"n", "no_choice", "accuracy"}
    assert score_reasons([], [], []) == {"n": 0, "no_choice": 0}


def test_mistakes() -> None:
    with pytest.raises(UserError, match=r"^row 2: the answer 'green' is none of its choices \(red, blue\)"):
        score_reasons(["red", "red"], None, [Row("red"), Row("green")])
    with pytest.raises(ValueError):
        score_reasons(["red"], None, ROWS)
    with pytest.raises(ValueError):
        score_reasons(["red"] * 4, ["one"], ROWS)
    with pytest.raises(UserError, match="no rows to learn"):
        language_control(ROWS, [])


def test_language_alone_gives_each_question_its_commonest_answer() -> None:
    learned = [*[Row("blue")] * 3, Row("red"), Row("red", question="What colour is the cross?")]
    rows = [Row("blue"), Row("red"), Row("red", question="what  colour is the Cross?"), Row("red", question="New?")]
    # of the star: blue; of the cross: red; to what was never asked: blue, as mostly to its kind
    scores = language_control(rows, learned)
    assert scores["accuracy"] == 0.5 and scores["no_choice"] == 0
    assert language_control(rows)["accuracy"] == 0.75  # the star's two are as common, the first choice is taken
    assert language_control(ROWS[2:], learned)["accuracy"] == 0.5  # a kind never seen: the first choice, 0


def test_the_commonest_answer_of_a_kind_is_taken_from_the_choices() -> None:
    learned = [Row("blue", question=f"{number}?") for number in range(3)] + [Row("red", question="4?")]
    rows = [Row("red", choices=("green", "red"), question="New?"), Row("red", question="Newer?")]
    assert language_control(rows, learned)["accuracy"] == 0.5  # blue is no choice of the first, but of the second
