"""Scores against values worked out by hand."""

from __future__ import annotations

import pytest

from adapters.evaluation.vqa import (
    as_written_only,
    commonest_answer_score,
    commonest_answers,
    exact_match,
    score,
    vqa_accuracy,
    vqa_form,
)


@pytest.mark.parametrize(
    ("said", "right", "expected"),
    [
        ("Red", "red", True),
        ("red.", "red", True),
        ("tape_dispenser", "tape dispenser", True),
        ("papers, book", "book, papers", False),
        ("circle", "circle,circle", False),
        ("12,34", "34,12", False),
        ("34,12", "34,12", True),
        ("\uff13\uff14", "34", True),  # full-width digits
        ("caf\u00e9", "cafe\u0301", True),
        ("reddish", "red", False),
        ("", "red", False),
    ],
)
def test_exact_match(said: str, right: str, expected: bool) -> None:
    assert exact_match(said, [right]) is expected


def test_answers_with_commas_are_sets_where_that_is_asked_for() -> None:
    for said, right, equal in (
        ("papers, book", "book, papers", True),
        ("circle", "circle,circle", True),
        ("book", "book, papers", False),
        ("Red.", "red", True),
    ):
        assert exact_match(said, [right], sets=True) is equal
    assert score(["b, a"], [["a, b"]], sets=True)["exact_match"] == 1.0
    assert score(["b, a"], [["a, b"]])["exact_match"] == 0.0
    learned = [("what is there?", ["a, b"])]
    assert commonest_answer_score(["what is there?"], [["b, a"]], learned, sets=True) == 1.0
    assert commonest_answer_score(["what is there?"], [["b, a"]], learned) == 0.0


def test_vqa_accuracy_is_the_mean_over_nine_of_ten() -> None:
    ten = ["yes"] * 2 + ["no"] * 8
    # leave one "yes" out: 1 left → 1/3, twice; leave a "no" out: 2 left → 2/3, eight times
    assert vqa_accuracy("yes", ten) == pytest.approx((2 * 1 / 3 + 8 * 2 / 3) / 10)
    assert vqa_accuracy("no", ten) == 1.0
    assert vqa_accuracy("maybe", ten) == 0.0


def test_vqa_accuracy_compares_in_vqav2s_form() -> None:
    assert vqa_accuracy("The two dogs!", ["2 dogs"]) == 1.0
    assert vqa_accuracy("3.5", ["3.5"]) == 1.0
    assert vqa_accuracy("1,000", ["1000"]) == 1.0


@pytest.mark.parametrize(
    ("said", "form"),
    [
        ("The Two dogs!", "2 dogs"),
        ("none", "0"),
        ("ten o clock", "10 o clock"),
        ("eleven", "eleven"),  # the table of number words ends at ten
        ("dont", "don't"),
        ("oclock", "o'clock"),
        ("Couldn'tve", "couldn't've"),
        ("yall'd've", "y'all'd've"),
        ("somebody'd", "somebodyd"),
        ("its", "its"),  # a word of its own, and not in the table
        ("red/blue", "red blue"),
        ("red, blue", "red blue"),  # a comma beside a space leaves none behind
        ("red,blue", "red blue"),
        ("red - blue", "red blue"),
        ("t-shirt", "t shirt"),
        ("t-shirt -", "tshirt"),  # one beside a space, so both without a space
        ("1,000", "1000"),
        ("1,000 t-shirts", "1000 tshirts"),  # a comma between digits: no mark leaves a space
        ("3.5", "3.5"),
        (".5", ".5"),
        ("3.", "3"),
        ("st. john's", "st john's"),
        ("10:30", "10:30"),  # a colon and an apostrophe stay
        ("an", ""),
        ("line\nbreak\t", "line break"),
        ("\uff12 dogs\uff01", "2 dogs"),  # full-width
        ("cafe\u0301", "caf\u00e9"),
    ],
)
def test_vqav2s_form_by_hand(said: str, form: str) -> None:
    assert vqa_form(said) == form


