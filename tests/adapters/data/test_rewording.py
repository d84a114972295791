"""Questions in other words, by rules."""

from __future__ import annotations

import random

import pytest

from adapters.data.rewording import THERE, UNSEEN, reword, reword_unseen

QUESTIONS = [
    "Is there a dog in the picture?", "Are there shoes in the picture?", "How many dogs are there?",
    "Is it a bee or an emu?", "Is this a t-shirt?", "What animal is in the picture?", "What room is this?",
    "What is the main object in the picture?", "What is this?",
]  # fmt: skip


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_question_is_asked_in_many_ways_about_the_same_things(question: str) -> None:
    rng = random.Random(0)
    asked = {reword(question, rng, kept=0.0) for _ in range(60)}
    assert len(asked) >= 3
    for thing in ("dog", "shoes", "bee", "emu", "t-shirt", "animal", "room"):
        if thing in question:
            assert all(thing in one for one in asked)


def test_some_stay_as_they_are_and_what_no_rule_knows_does() -> None:
    rng = random.Random(0)
    kept = [reword(QUESTIONS[0], rng, kept=1.0) for _ in range(5)]
    assert set(kept) == {QUESTIONS[0]}
    assert reword("Is it an animal, a vehicle, food or clothing?", rng, kept=0.0).startswith("Is it an animal, a")
    assert reword("why?", rng, kept=0.0) == "why?"


def test_wordings_to_test_with_are_never_learned() -> None:
    rng = random.Random(0)
    learned = {reword(question, rng, kept=0.0) for question in QUESTIONS for _ in range(200)}
    unseen = {reword_unseen(question, rng) for question in QUESTIONS for _ in range(50)} - {None}
    assert unseen and not unseen & learned
    assert not set(UNSEEN["there"]) & set(THERE)
