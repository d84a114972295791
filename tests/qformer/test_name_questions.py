"""What questions ask of names: which, whether, which of several; and what they say is there."""

from __future__ import annotations

import pytest
import torch

from qformer.name_questions import NameQuestions, affirmed, either_or, is_open, kinds_of

NAMES = ("dog", "harp", "grand piano", "banana", "city", "photo")
SCORES = torch.tensor([0.1, 0.6, 0.3, 0.5, 0.0, 0.2])


@pytest.fixture
def asked() -> NameQuestions:
    return NameQuestions(NAMES, {"fruit": (3, 0)}, threshold=0.25)


def likeliest(asked: NameQuestions, question: str) -> str | None:
    return max(asked.answer(question, SCORES), key=lambda pair: pair[1], default=(None, 0.0))[0]


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("What is this?", "harp"),
        ("what fruit is it", "banana"),
        ("What's in the photo?", "harp"),  # what it mentions is not what it asks for
        ("Is there a harp in the picture?", "yes"),
        ("any dogs here", "no"),
        ("do you see two grand pianos?", "yes"),
        ("are there cities?", "no"),
        ("Is it a dog or a grand piano?", "grand piano"),
        ("banana or harp?", "harp"),
        ("is the dog on the left or on the right?", None),
        ("How many dogs are there?", None),
        ("who is in the picture?", None),
        ("这是什么?", None),
        ("?", None),
    ],
)
def test_questions(asked: NameQuestions, question: str, answer: str | None) -> None:
    assert likeliest(asked, question) == answer


def test_a_name_at_the_threshold_is_as_likely_there_as_not(asked: NameQuestions) -> None:
    there = dict(asked.answer("is there a harp?", torch.full((6,), 0.25)))
    assert there["yes"] == pytest.approx(0.5) and there["no"] == pytest.approx(0.5)


def test_what_is_affirmed() -> None:
    assert affirmed("Is there a French horn in the picture?", "yes") == "french horn"
    assert affirmed("are these bell peppers", "yes") == "bell peppers"
    assert affirmed("Is there a harp?", "no") is None
    assert affirmed("Is it a bee or an emu?", "yes") is None
    assert affirmed("what is this?", "yes") is None
    assert is_open("Can you tell me what this is?") and not is_open("is it a dog?")
    assert either_or("bee or emu?") and not either_or("What is on the table or the chair?")


def test_words_that_narrow_down() -> None:
    asked = [("what fruit is it?", place % 2) for place in range(20)] + [("what is it?", place) for place in range(10)]
    assert dict(kinds_of(asked, 10)) == {"fruit": (0, 1)}
