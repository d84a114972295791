"""Questions about a drawn scene, each with the steps to its answer and the answer, which are exact.

A question names a thing by the fewest words that only one thing answers to, and never by what is asked. "Left of" and
the like are asked only of centres well apart. Lists in a rationale go from left to right. Each rationale is the
reasoning in its own order, a sentence a step: what is seen, what follows from it, so that its end gives the answer
(two-stage chain of thought, Zhang et al. 2023, arXiv 2302.00923).
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

from adapters.data.scenes.drawing import COLOURS, RADIUS, SHAPES, Scene, Thing

CLEAR = 14  # pixels between two centres that a question distinguishes; more than the sizes' difference
YES_NO = ("yes", "no")
_SLACK, _SPARE = 1.25, 2  # an answer may be so many times as common as the rarest of its kind, and so many more
Named = tuple[str, Thing]

PLURAL = {shape: "crosses" if shape == "cross" else f"{shape}s" for shape in SHAPES}


@dataclass(frozen=True)
class SceneQuestion:
    """A question about a scene.

    Args:
        kind: one of `KINDS`.
        steps: sentences of the rationale; 1 is to look, more are to reason.
        question: what is asked.
        rationale: the steps to the answer.
        answer: one of the choices.
        choices: what may be answered. They do not depend on the scene but for the two things that "larger" names.
    """

    kind: str
    steps: int
    question: str
    rationale: str
    answer: str
    choices: tuple[str, ...]


class Balance:
    """Counts the answers given, and chooses the question whose answer has been the rarest.

    So a kind's answers come out about equally often (at most 5/4 of the rarest and 2 more), and so do, as far as they
    can, the answers to each question's very words: what language alone can guess is little more than chance. An
    answer is counted as its place among the choices. A scene that has only answers which are too common is not asked
    a question of that kind.
    """

    def __init__(self) -> None:
        self._kinds: Counter[tuple[str, int]] = Counter()
        self._words: Counter[tuple[str, int]] = Counter()

    def choose(self, candidates: Sequence[SceneQuestion], rng: random.Random) -> SceneQuestion | None:
        """Choose one of the questions, which are of one kind; None if each answer is too common already."""
        if not candidates:
            return None
        kind, slots = candidates[0].kind, range(len(candidates[0].choices))
        placed = [(question, question.choices.index(question.answer)) for question in candidates]
        rarest = min(self._kinds[kind, place] for _, place in placed)
        if rarest + 1 > _SLACK * min(self._kinds[kind, place] for place in slots) + _SPARE:
            return None
        fair = [(question, place) for question, place in placed if self._kinds[kind, place] == rarest]
        surplus = [self._surplus(question, place) for question, place in fair]
        chosen, place = rng.choice([entry for entry, over in zip(fair, surplus, strict=True) if over == min(surplus)])
        self._kinds[kind, place] += 1
        self._words[chosen.question, place] += 1
        return chosen

    def _surplus(self, question: SceneQuestion, place: int) -> float:
        """How much more often than its share the answer has been given to these words."""
        given = [self._words[question.question, other] for other in range(len(question.choices))]
        return given[place] - sum(given) / len(given)


def questions_of(scene: Scene, rng: random.Random, balance: Balance | None = None) -> list[SceneQuestion]:
    """Choose a question of each kind that the scene allows.

    Args:
        scene: what is asked about.
        rng: decides between equals.
        balance: the answers given so far, which it also counts these into; None starts a new count.
    """
    balance = balance or Balance()
    chosen = (balance.choose(list(make(scene)), rng) for make in KINDS.values())
    return [question for question in chosen if question is not None]


def _ask(kind: str, question: str, steps: Sequence[str], answer: str | bool, choices: Sequence[str]) -> SceneQuestion:
    said = answer if isinstance(answer, str) else YES_NO[not answer]
    return SceneQuestion(kind, len(steps), question, " ".join(steps), said, tuple(choices))


def _named(scene: Scene, *, hidden: Sequence[str] = ()) -> list[Named]:
    """Things with a name that no other answers to, such as "the star" or "the big star".

    Args:
        scene: all things.
        hidden: "colour" or "size", which is not to be named.
    """
    forms = [("shape",), ("colour", "shape"), ("size", "shape"), ("size", "colour", "shape")]
    forms = [form for form in forms if not set(form) & set(hidden)]
    named = []
    for thing in scene.things:
        for form in forms:
            words = [getattr(thing, part) for part in form]
            if sum(words == [getattr(other, part) for part in form] for other in scene.things) == 1:
                named.append((f"the {' '.join(words)}", thing))
                break
    return named


def _plainest(pairs: Iterable[tuple[Named, Named]]) -> list[tuple[Named, Named]]:
    """The pairs of the fewest words, so that the same words are asked of many scenes, with other answers."""
    found = list(pairs)
    words = [len(f"{first[0]} {second[0]}".split()) for first, second in found]
    return [pair for pair, length in zip(found, words, strict=True) if length == min(words)]


def _colour(scene: Scene) -> Iterator[SceneQuestion]:
    for name, thing in _named(scene, hidden=["colour"]):
        yield _ask("colour", f"What colour is {name}?", [f"{_begin(name)} is {thing.colour}."], thing.colour, _COLOURS)


def _shape(scene: Scene) -> Iterator[SceneQuestion]:
    for colour, number in Counter(thing.colour for thing in scene.things).items():
        if number == 1:
            shape = next(thing.shape for thing in scene.things if thing.colour == colour)
            yield _ask("shape", f"Which shape is {colour}?", [f"The {colour} shape is a {shape}."], shape, SHAPES)


def _size(scene: Scene) -> Iterator[SceneQuestion]:
    if len({thing.size for thing in scene.things}) == 2:  # else there is nothing to measure by
        for name, thing in _named(scene, hidden=["size"]):
            yield _ask("size", f"Is {name} big or small?", [f"{_begin(name)} is {thing.size}."], thing.size, _SIZES)


def _exists(scene: Scene) -> Iterator[SceneQuestion]:
    """Of a colour and a shape that are both there, together or not."""
    pairs = {(thing.colour, thing.shape) for thing in scene.things}
    for colour in _present(scene, "colour"):
        for shape in _present(scene, "shape"):
            there = (colour, shape) in pairs
            thing = f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {shape}"
            step = f"There is {thing}." if there else f"There is no {colour} {shape}."
            yield _ask("exists", f"Is there {thing}?", [step], there, YES_NO)


def _count(scene: Scene) -> Iterator[SceneQuestion]:
    for kind in _KINDS_OF_THINGS:
        steps, number = _counted(scene, kind)
        if number < len(_COUNTS):
            yield _ask("count", f"How many {_plural(kind)} are there?", steps, str(number), _COUNTS)


def _count_same_colour(scene: Scene) -> Iterator[SceneQuestion]:
    for name, thing in _named(scene, hidden=["colour"]):
        alike = [other.shape for other in scene.things if other.colour == thing.colour and other is not thing]
        if len(alike) < len(_FEW):
            listed = f"The other {thing.colour} shapes are: {', '.join(alike)}."
            step = listed if alike else f"There are no other {thing.colour} shapes."
            steps = [f"{_begin(name)} is {thing.colour}.", step, f"That is {len(alike)}."]
            question = f"How many other shapes are the same colour as {name}?"
            yield _ask("count_same_colour", question, steps, str(len(alike)), _FEW)


def _compare_counts(scene: Scene) -> Iterator[SceneQuestion]:
    for part in ("colour", "shape"):
        for first, second in permutations(_present(scene, part), 2):
            (steps, more), (others, fewer) = _counted(scene, (part, first)), _counted(scene, (part, second))
            told = f"{more} is {'' if more > fewer else 'not '}more than {fewer}."
            question = f"Are there more {_plural((part, first))} than {_plural((part, second))}?"
            yield _ask("compare_counts", question, [*steps, *others, told], more > fewer, YES_NO)


def _position(scene: Scene) -> Iterator[SceneQuestion]:
    for (name, thing), (other_name, other) in _plainest(permutations(_named(scene), 2)):
        for axis, along, before, after in (("x", "left to right", "left of", "right of"), _DOWN):
            gap = getattr(other, axis) - getattr(thing, axis)
            if abs(gap) >= CLEAR:
                order = [name[4:], other_name[4:]] if gap > 0 else [other_name[4:], name[4:]]
                for word, true in ((before, gap > 0), (after, gap < 0)):
                    so = f"So {name} is {'' if true else 'not '}{word} {other_name}."
                    steps = [f"From {along}: {', '.join(order)}.", so]
                    yield _ask("position", f"Is {name} {word} {other_name}?", steps, true, YES_NO)


def _same_colour(scene: Scene) -> Iterator[SceneQuestion]:
    for (name, thing), (other_name, other) in combinations(_named(scene, hidden=["colour"]), 2):
        same = thing.colour == other.colour
        last = f"Both are {thing.colour}." if same else f"{thing.colour.title()} is not {other.colour}."
        steps = [f"{_begin(name)} is {thing.colour}.", f"{_begin(other_name)} is {other.colour}.", last]
        yield _ask("same_colour", f"Is {name} the same colour as {other_name}?", steps, same, YES_NO)


def _extreme(scene: Scene) -> Iterator[SceneQuestion]:
    for word, axis, sign in (("leftmost", "x", 1), ("rightmost", "x", -1), ("highest", "y", 1), ("lowest", "y", -1)):
        first, second = sorted(scene.things, key=lambda thing: sign * getattr(thing, axis))[:2]
        if sign * (getattr(second, axis) - getattr(first, axis)) >= CLEAR:
            steps = [f"The {word} shape is a {first.shape}.", f"It is {first.colour}."]
            yield _ask("extreme", f"What colour is the {word} shape?", steps, first.colour, _COLOURS)


def _larger(scene: Scene) -> Iterator[SceneQuestion]:
    pairs = permutations(_named(scene, hidden=["size"]), 2)
    for (name, thing), (other_name, other) in _plainest(pair for pair in pairs if pair[0][1].size != pair[1][1].size):
        larger = name if thing.size == "big" else other_name
        told = [f"{_begin(name)} is {thing.size}.", f"{_begin(other_name)} is {other.size}."]
        question = f"Which is larger, {name} or {other_name}?"
        yield _ask("larger", question, [*told, f"So {larger} is larger."], larger, (name, other_name))


def _counted(scene: Scene, kind: tuple[str, str]) -> tuple[list[str], int]:
    """The things of a kind listed and counted: two steps, and the number."""
    part, value = kind
    other = "shape" if part == "colour" else "colour"
    found = [getattr(thing, other) for thing in scene.things if getattr(thing, part) == value]
    listed = f"The {_plural(kind)} are: {', '.join(found)}." if found else f"There are no {_plural(kind)}."
    return [listed, f"That is {len(found)}."], len(found)


def _plural(kind: tuple[str, str]) -> str:
    return PLURAL[kind[1]] if kind[0] == "shape" else f"{kind[1]} shapes"


def _present(scene: Scene, part: str) -> list[str]:
    """The colours or shapes of a scene, in an order that does not tell which is the most."""
    return sorted({getattr(thing, part) for thing in scene.things})


def _begin(name: str) -> str:
    return name[0].upper() + name[1:]


_COLOURS = tuple(COLOURS)
_SIZES = tuple(RADIUS)
_COUNTS = tuple(str(number) for number in range(6))
_FEW = _COUNTS[:4]
_DOWN = ("y", "top to bottom", "above", "below")
_KINDS_OF_THINGS = [("colour", colour) for colour in COLOURS] + [("shape", shape) for shape in SHAPES]

KINDS: dict[str, Callable[[Scene], Iterator[SceneQuestion]]] = {
    "colour": _colour,
    "shape": _shape,
    "size": _size,
    "exists": _exists,
    "count": _count,
    "count_same_colour": _count_same_colour,
    "compare_counts": _compare_counts,
    "position": _position,
    "same_colour": _same_colour,
    "extreme": _extreme,
    "larger": _larger,
}
