"""Scores by group and confusions, against values worked out by hand."""

from __future__ import annotations

import pytest

from adapters.data.examples import Example
from adapters.data.image_ref import ImageRef
from adapters.evaluation.breakdown import break_down, confusion_table, confusions, form_of, right_answer, score_groups
from adapters.evaluation.intervals import interval_by_picture


def row(picture: str, question: str, *answers: str, kind: str | None = None) -> Example:
    return Example((ImageRef(picture, data=picture.encode()),), question, answers, "", "1", kind=kind)


ROWS = [
    row("a", "What colour is it?", "red", kind="colour"),
    row("b", "what colour is it ?", "Red", kind="colour"),
    row("c", "What colour is it?", "blue", kind="colour"),
    row("a", "Is it round?", "yes", "yes", "no", kind="shape"),
    row("a", "Is it big?", "no"),
]
SAID = ["red", "Blue.", "red", "yes", "no"]  # right, wrong, wrong, right, right


def test_groups_by_hand() -> None:
    found = break_down(SAID, ROWS)
    assert list(found) == ["by_kind", "by_form", "by_question", "by_opening", "by_answer", "confusions"]
    assert list(found["by_kind"]) == ["colour", "shape"]  # the largest first; the last row says none
    assert found["by_kind"]["shape"] == {
        "n": 1,
        "exact_match": 1.0,
        "vqa_accuracy": pytest.approx(2 * 1 / 3 / 3 + 2 / 3 / 3),
    }  # one picture has no interval
    colour = found["by_kind"]["colour"]
    assert (colour["n"], colour["exact_match"]) == (3, pytest.approx(1 / 3))
    assert (colour["exact_match_low"], colour["exact_match_high"]) == interval_by_picture([1, 0, 0], ["a", "b", "c"])
    assert {name: group["n"] for name, group in found["by_question"].items()} == {
        "what colour is it": 3,
        "is it round": 1,
        "is it big": 1,
    }
    assert {name: (group["n"], group["exact_match"]) for name, group in found["by_opening"].items()} == {
        "what colour": (3, pytest.approx(1 / 3)),
        "is it": (2, 1.0),
    }
    assert {name: (group["n"], group["exact_match"]) for name, group in found["by_answer"].items()} == {
        "red": (2, 0.5),
        "blue": (1, 0.0),
        "yes": (1, 1.0),
        "no": (1, 1.0),
    }
    assert found["confusions"] == [
        {"right": "red", "given": "blue", "n": 1, "of": 2},
        {"right": "blue", "given": "red", "n": 1, "of": 1},
    ]


def test_lists_with_commas_are_right_in_any_order_if_asked_for() -> None:
    rows = [row("a", "What is there?", "book, papers")]
    assert break_down(["papers, book"], rows)["by_answer"]["book, papers"]["exact_match"] == 0.0
    assert break_down(["papers, book"], rows, sets=True)["by_answer"]["book, papers"]["exact_match"] == 1.0


def test_rows_without_a_kind_make_no_table() -> None:
    assert "by_kind" not in break_down(["no"], ROWS[4:])
    assert score_groups([None, ""], {"exact_match": [True, True]}, ["a", "b"]) == {}


def test_questions_on_one_picture_have_no_interval() -> None:
    found = score_groups(["x", "x", "y", "y"], {"exact_match": [True, False, True, True]}, ["a", "a", "a", "b"])
    assert found["x"] == {"n": 2, "exact_match": 0.5}
    assert found["y"] == {"n": 2, "exact_match": 1.0, "exact_match_low": 1.0, "exact_match_high": 1.0}


def test_the_most_frequent_mistakes_come_first() -> None:
    rows = [row("a", "?", "cat")] * 5 + [row("a", "?", "dog")] * 2 + [row("a", "?", "book, papers")]
    said = ["dog", "fox", "dog", "cat", "", "cat", "dog", "papers, book"]
    assert confusions(said, rows, sets=True) == [
        {"right": "cat", "given": "dog", "n": 2, "of": 5},
        {"right": "cat", "given": "fox", "n": 1, "of": 5},
        {"right": "cat", "given": "", "n": 1, "of": 5},
        {"right": "dog", "given": "cat", "n": 1, "of": 2},
    ]
    assert {"right": "book, papers", "given": "papers, book", "n": 1, "of": 1} in confusions(said, rows)
    assert confusions(said, rows, most=1) == [{"right": "cat", "given": "dog", "n": 2, "of": 5}]


def test_the_right_answer_is_the_commonest() -> None:
    assert right_answer(["Yes", "no", "yes."]) == "yes"
    assert right_answer(["left", "right"]) == "left"


def test_an_answer_that_is_not_the_commonest_but_given_is_no_mistake() -> None:
    assert confusions(["no"], [ROWS[3]]) == []


def test_closed_questions_are_told_from_open_ones() -> None:
    found = break_down(SAID, ROWS)["by_form"]
    assert {name: group["n"] for name, group in found.items()} == {"open": 3, "closed": 2}
    assert form_of(row("a", "Is it red or blue?", "red")) == "open"
    assert form_of(row("a", "Is it red or blue?", "red", kind="CLOSED")) == "closed"  # as VQA-RAD says it
    assert form_of(row("a", "Is it?", "yes", kind="open")) == "open"
    assert form_of(Example((), "which?", ("red",), "", "1", choices=("red", "blue"))) == "closed"


def test_the_confusion_table_by_hand() -> None:
    rows = [row("a", "?", answer) for answer in ["cat"] * 3 + ["dog"] * 2 + ["fox", "ant"]]
    said = ["Cat", "dog", "cow", "dog", "cat", "cow", "ant"]
    assert confusion_table(said, rows, most=2) == (
        ["cat", "dog", "…"],
        ["cat", "dog", "cow", "ant"],
        [[1, 1, 1, 0], [1, 1, 0, 0], [0, 0, 1, 1]],
    )
    named, given, counts = confusion_table(said, rows)
    assert named == ["cat", "dog", "fox", "ant"] and given == ["cat", "dog", "fox", "ant", "cow"]
    assert sum(map(sum, counts)) == len(said)
    assert confusion_table(["b, a"], [row("a", "?", "a, b")], sets=True) == (["a, b"], ["a, b"], [[1]])