def test_vqav2s_form_does_not_touch_exact_match() -> None:
    assert not exact_match("dont", ["don't"]) and not exact_match("two", ["2"])
    assert score(["two dont", "no"], [["2 don't"], ["no"]]) == {"n": 2, "exact_match": 0.5, "vqa_accuracy": 1.0}


def test_scores_and_the_commonest_answer() -> None:
    answers = [("red",), ("red",), ("blue",), ("yes",)]
    assert score(["red", "blue", "blue", "no"], answers) == {"n": 4, "exact_match": 0.5, "vqa_accuracy": 0.5}
    assert commonest_answer_score(["colour?", "Colour?", "colour?", "is it?"], answers) == 0.75


def test_the_commonest_answer_of_training() -> None:
    """Each question as training answers it most; one that training never asks by training's commonest answer."""
    learned = [
        ("colour?", ["blue"]),
        ("colour?", ["red", "Red", "blue"]),
        ("is it?", ["no", "no", "no"]),
        ("is it?", ["yes"]),
    ]
    asked = ["Colour?", "colour?", "is it?", "how many?", "where?"]
    answers = [("blue",), ("red",), ("no",), ("no",), ("2",)]
    # "colour?": blue and red twice each, and blue came first; "no" three times is the commonest over all
    assert commonest_answer_score(asked, answers, learned) == pytest.approx(3 / 5)
    assert commonest_answer_score(asked, answers, learned[:1]) == pytest.approx(1 / 5)
    assert commonest_answer_score(asked, answers) == pytest.approx(4 / 5)  # the very answers: half of "colour?"


# The published rules of VQAv2's evaluation, step by step, on annotations as VQAv2 has them: ten answers a question
TWO = ["2"] * 4 + ["two"] * 2 + ["2 dogs"] * 3 + ["many"]
SHIRT = ["t-shirt"] * 3 + ["t shirt"] * 2 + ["shirt"] * 5
LEASH = ["on leash"] * 9 + ["it's on a leash"]


@pytest.mark.parametrize(
    ("said", "answers", "expected"),
    [
        ("Two.", TWO, 1.0),  # six are "2": five or six stay, which is three or more
        ("2 dogs", TWO, (3 * 2 / 3 + 7 * 1.0) / 10),
        ("many", TWO, (1 * 0.0 + 9 * 1 / 3) / 10),
        ("none", TWO, 0.0),
        ("T-Shirt", SHIRT, 1.0),  # hyphens become spaces: five of them
        ("the shirt!", SHIRT, 1.0),
        ("shirts", SHIRT, 0.0),
        ("its on leash", LEASH, 0.0),  # "its" is left alone; "it's on a leash" loses its article only
        ("its on leash", ["its on a leash"] * 2 + ["on leash"] * 8, (2 * 1 / 3 + 8 * 2 / 3) / 10),
        ("dont know", ["don't know"] * 3 + ["unsure"] * 7, (3 * 2 / 3 + 7 * 1.0) / 10),
        ("1,000", ["1000"] * 9 + ["1,000"], 1.0),
        # one answer by all ten: the official evaluation compares as it is written, but for blanks around it
        ("yes", ["yes"] * 10, 1.0),
        ("yes\n", ["yes"] * 10, 1.0),
        ("Yes", ["yes"] * 10, 0.0),
        ("two", ["2"] * 10, 0.0),
        ("Yes", ["yes"] * 9 + ["no"], 1.0),
    ],
)
def test_vqa_accuracy_by_the_published_rules(said: str, answers: list[str], expected: float) -> None:
    assert vqa_accuracy(said, answers) == pytest.approx(expected)


def test_answers_that_are_wrong_by_their_form_alone_are_found() -> None:
    assert as_written_only("Yes", ["yes"] * 10)
    assert not as_written_only("yes", ["yes"] * 10)
    assert not as_written_only("no", ["yes"] * 10)
    assert not as_written_only("Yes", ["yes"])
    assert not as_written_only("Yes", ["yes", "no"])


def test_the_commonest_answers_themselves() -> None:
    learned = [("colour?", ["red"]), ("colour?", ["red"]), ("colour?", ["blue"]), ("is it?", ["no"] * 4)]
    assert commonest_answers(["Colour?", "new?"], [["x"], ["y"]], learned) == ["red", "no"]
