"""The same question in other words, by rules: people do not ask as a data set's templates do.

`reword` draws one of a question's wordings. `UNSEEN` holds wordings that it never draws, to test with.
"""

from __future__ import annotations

import random
import re

WHAT = (
    "What is this?", "What's this?", "what is it", "What do you see?", "What is in the picture?", "What is shown here?",
    "What does the photo show?", "What is the main object in the picture?", "what is in this photo?",
    "Can you tell me what this is?", "what object is this",
)  # fmt: skip
WHAT_KIND = (
    "What {kind} is in the picture?", "What {kind} is this?", "what {kind} is it", "Which {kind} is shown?",
    "What {kind} do you see?", "what kind of {kind} is this?",
)  # fmt: skip
THERE = (
    "Is there {thing} in the picture?", "Is there {thing}?", "is there {thing} in this photo", "Do you see {thing}?",
    "Can you see {thing} in the picture?", "Does the picture show {thing}?", "is {thing} visible here?",
)  # fmt: skip
ARE_THERE = (
    "Are there {thing} in the picture?", "Are there any {thing}?", "do you see {thing}?", "Can you see any {thing}?",
    "are there {thing} in this photo",
)  # fmt: skip
IS_THIS = ("Is this {thing}?", "is it {thing}", "Is that {thing}?", "Does this look like {thing}?", "Is it {thing}?")
EITHER = ("Is it {one} or {other}?", "Is this {one} or {other}?", "is that {one} or {other}", "{one} or {other}?")
HOW_MANY = (
    "How many {thing} are in the picture?", "How many {thing} are there?", "how many {thing} do you see?",
    "How many {thing} can you count?", "how many {thing} are in this photo",
)  # fmt: skip
DESCRIBE = (
    "Describe this.", "describe this photo", "What is happening here?", "Describe the image in one sentence.",
    "Tell me about this picture.", "What is going on in the picture?", "Write a caption for this photo.",
)  # fmt: skip
INDOORS = ("Is this indoors?", "was this taken inside?", "Is it indoors?", "is the picture taken indoors")
OUTDOORS = ("Is this outdoors?", "was this photo taken outside?", "Is it outside?")
IN_OR_OUT = ("Is this indoors or outdoors?", "is it inside or outside?", "Was the photo taken indoors or outdoors?")
UNSEEN = {
    "what": ("What am I looking at?", "name this thing", "So what's in here?"),
    "kind": ("which {kind} can be seen here", "Name the {kind}."),
    "there": ("Any sign of {thing}?", "Could there be {thing} in here?", "I am looking for {thing}, is one here?"),
    "either": ("Would you call it {one} or {other}?",),
}
"""Wordings that `reword` never draws."""

_RULES = (
    (re.compile(r"Is there (?P<thing>.+) in the picture\?"), THERE),
    (re.compile(r"is there (?P<thing>.+) in the picture\?"), THERE),
    (re.compile(r"Are there (?P<thing>.+) in the picture\?"), ARE_THERE),
    (re.compile(r"[Hh]ow many (?P<thing>.+) are (?:in the picture|there)\?"), HOW_MANY),
    (re.compile(r"Is it (?P<one>[^,]+) or (?P<other>[^,]+)\?"), EITHER),
    (re.compile(r"Is (?:this|it) (?P<thing>[^,]+)\?"), IS_THIS),
    (re.compile(r"[Ww]hat (?P<kind>animal|vehicle|fruit|vegetable|food|musical instrument|room|place|piece of clothing)"
                r" is (?:in the picture|this)\?"), WHAT_KIND),
    (re.compile(r"What is (?:the main object )?in the picture\?|What is this\?"), WHAT),
)  # fmt: skip


def reword(question: str, rng: random.Random, *, kept: float = 0.3) -> str:
    """One of a question's wordings; the question itself if no rule knows it.

    Args:
        question: as a data set or `adapters.data.caption_questions` has it.
        rng: draws.
        kept: the share of the questions that stay as they are.
    """
    if rng.random() < kept:
        return question
    for rule, wordings in _RULES:
        if (found := rule.fullmatch(question)) is not None:
            return rng.choice(wordings).format(**found.groupdict())
    return question


def reword_unseen(question: str, rng: random.Random) -> str | None:
    """One of the wordings that `reword` never draws; None if there is none for this question."""
    for rule, wordings in _RULES:
        found = rule.fullmatch(question)
        name = {THERE: "there", WHAT_KIND: "kind", WHAT: "what", EITHER: "either"}.get(wordings)
        if found is not None and name is not None:
            return rng.choice(UNSEEN[name]).format(**found.groupdict())
    return None
