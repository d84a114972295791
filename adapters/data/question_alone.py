"""How far a question gets without its picture: if it gets far, a model may learn to answer without looking.

Three guesses, each scored on rows whose pictures it has not seen (five parts by picture): the commonest answer of all,
the commonest answer to the very question, and ridge regression from the question's words to the answer, in closed form
(Hoerl and Kennard, 1970). Counting priors this way follows Goyal et al., 2017, arXiv 1612.00837, section 1.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from adapters.data.answers import normalise
from adapters.data.examples import Example

PARTS = 5
MOST_WORDS = 1000  # the commonest are looked at
MOST_ANSWERS = 500
RIDGE = 1.0  # added to the diagonal
_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class QuestionAlone:
    """Shares of rows that are answered right without the picture.

    Attributes:
        rows: that were scored.
        commonest_answer: by the commonest answer of all.
        by_question: by the commonest answer to the same question on other pictures, else the commonest of all.
        bag_of_words: by ridge regression on the question's words.
    """

    rows: int
    commonest_answer: float
    by_question: float
    bag_of_words: float


def question_alone(examples: Sequence[Example]) -> QuestionAlone | None:
    """Score the guesses; None if there are no questions with answers, or fewer than five pictures.

    Args:
        examples: rows; of several answers of a row, the commonest counts.
    """
    rows = [
        (_words(example), _answer(example), ",".join(image.label for image in example.images))
        for example in examples
        if example.question and example.answers
    ]
    pictures = sorted({picture for _, _, picture in rows})
    if len(pictures) < PARTS:
        return None
    lots = sorted(pictures, key=lambda picture: hashlib.sha256(picture.encode(errors="replace")).digest())
    part_of = {picture: number % PARTS for number, picture in enumerate(lots)}
    counted: list[Counter[tuple[str, str]]] = [Counter() for _ in range(PARTS)]  # (question, answer) of each part
    for question, answer, picture in rows:
        counted[part_of[picture]][question, answer] += 1
    whole = sum(counted, Counter())
    hits = np.zeros(3)
    regression = _Regression(whole, counted)
    for number, part in enumerate(counted):
        answers: Counter[str] = Counter()
        to_question: dict[str, Counter[str]] = defaultdict(Counter)
        for (question, answer), count in whole.items():
            if rest := count - part[question, answer]:
                answers[answer] += rest
                to_question[question][answer] += rest
        common = _first(answers)
        asked = sorted({question for question, _ in part})
        guessed = dict(zip(asked, regression.guess(number, asked), strict=True))
        for (question, answer), count in part.items():
            known = to_question.get(question)
            guesses = (common, _first(known) if known else common, guessed[question])
            hits += [count * (guess == answer) for guess in guesses]
    shares = hits / len(rows)
    return QuestionAlone(len(rows), float(shares[0]), float(shares[1]), float(shares[2]))


class _Regression:
    """Ridge regression from words to answers, solved once for each part that is left out."""

    def __init__(self, whole: Counter[tuple[str, str]], parts: Sequence[Counter[tuple[str, str]]]) -> None:
        words = Counter(word for question, _ in whole for word in set(question.split()))
        self.words = {word: place for place, (word, _) in enumerate(words.most_common(MOST_WORDS))}
        totals: Counter[str] = Counter()
        for (_, answer), count in whole.items():
            totals[answer] += count
        self.answers = [answer for answer, _ in sorted(totals.items(), key=lambda pair: (-pair[1], pair[0]))]
        self.answers = self.answers[:MOST_ANSWERS]
        place = {answer: number for number, answer in enumerate(self.answers)}
        self.moments = [self._moments(part, place) for part in parts]

    def _moments(self, part: Counter[tuple[str, str]], place: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """Sums over a part's rows: words by words [W, W], and words by answers [W, A]."""
        questions = sorted({question for question, _ in part})
        row = {question: number for number, question in enumerate(questions)}
        weights = np.zeros(len(questions))
        targets = np.zeros((len(questions), len(self.answers)))
        for (question, answer), count in part.items():
            weights[row[question]] += count
            if answer in place:
                targets[row[question], place[answer]] += count
        features = self._features(questions)
        return features.T @ (features * weights[:, None]), features.T @ targets

    def _features(self, questions: Sequence[str]) -> np.ndarray:
        """Which words a question holds, [N, W + 1]; the last column is one."""
        found = np.zeros((len(questions), len(self.words) + 1))
        found[:, -1] = 1
        for number, question in enumerate(questions):
            found[number, [self.words[word] for word in question.split() if word in self.words]] = 1
        return found

    def guess(self, left_out: int, questions: Sequence[str]) -> list[str]:
        """The answers to questions, learned from the other parts."""
        others = [moments for number, moments in enumerate(self.moments) if number != left_out]
        gram = sum(gram for gram, _ in others) + RIDGE * np.eye(len(self.words) + 1)
        weights = np.linalg.solve(gram, sum(targets for _, targets in others))
        return [self.answers[place] for place in (self._features(questions) @ weights).argmax(axis=1)]


def _words(example: Example) -> str:
    said = " ".join((*(turn.text for turn in example.history), example.question, example.context, *example.choices))
    return " ".join(_WORD.findall(said.lower()))


def _answer(example: Example) -> str:
    return _first(Counter(normalise(answer) for answer in example.answers))


def _first(counted: Counter[str]) -> str:
    """The commonest; of several, the first by the alphabet."""
    return min(counted, key=lambda answer: (-counted[answer], answer))
