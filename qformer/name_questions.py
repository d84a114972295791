"""What a question in English asks of names that are scored: which one, whether one, which of several.

The rules look at how a question begins and at the names that it mentions; what they suggest is a hint to a language
model, which decides. Other languages have no hint.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

LONGEST = 4  # words of a name
SHARPNESS = 12.0  # of the logistic curve from a name's score, less the threshold, to how likely it is there
_WORD = re.compile(r"[^\W_]+(?:['\u2019&-][^\W_]+)*")
_OPEN = frozenset("what what's which who where how why when name describe tell write whose".split())  # noqa: SIM905
_NO_NAMES = frozenset(("who", "where", "how", "why", "when", "whose"))  # no name answers these
_FRAME = frozenset(  # what is left of a question about one thing without these is the thing
    "is are was there a an the any in this that these those it photo picture image do does you see can show visible"  # noqa: SIM905
    " here look like of pair at all".split()
)


@dataclass(frozen=True)
class NameQuestions:
    """Answers to questions from the scores of W names.

    Attributes:
        names: the W names.
        kinds: which names are ever the answer to questions with a word, such as "animal".
        threshold: the score from which on a name is taken for there.
    """

    names: tuple[str, ...]
    kinds: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    threshold: float = 0.2

    def __post_init__(self) -> None:
        places: dict[str, int] = {}
        for place, name in enumerate(self.names):
            low = name.lower()
            for form in (low, f"{low}s", f"{low}es", f"{low[:-1]}ies" if low.endswith("y") else low):
                places.setdefault(form, place)
        places |= {name.lower(): place for place, name in reversed(list(enumerate(self.names)))}
        object.__setattr__(self, "_places", places)

    def mentioned(self, question: str) -> list[int]:
        """The names that a question mentions, in its order, the longer before a shorter within it."""
        words = words_of(question)
        places: dict[str, int] = self._places  # type: ignore[attr-defined]
        found, start = [], 0
        while start < len(words):
            for stop in range(min(start + LONGEST, len(words)), start, -1):
                if (place := places.get(" ".join(words[start:stop]))) is not None:
                    found.append(place)
                    start = stop - 1
                    break
            start += 1
        return list(dict.fromkeys(found))

    def answer(self, question: str, scores: Tensor) -> list[tuple[str, float]]:
        """Likely answers to a question, each with its weight; [] if none is a name, or the question is not in English.

        Args:
            question: in words.
            scores: [W] of the names, about 0 to 1.
        """
        words = words_of(question)
        if not words or not words[0].isascii() or words[0] in _NO_NAMES:
            return []
        named = [] if words[0] in _OPEN else self.mentioned(question)
        if len(named) == 1 and "or" in words:  # it gives a choice of something else
            return []
        if len(named) == 1:
            there = torch.sigmoid(SHARPNESS * (scores[named[0]] - self.threshold)).item()
            return [("yes", there), ("no", 1 - there)]
        if named:
            best = max(named, key=lambda place: scores[place].item())
            return [(self.names[best], 1.0)]
        among = min((self.kinds[word] for word in words if word in self.kinds), key=len, default=None)
        best = among[int(scores[list(among)].argmax())] if among else int(scores.argmax())
        return [(self.names[best], min(max(scores[best].item(), 0.0), 1.0))]


def words_of(text: str) -> list[str]:
    """The words of a text, in lower case."""
    return [word.lower() for word in _WORD.findall(text)]


def affirmed(question: str, answer: str) -> str | None:
    """The thing that a question answered with yes is about; None if it is no such question."""
    words = words_of(question)
    if answer.lower() != "yes" or not words or words[0] in _OPEN or "or" in words:
        return None
    thing = [word for word in words if word not in _FRAME]
    return " ".join(thing) if 1 <= len(thing) <= LONGEST and " ".join(thing) in " ".join(words) else None


def is_open(question: str) -> bool:
    """Whether a question asks what, which, who, …"""
    return any(word in _OPEN for word in words_of(question))


def either_or(question: str) -> bool:
    """Whether a question names what its answer is one of."""
    words = words_of(question)
    return "or" in words and words[0] not in _OPEN


def kinds_of(asked: Sequence[tuple[str, int]], count: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Words of open questions that narrow the answer down, with the names that are ever answered.

    Args:
        asked: open questions, each with the number of the name that answers it.
        count: how many names there are.
    """
    answers: dict[str, set[int]] = {}
    times: dict[str, int] = {}
    for question, place in asked:
        for word in set(words_of(question)) - _FRAME - _OPEN:
            answers.setdefault(word, set()).add(place)
            times[word] = times.get(word, 0) + 1
    for word, places in sorted(answers.items()):
        if times[word] >= 20 and 2 <= len(places) <= 0.4 * count:
            yield word, tuple(sorted(places))
