"""More questions about photos with captions and boxes: who is there, how many, on which side, inside or outside.

Beside `adapters.data.caption_questions`, whose answers are words of captions. What is denied here is denied by all
captions and by all boxes of a picture.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from adapters.data.caption_questions import ANIMALS, PERSONS, PLURALS, words_of
from adapters.data.rewording import IN_OR_OUT, INDOORS, OUTDOORS

_WORD = re.compile(r"[a-z]+")
_HUMAN = words_of("""
    man men woman women boy boys girl girls child children kid kids baby babies person persons people lady ladies guy
    guys player players rider riders someone somebody crowd couple family group team surfer skier snowboarder
    skateboarder cyclist biker bicyclist climber swimmer hiker runner racer dancer musician worker toddler toddlers
    teenager teenagers adult adults male female he she his her him hand hands arm leg face father mother friends friend
    human wakeboarder diver jogger fisherman bride groom owner driver biking skateboarding tourist tourists soldier
""")
_OUTSIDE = words_of("""
    beach ocean sea snow snowy field grass grassy street sidewalk park woods forest mountain mountains hill lake river
    desert sand yard outside outdoors outdoor trail cliff sky waves wave meadow lawn sunset garden tree trees backyard
""")
_INSIDE = words_of("""
    inside indoors indoor kitchen bedroom couch sofa bed room bathroom restaurant office classroom gym living carpet
    hallway bathtub stove
""")


@dataclass(frozen=True)
class Seen:
    """What people wrote and drew of a picture.

    Attributes:
        captions: all of them.
        boxes: phrases with their boxes, each (x0, y0, x1, y1) from 0 to 1, and the phrase's kind.
    """

    captions: Sequence[str]
    boxes: Sequence[tuple[str, Sequence[Sequence[float]], str]] = ()


def questions_about(seen: Seen, rng: random.Random, asked: Counter[str]) -> Iterator[tuple[str, str]]:
    """Questions with their answers, in the wording that `adapters.data.rewording` knows.

    Args:
        seen: what people wrote and drew of the picture.
        rng: draws.
        asked: how often an answer was given, by question and answer; it balances what is asked, and is counted on.
    """
    words = [set(_WORD.findall(caption.lower())) for caption in seen.captions]
    every = set().union(*words)
    kinds = {kind for *_, kind in seen.boxes}
    if sum(bool(_HUMAN & one) for one in words) >= len(words) - 1 and _HUMAN & every:
        people = "yes"
    else:
        people = "no" if not _HUMAN & every and "people" not in kinds and "bodyparts" not in kinds else ""
    if people and _due(asked, "person", people):
        yield rng.choice(("Is there a person in the picture?", "Are there people in the picture?")), people
    if people == "no" and _due(asked, "how many people", "0", share=0.3):
        yield "How many people are in the picture?", "0"
    animals = {PLURALS.get(word, word) for word in every} & set(ANIMALS)
    if len(seen.captions) > 2 and not animals and "animals" not in kinds and _due(asked, "animal", "no"):
        yield f"Is there a {rng.choice(('dog', 'dog', 'dog', 'cat', 'horse', 'bird', 'cow'))} in the picture?", "no"
    elif len(animals) == 1 and _due(asked, "animal", "yes"):
        (animal,) = animals
        yield f"Is there a {animal.replace('puppy', 'dog')} in the picture?", "yes"
    yield from _one(words, asked)
    yield from _where(seen, rng, asked)
    yield from _inside(words, rng, asked)


def _due(asked: Counter[str], what: str, answer: str, *, share: float = 0.5) -> bool:
    """Whether an answer is not given more often than its share of all that was asked of this kind."""
    total = sum(count for key, count in asked.items() if key.startswith(f"{what}:"))
    if asked[f"{what}:{answer}"] > share * total + 2:
        return False
    asked[f"{what}:{answer}"] += 1
    return True


def _one(words: Sequence[set[str]], asked: Counter[str]) -> Iterator[tuple[str, str]]:
    """How many, if all captions tell of a single one: counting learns otherwise that there are always two or more."""
    several = {plural for plural, single in PLURALS.items() if single in (*PERSONS, *ANIMALS)}
    many = {"two", "three", "four", "five", "several", "many", "group", "another", "other", "pair", "both", "couple"}
    for thing in ("dog", "man", "boy", "girl", "woman", "horse", "bird"):
        if all(thing in one and not one & (several | many) for one in words) and _due(asked, "one", thing, share=0.4):
            plural = next(plural for plural, single in PLURALS.items() if single == thing)
            yield f"How many {plural} are there?", "1"


def _where(seen: Seen, rng: random.Random, asked: Counter[str]) -> Iterator[tuple[str, str]]:
    """On which side a thing is whose box lies on one side, if no other phrase ends with the same word."""
    ends = Counter(phrase.split()[-1] for phrase, *_ in seen.boxes)
    for phrase, boxes, kind in seen.boxes:
        thing = phrase.split()[-1].lower()
        if len(boxes) != 1 or kind in ("scene", "bodyparts", "clothing") or ends[phrase.split()[-1]] > 1:
            continue
        (x0, _, x1, _) = boxes[0]
        side = "left" if x1 < 0.5 else "right" if x0 > 0.5 else ""
        if side and thing.isalpha() and _due(asked, "side", side) and rng.random() < 0.5:
            yield f"is the {thing} on the left or on the right?", side
            return


def _inside(words: Sequence[set[str]], rng: random.Random, asked: Counter[str]) -> Iterator[tuple[str, str]]:
    outside, inside = (sum(bool(known & one) for one in words) for known in (_OUTSIDE, _INSIDE))
    if (outside >= 2) == (inside >= 2) or (inside and outside):
        return
    place = "indoors" if inside else "outdoors"
    if not _due(asked, "place", place):
        return
    wordings = rng.choice((INDOORS, OUTDOORS, IN_OR_OUT))
    answer = place if wordings is IN_OR_OUT else "yes" if (wordings is INDOORS) == (place == "indoors") else "no"
    yield rng.choice(wordings), answer
