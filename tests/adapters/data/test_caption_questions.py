"""Questions made from captions: what is asked, what is left alone, and that yes and no come alike."""

from __future__ import annotations

from collections import Counter

import pytest

from adapters.data.caption_questions import THINGS, choose_questions, questions_of


def asked(*captions: str) -> dict[str, str]:
    return {one.question: one.answer for one in questions_of(captions)}


@pytest.mark.parametrize(
    ("caption", "question", "answer"),
    [
        ("A man in a gray shirt sits on a bench .", "what color is the shirt?", "grey"),
        ("Three small dogs run on the beach .", "how many dogs are there?", "3"),
        ("Three small dogs run on the beach .", "where are the dogs?", "on the beach"),
        ("A puppy plays with a ball .", "what animal is in the picture?", "dog"),
        ("A woman is walking down a busy street .", "who is in the picture?", "a woman"),
        ("A woman is walking down a busy street .", "where is the woman?", "on the street"),
        ("A woman is walking down a busy street .", "what is the woman doing?", "walking"),
        ("The boy jumps .", "what is the boy doing?", "jumping"),
        ("A man wearing a red jacket stands still .", "what is the man wearing?", "red jacket"),
        ("A man holds a large tree branch over his head .", "what is the man holding?", "branch"),
        ("Two women riding a brown horse in a field .", "what are the women riding?", "horse"),
    ],
)
def test_what_a_caption_says_is_asked(caption: str, question: str, answer: str) -> None:
    assert asked(caption)[question] == answer


@pytest.mark.parametrize(
    ("captions", "question"),
    [
        (["A black dog runs .", "A brown dog runs ."], "what color is the dog?"),  # two of them, or two opinions
        (["A black and white dog runs ."], "what color is the dog?"),
        (["Two dogs run .", "Three dogs run ."], "how many dogs are there?"),
        (["A man sits on a bench .", "A man sits in a park ."], "where is the man?"),
        (["A man runs .", "The man is standing ."], "what is the man doing?"),
        (["A man wearing a smile stands ."], "what is the man wearing?"),
        (["A man holding a child stands in snow .", "A man holding a stick ."], "what is the man holding?"),
        (["A field of snow ."], "where is the man?"),
    ],
)
def test_what_captions_tell_differently_or_not_at_all_is_not_asked(captions: list[str], question: str) -> None:
    assert question not in asked(*captions)


def test_captions_that_agree_are_one_voice() -> None:
    found = asked("A black dog runs .", "The black dog is running .", "A dog runs through grass .")
    assert found["what color is the dog?"] == "black" and found["what is the dog doing?"] == "running"


def test_a_picture_gets_its_most_of_different_kinds_and_the_same_again() -> None:
    pictures = [["Two dogs run on the beach .", "A white dog holding a red ball runs ."]] * 3 + [["A view ."]]
    chosen = choose_questions(pictures, most=4)
    assert [len(each) for each in chosen] == [4, 4, 4, 1]
    for each in chosen:
        assert len({one.kind for one in each}) == len(each)
    assert chosen == choose_questions(pictures, most=4)
    assert [len(each) for each in choose_questions(pictures, most=1)] == [1] * 4
    first = [{one.question for one in each} for each in chosen[:3]]
    assert first[0] != first[1]  # what has been asked less comes first


def test_yes_and_no_are_as_often_of_each_thing_and_true() -> None:
    names = sorted(THINGS)
    pictures = [[f"A {names[place % len(names)]} and a {names[place * 7 % len(names)]} ."] for place in range(400)]
    told: dict[str, Counter[str]] = {}
    for (caption,), each in zip(pictures, choose_questions(pictures, most=4), strict=True):
        (there,) = [one for one in each if one.kind == "there"]
        (thing,) = [name for name in names if f" {name} in" in there.question]
        if there.answer == "yes":
            assert f" {thing} " in caption or thing == "water"  # which a pool implies
        else:
            assert f" {thing} " not in caption
        told.setdefault(thing, Counter())[there.answer] += 1
    total = Counter(one for each in told.values() for one in each.elements())
    assert abs(total["yes"] - total["no"]) < 40
    assert all(abs(each["yes"] - each["no"]) <= 4 for each in told.values())


def test_what_is_implied_is_not_denied() -> None:
    pictures = [["A surfer rides a wave ."], ["Skiers on a snowy hill ."], ["A cyclist in a race ."]] * 60
    denied = [
        (caption, one.question)
        for (caption,), each in zip(pictures, choose_questions(pictures, most=1), strict=True)
        for one in each
        if one.answer == "no"
    ]
    assert denied
    assert not [pair for pair in denied if "surfer" in pair[0] and ("water" in pair[1] or "surfboard" in pair[1])]
    assert not [pair for pair in denied if "cyclist" in pair[0] and "bike" in pair[1]]
    assert not [pair for pair in denied if "snowy" in pair[0] and "snow in" in pair[1]]
