"""Short questions about a picture, made from its captions and answered by what they say.

After COCO-QA (Ren et al. 2015, arXiv 1505.02074, section 4.2), which asks for object, number, colour and place: an
adapter that learned captions alone has nothing to answer with. Rules over small lists of words replace its parser,
and look at all captions of a picture: what two of them tell differently is not asked. Of "is there a …?" half are
to be denied, of things that no caption names and that are as often there.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


def words_of(text: str) -> frozenset[str]:
    """The words of a text, which spaces stand between."""
    return frozenset(text.split())


COLOURS = {name: name for name in words_of("black white red blue green yellow brown orange pink purple grey tan")}
COLOURS |= {"gray": "grey"}
NUMBERS = {"two": 2, "three": 3, "four": 4, "five": 5, "six": 6}
PERSONS = ("man", "woman", "boy", "girl", "child", "baby", "person")
ANIMALS = ("dog", "puppy", "cat", "horse", "bird", "cow", "sheep", "goat", "camel", "elephant", "duck")
PLURALS = {"men": "man", "women": "woman", "children": "child", "kids": "child", "people": "person", "babies": "baby"}
PLURALS |= {f"{name}s": name for name in (*PERSONS, *ANIMALS) if name not in ("man", "woman", "child", "baby", "sheep")}
PLURALS |= {"puppies": "puppy"}
WORN = words_of("""
    shirt jacket hat dress shorts coat pants helmet uniform sweater jersey cap jeans suit vest skirt wetsuit scarf
""")
COLOURED = WORN | words_of("""
    ball collar toy frisbee car slide bike bicycle motorcycle horse bird surfboard backpack kayak umbrella boat
    building bench fence sled tent raft rope dog flower
""")
# what a caption hardly leaves out if it is there
THINGS = words_of("""
    dog cat horse bird ball frisbee bike motorcycle surfboard kayak boat bench beach pool snow skateboard swing
    guitar umbrella trampoline tent truck train car water
""")
IMPLIED = {
    "bicycle": "bike", "cyclist": "bike", "bicyclist": "bike", "biker": "bike", "puppy": "dog", "puppies": "dog",
    "snowy": "snow", "snowboarder": "snow", "skier": "snow", "surfer": "surfboard", "canoe": "boat", "raft": "boat",
    "ocean": "water", "lake": "water", "river": "water", "pool": "water", "wave": "water", "waves": "water",
    "swimming": "water", "kayak": "water", "boat": "water", "football": "ball", "basketball": "ball", "soccer": "ball",
    "baseball": "ball", "tennis": "ball", "skateboarder": "skateboard", "skateboarding": "skateboard",
    "motorbike": "motorcycle", "seagull": "bird", "duck": "bird", "bmx": "bike",
}  # fmt: skip
PLACES = {
    "beach": "on the beach", "snow": "in the snow", "water": "in the water", "field": "in a field",
    "grass": "on the grass", "street": "on the street", "sidewalk": "on the sidewalk", "pool": "in a pool",
    "park": "in a park", "ocean": "in the ocean", "yard": "in a yard", "woods": "in the woods",
    "forest": "in the woods", "bench": "on a bench", "track": "on a track", "lake": "in a lake", "river": "in a river",
    "mountain": "on a mountain", "hill": "on a hill", "road": "on a road", "path": "on a path",
    "swing": "on a swing", "playground": "on a playground", "couch": "on a couch", "sofa": "on a couch",
    "bed": "on a bed", "trampoline": "on a trampoline", "stage": "on a stage", "sand": "in the sand",
    "rocks": "on rocks", "rock": "on a rock", "ice": "on the ice", "restaurant": "in a restaurant",
    "kitchen": "in a kitchen", "office": "in an office", "boat": "in a boat", "car": "in a car",
}  # fmt: skip
ACTIONS = {
    "runs": "running", "jumps": "jumping", "stands": "standing", "sits": "sitting", "walks": "walking",
    "plays": "playing", "climbs": "climbing", "swims": "swimming", "sleeps": "sleeping", "smiles": "smiling",
    "poses": "posing", "leaps": "jumping", "leaping": "jumping", "dances": "dancing", "skis": "skiing",
    "surfs": "surfing", "laughs": "laughing", "cries": "crying", "jogs": "running",
}  # fmt: skip
DOING = frozenset(ACTIONS.values()) | words_of("""
    skateboarding snowboarding eating reading fishing digging drinking riding talking racing flying hiking
    rollerblading diving cooking painting
