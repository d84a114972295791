"""ANLS: the score of answers that are read from documents, which forgives a few wrong letters."""

from __future__ import annotations

from collections.abc import Sequence

THRESHOLD = 0.5  # of the normalised distance, from which on an answer counts nothing


def anls(prediction: str, answers: Sequence[str]) -> float:
    """Average normalised Levenshtein similarity of one answer: the best over the right answers.

    Biten et al. 2019 (arXiv 1905.13648), section 3.2: one less the distance NL (edits over the longer length) if that
    is below 0.5, else 0. As in the evaluation of ST-VQA and DocVQA, case and runs of blanks do not count.
    """
    said = _form(prediction)
    return max((_similarity(said, _form(answer)) for answer in dict.fromkeys(answers)), default=0.0)


def levenshtein(first: str, second: str) -> int:
    """The least number of letters put in, left out or replaced that makes one text the other."""
    row = list(range(len(second) + 1))
    for place, letter in enumerate(first, start=1):
        diagonal, row[0] = row[0], place
        for index, other in enumerate(second, start=1):
            replaced = diagonal + (letter != other)
            diagonal = row[index]
            row[index] = min(replaced, row[index] + 1, row[index - 1] + 1)
    return row[-1]


def _similarity(said: str, answer: str) -> float:
    longest = max(len(said), len(answer))
    if said == answer or not longest:
        return 1.0
    distance = levenshtein(said, answer) / longest
    return 1 - distance if distance < THRESHOLD else 0.0


def _form(text: str) -> str:
    return " ".join(text.lower().split())
