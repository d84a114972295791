"""What is to be seen in a drawn scene, read by other rules than the generator's: answers from the words of a question,
and whether a sentence of a rationale is true."""

from __future__ import annotations

import re
from itertools import pairwise

from adapters.data.scenes.drawing import SHAPES, Scene, Thing
from adapters.data.scenes.questions import SceneQuestion


class World:
    """What a person sees, and what follows from it, told from the words of a sentence."""

    def __init__(self, scene: Scene) -> None:
        self.things = scene.things

    def all(self, words: str) -> list[Thing]:
        """Things that fit every word; "red shapes" are the red ones."""
        kinds = [word for word in words.split() if word not in ("the", "a", "an", "shape", "shapes")]
        kinds = [{f"{shape}s": shape, f"{shape}es": shape}.get(kind, kind) for kind in kinds for shape in [of(kind)]]
        return [t for t in self.things if all(kind in (t.shape, t.colour, t.size) for kind in kinds)]

    def one(self, words: str) -> Thing:
        """The only thing that fits."""
        (thing,) = self.all(words)
        return thing

    def far(self, word: str) -> Thing:
        """The thing farthest to a side, clearly so."""
        axis, most = {"leftmost": (0, min), "rightmost": (0, max), "highest": (1, min), "lowest": (1, max)}[word]
        spots = [(thing.x, thing.y)[axis] for thing in self.things]
        edge = most(spots)
        assert sum(abs(spot - edge) < 14 for spot in spots) == 1
        return self.things[spots.index(edge)]

    def beside(self, first: str, word: str, second: str) -> bool:
        """Whether a thing is left of another, and so on, clearly so or clearly not."""
        one, other = self.one(first), self.one(second)
        right, down = one.x - other.x, one.y - other.y
        moved = {"left of": -right, "right of": right, "above": -down, "below": down}[word]
        assert abs(moved) >= 14
        return moved > 0

    def answer(self, question: str) -> str:
        """The answer to a question."""

        def is_(*patterns: str) -> tuple[str, ...] | None:
            match = re.fullmatch(patterns[0], question)
            return match.groups() if match else None

        if found := is_(r"What colour is the (\w+most|highest|lowest) shape\?"):
            return self.far(found[0]).colour
        if found := is_(r"What colour is (the .+)\?"):
            return self.one(found[0]).colour
        if found := is_(r"Which shape is (\w+)\?"):
            return self.one(found[0]).shape
        if found := is_(r"Is (the .+) big or small\?"):
            assert {t.size for t in self.things} == {"big", "small"}
            return self.one(found[0]).size
        if found := is_(r"Is there (an? .+)\?"):
            return yes(self.all(found[0]))
        if found := is_(r"How many other shapes are the same colour as (the .+)\?"):
            return str(len(self.all(self.one(found[0]).colour)) - 1)
        if found := is_(r"How many (.+) are there\?"):
            return str(len(self.all(found[0])))
        if found := is_(r"Are there more (.+) than (.+)\?"):
            assert self.all(found[0]) and self.all(found[1])
            return yes(len(self.all(found[0])) > len(self.all(found[1])))
        if found := is_(r"Is (the .+) the same colour as (the .+)\?"):
            return yes(self.one(found[0]).colour == self.one(found[1]).colour)
        if found := is_(r"Is (the .+) (left of|right of|above|below) (the .+)\?"):
            return yes(self.beside(*found))
        if found := is_(r"Which is larger, (the .+) or (the .+)\?"):
            sizes = {self.one(name).size: name for name in found}
            assert len(sizes) == 2
            return sizes["big"]
        raise AssertionError(question)

    def check(self, sentence: str, before: str) -> None:
        """Assert that a sentence of a rationale is true; `before` is what stands before it."""

        def is_(pattern: str) -> tuple[str, ...] | None:
            match = re.fullmatch(pattern, sentence)
            return match.groups() if match else None

        last = before.rsplit(". ", 1)[-1].rstrip(".")  # the sentence before
        if found := is_(r"The (\w+most|highest|lowest) shape is a (\w+)\."):
            assert self.far(found[0]).shape == found[1]
        elif found := is_(r"It is (\w+)\."):
            assert self.far(last.split()[1]).colour == found[0]
        elif found := is_(r"The other (\w+) shapes are: (.+)\."):
            named = self.one(last[: last.index(" is ")].lower())
            rest = [t for t in self.all(found[0]) if t != named]
            assert found[1].split(", ") == [t.shape for t in left_to_right(rest)]
        elif found := is_(r"There are no other (\w+) shapes\."):
            assert self.all(found[0]) == [self.one(last[: last.index(" is ")].lower())]
        elif found := is_(r"The (\w+ shapes|\w+s) are: (.+)\."):
            words = [t.shape if "shapes" in found[0] else t.colour for t in left_to_right(self.all(found[0]))]
            assert found[1].split(", ") == words
        elif found := is_(r"There are no (.+)\."):
            assert not self.all(found[0])
        elif found := is_(r"That is (\d)\."):
            listed = last.partition(": ")[2]
            assert int(found[0]) == len([word for word in listed.split(", ") if word])
        elif found := is_(r"(\d) is (not )?more than (\d)\."):
            assert re.findall(r"That is (\d)", before) == [found[0], found[2]]
            assert (int(found[0]) > int(found[2])) is not bool(found[1])
        elif found := is_(r"There is an? (.+)\."):
            assert self.all(found[0])
        elif found := is_(r"There is no (.+)\."):
            assert not self.all(found[0])
        elif found := is_(r"From (left to right|top to bottom): (.+), (.+)\."):
            assert self.beside(found[1], {"l": "left of", "t": "above"}[found[0][0]], found[2])
        elif found := is_(r"So (the .+) is (not )?(left of|right of|above|below) (the .+)\."):
            assert self.beside(found[0], found[2], found[3]) is not bool(found[1])
        elif found := is_(r"Both are (\w+)\."):
            assert re.findall(r"is (\w+)\.", before) == [found[0]] * 2
        elif found := is_(r"(\w+) is not (\w+)\."):
            assert re.findall(r"is (\w+)\.", before) == [found[0].lower(), found[1]] and found[0].lower() != found[1]
        elif found := is_(r"So (the .+) is larger\."):
            assert f"{found[0]} is big" in before.lower()
        elif found := is_(r"The (\w+) shape is a (\w+)\."):
            assert self.one(found[0]).shape == found[1]
        elif found := is_(r"(The .+) is (\w+)\."):
            thing = self.one(found[0].lower())
            assert found[1] in (thing.colour, thing.size)
        else:
            raise AssertionError(sentence)


def of(word: str) -> str:
    """The shape that a plural is of, or the word."""
    return next((shape for shape in SHAPES if word in (f"{shape}s", f"{shape}es")), word)


def left_to_right(things: list[Thing]) -> list[Thing]:
    assert all(first.x <= second.x for first, second in pairwise(things))
    return things


def yes(true: object) -> str:
    return "yes" if true else "no"


def told(question: SceneQuestion) -> str:
    """The answer that the end of a rationale gives, without a look at the scene."""
    end = question.rationale.rstrip(".").rsplit(". ", 1)[-1]
    if question.answer in ("yes", "no"):
        return yes(not re.search(r"\b(not|no)\b", end))
    if question.kind == "larger":
        return end.removeprefix("So ").removesuffix(" is larger")
    return end.split()[-1]