""")
HELD = {"holding": "holding", "holds": "holding", "carrying": "holding", "carries": "holding"}
RIDDEN = {"riding": "riding", "rides": "riding"}
_END = words_of("""
    in on at with while and as by near through down over into from to of for up off out around across along behind
    above under between against that which who is are during before after next the a an his her its their both other
""")
_ARTICLES = words_of("a an the his her its their some")
_WORD = re.compile(r"[a-z]+(?:-[a-z]+)?|[^\w\s]")


@dataclass(frozen=True)
class CaptionQuestion:
    """A question that captions answer.

    Args:
        kind: "color", "number", "animal", "who", "where", "doing", "wearing", "holding", "riding" or "there".
        question: what is asked.
        answer: a word or a few.
    """

    kind: str
    question: str
    answer: str


def questions_of(captions: Sequence[str]) -> list[CaptionQuestion]:
    """All open questions that a picture's captions answer with one voice, in a fixed order; no yes or no."""
    read = [_WORD.findall(caption.lower()) for caption in captions]
    return [
        CaptionQuestion(kind, question, next(iter(answers)))
        for kind, find in _KINDS.items()
        for question, answers in sorted(_gather(find, read).items())
        if len(answers) == 1
    ]


def choose_questions(pictures: Sequence[Sequence[str]], *, most: int, seed: int = 0) -> list[list[CaptionQuestion]]:
    """Choose questions for each picture: of different kinds, the rarer answer first, and one of yes or no.

    Args:
        pictures: each picture's captions.
        most: questions a picture, the one of yes or no among them.
        seed: decides between equals.

    Returns:
        A list for each picture, in their order; empty if its captions answer nothing.
    """
    rng = random.Random(seed)
    given: Counter[tuple[str, str]] = Counter()
    yeses: Counter[str] = Counter()
    chosen = []
    for captions in pictures:
        by_kind = defaultdict(list)
        for question in questions_of(captions):
            by_kind[question.kind].append(question)
        best = [
            min(questions, key=lambda one: (given[one.kind, one.answer], rng.random()))
            for questions in by_kind.values()
        ]
        best.sort(key=lambda one: (given[one.kind, one.answer], rng.random()))
        best = best[: most - 1]
        given.update((one.kind, one.answer) for one in best)
        chosen.append([*best, *_there(captions, yeses, rng)][:most])
    return chosen


def _there(captions: Sequence[str], yeses: Counter[str], rng: random.Random) -> Iterator[CaptionQuestion]:
    """Is there such a thing? `yeses` counts how often a thing has been affirmed more than denied."""
    words = {word for caption in captions for word in _WORD.findall(caption.lower())}
    named = {word.removesuffix("s") for word in words} | {IMPLIED[word] for word in words & IMPLIED.keys()}
    there, absent = sorted(THINGS & named), sorted(THINGS - named)
    if there and (rng.random() < 0.5 or not any(yeses[thing] > 0 for thing in absent)):
        thing, answer = min(there, key=lambda name: (yeses[name], rng.random())), "yes"
        yeses[thing] += 1
    else:
        thing, answer = max(absent, key=lambda name: (yeses[name], rng.random())), "no"
        yeses[thing] -= 1
    named_so = f"any {thing}" if thing in ("water", "snow") else f"{'an' if thing[0] in 'aeiou' else 'a'} {thing}"
    yield CaptionQuestion("there", f"is there {named_so} in the picture?", answer)


Found = Iterator[tuple[str, str]]


def _gather(find: Callable[[list[str]], Found], read: Sequence[list[str]]) -> dict[str, set[str]]:
    """Each question with every answer that some caption gives."""
    answers: dict[str, set[str]] = defaultdict(set)
    for words in read:
        for question, answer in find(words):
            answers[question].add(answer)
    return answers


