"""Questions made of captions and boxes: what all captions and boxes deny is denied, and yes and no balance."""

from __future__ import annotations

import random
from collections import Counter

from adapters.data.photo_questions import Seen, questions_about


def ask(captions: list[str], boxes: list[tuple[str, list[list[float]], str]] | None = None) -> dict[str, str]:
    found: dict[str, str] = {}
    for seed in range(20):
        found |= dict(questions_about(Seen(captions, boxes or []), random.Random(seed), Counter()))
    return found


def test_dogs_alone_are_no_persons() -> None:
    found = ask(["A dog runs on the grass .", "The brown dog is outside .", "A dog in a field ."])
    assert found["Is there a person in the picture?"] == found["Are there people in the picture?"] == "no"
    assert found["How many people are in the picture?"] == "0" and found["How many dogs are there?"] == "1"
    assert found["Is there a dog in the picture?"] == "yes"
    outside = {question: answer for question, answer in found.items() if "door" in question or "side" in question}
    assert outside and all(("in" in q.split("doors")[0][-3:]) or a in ("yes", "outdoors") for q, a in outside.items())


def test_what_one_caption_tells_otherwise_is_not_denied() -> None:
    captions = ["A dog runs .", "A dog and its owner .", "A dog ."]
    assert not {"Is there a person in the picture?", "Are there people in the picture?"} & ask(captions).keys()
    hidden = ask(["A dog .", "A dog .", "A dog ."], [("a leg", [[0.1, 0.1, 0.2, 0.2]], "bodyparts")])
    assert "Is there a person in the picture?" not in hidden


def test_sides_are_those_of_boxes_wholly_on_one_side() -> None:
    boxes = [("a red ball", [[0.6, 0.2, 0.9, 0.5]], "other"), ("a net", [[0.3, 0.2, 0.9, 0.5]], "other")]
    found = ask(["A ball ."], boxes)
    assert found["is the ball on the left or on the right?"] == "right"
    assert "is the net on the left or on the right?" not in found


def test_yes_and_no_balance() -> None:
    rng, asked = random.Random(0), Counter[str]()
    answers = Counter(
        answer
        for number in range(60)
        for question, answer in questions_about(
            Seen(["A man walks ."] * 3 if number % 3 else ["A dog runs ."] * 3), rng, asked
        )
        if "person" in question or ("people in" in question and "many" not in question)
    )
    assert abs(answers["yes"] - answers["no"]) <= 6
