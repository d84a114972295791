"""Scores of short answers: exact match and its interval, the VQA accuracy of VQAv2, and what language alone scores."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Sequence

import numpy as np

from adapters.data.answers import answer_set, normalise

_ARTICLES = {"a", "an", "the"}
_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    )
} | {"none": "0"}
_SPACE_FOR = re.compile(r"[;/\[\]\"{}()=+\\_\-<>@`?!]")


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether a prediction equals one of the answers; a list answer matches as a set (DAQUAR's rule)."""
    said = answer_set(prediction)
    return any(said == answer_set(answer) for answer in answers)


def vqa_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VQAv2's accuracy: the mean over leave-one-out sets of min(matching answers / 3, 1).

    Antol et al. 2015 (arXiv 1505.00468), section 5. With a single answer it is exact match.
    """
    said = _vqa_form(prediction)
    given = [_vqa_form(answer) for answer in answers]
    if len(given) == 1:
        return float(said == given[0])
    scores = []
    for left_out in range(len(given)):
        matching = sum(said == answer for index, answer in enumerate(given) if index != left_out)
        scores.append(min(matching / 3, 1.0))
    return sum(scores) / len(scores)


def _vqa_form(answer: str) -> str:
    """The form VQAv2 compares in: lower case, punctuation and articles out, number words as digits."""
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", _SPACE_FOR.sub(" ", answer.lower().strip()))
    text = re.sub(r"(?<=\d),(?=\d)", "", text).replace(",", " ")
    words = (_NUMBERS.get(word, word) for word in text.split() if word not in _ARTICLES)
    return " ".join(words)


def score(predictions: Sequence[str], answers: Sequence[Sequence[str]]) -> dict[str, float]:
    """`exact_match` and `vqa_accuracy` as fractions, and `n`."""
    pairs = list(zip(predictions, answers, strict=True))
    return {
        "n": len(pairs),
        "exact_match": sum(exact_match(said, given) for said, given in pairs) / max(len(pairs), 1),
        "vqa_accuracy": sum(vqa_accuracy(said, given) for said, given in pairs) / max(len(pairs), 1),
    }


def interval_by_picture(
    hits: Sequence[float], pictures: Sequence[Hashable], *, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of a mean score, by drawing whole pictures anew, with all that was asked of each.

    Questions on one picture tend to be right or wrong together, so an interval that took them for independent would be
    too narrow. This is the percentile bootstrap over clusters (Davison and Hinkley 1997, Bootstrap Methods and their
    Application).

    Args:
        hits: the score of each question, from 0 to 1.
        pictures: which picture each question is on.
        draws: how often as many pictures are drawn.
        seed: of the draws.

    Raises:
        ValueError: there is no question, or not one picture for each.
    """
    grouped: dict[Hashable, list[float]] = defaultdict(list)
    for hit, picture in zip(hits, pictures, strict=True):
        grouped[picture].append(float(hit))
    if not grouped:
        raise ValueError("no questions, so no interval")
    sums = np.array([sum(each) for each in grouped.values()])
    counts = np.array([len(each) for each in grouped.values()])
    generator, even = np.random.default_rng(seed), np.full(len(sums), 1 / len(sums))
    means = []
    for start in range(0, draws, 100):  # some at a time: a large set has tens of thousands of pictures
        drawn = generator.multinomial(len(sums), even, size=min(100, draws - start))  # [100, pictures]
        means.append(drawn @ sums / (drawn @ counts))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return float(low), float(high)


def commonest_answer_score(questions: Sequence[str], answers: Sequence[Sequence[str]]) -> float:
    """Exact match of answering each question with its commonest answer in this very set: what language alone can do."""
    by_question: dict[str, Counter[str]] = defaultdict(Counter)
    for question, given in zip(questions, answers, strict=True):
        by_question[normalise(question)].update(normalise(answer) for answer in given)
    guesses = [by_question[normalise(question)].most_common(1)[0][0] for question in questions]
    return score(guesses, answers)["exact_match"]