def _color(words: list[str]) -> Found:
    for before, colour, thing in zip(["", *words], words, words[1:], strict=False):
        if colour in COLOURS and thing in COLOURED and before not in ("and", "or"):
            yield f"what color is the {thing}?", COLOURS[colour]


def _number(words: list[str]) -> Found:
    for place, word in enumerate(words):
        for other in words[place + 1 : place + 3]:
            if word in NUMBERS and other in PLURALS:
                yield f"how many {other} are there?", str(NUMBERS[word])
                break


def _animal(words: list[str]) -> Found:
    for word in words:
        animal = PLURALS.get(word, word)
        if animal in ANIMALS:
            yield "what animal is in the picture?", "dog" if animal == "puppy" else animal


def _who(words: list[str]) -> Found:
    subject = _subject(words)
    if subject is not None and PLURALS.get(subject, subject) in PERSONS and subject not in ("person", "people"):
        yield "who is in the picture?", subject if subject in PLURALS else f"a {subject}"


def _where(words: list[str]) -> Found:
    subject = _subject(words)
    for before, place in _phrases(words, ("in", "on", "at", "through", "down", "across", "into", "along")):
        if subject is not None and place in PLACES and before != subject:
            yield f"where {_is(subject)} the {subject}?", PLACES[place]


def _doing(words: list[str]) -> Found:
    subject = _subject(words)
    if subject is None:
        return
    after = words[words.index(subject) + 1 :]
    for before, word in zip(["", *after], after, strict=False):
        doing = ACTIONS.get(word, word)
        if doing in DOING and (word in ACTIONS or before in ("is", "are")):
            yield f"what {_is(subject)} the {subject} doing?", doing
            return


def _wearing(words: list[str]) -> Found:
    yield from _object_of(words, {"wearing": "wearing", "wears": "wearing"}, WORN)


def _holding(words: list[str]) -> Found:
    yield from _object_of(words, HELD, None)


def _riding(words: list[str]) -> Found:
    yield from _object_of(words, RIDDEN, None)


def _object_of(words: list[str], verbs: dict[str, str], known: frozenset[str] | None) -> Found:
    """What the subject wears, holds or rides: one thing, by its last word, with the colour of what is worn."""
    subject = _subject(words)
    if subject is None:
        return
    for place, word in enumerate(words[:-2]):
        if word in verbs and place > words.index(subject) and words[place + 1] in _ARTICLES:
            thing = []
            for following in words[place + 2 : place + 5]:
                participle = following.endswith("ed") and following not in COLOURS  # "shaped", "colored"
                if following in _END or following in ACTIONS or participle or not following.isalpha():
                    break
                thing.append(following)
            if thing and (known is None or thing[-1] in known) and not thing[-1].endswith("ing"):
                told = thing if known is not None and thing[0] in COLOURS else thing[-1:]
                yield f"what {_is(subject)} the {subject} {verbs[word]}?", " ".join(told)


def _phrases(words: list[str], prepositions: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The word before a preposition, and the noun that a short phrase with it ends with."""
    for place, word in enumerate(words):
        if word in prepositions:
            for end in range(place + 1, min(place + 5, len(words))):
                following = words[end + 1] if end + 1 < len(words) else "."
                if words[end] in PLACES and (following in _END or not following.isalpha()):
                    yield words[place - 1] if place else "", words[end]
                    break
                if words[end] in _END - _ARTICLES:
                    break


def _subject(words: list[str]) -> str | None:
    """Whom a caption is about: its first person or animal."""
    return next((word for word in words if word in PLURALS or word in PERSONS or word in ANIMALS), None)


def _is(subject: str) -> str:
    return "are" if subject in PLURALS else "is"


_KINDS: dict[str, Callable[[list[str]], Found]] = {
    "color": _color,
    "number": _number,
    "animal": _animal,
    "who": _who,
    "where": _where,
    "doing": _doing,
    "wearing": _wearing,
    "holding": _holding,
    "riding": _riding,
}
