"""WUPS, DAQUAR's score: answers that mean nearly the same count nearly as much."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from adapters.data.answers import normalise
from adapters.evaluation.wordnet import WordNet

THRESHOLDS = (0.9, 0.0)
_BELOW = 0.1  # what a similarity under the threshold is multiplied by


def wups(prediction: str, answers: Sequence[str], wordnet: WordNet, *, threshold: float = 0.9) -> float:
    """The WUPS score of one answer, from 0 to 1.

    Malinowski and Fritz 2014 (arXiv 1410.0210), section 4, equation 5: both answers are sets, with commas between
    their items, and each item is compared with the one most like it in the other set; the lesser of the two products
    counts. Two items are as alike as the Wu-Palmer similarity of their most similar meanings as nouns, times 0.1 below
    the threshold; equal items are alike, and items without a common meaning are not at all.

    Args:
        prediction: what was said.
        answers: the right ones; the best counts, DAQUAR has one.
        wordnet: where meanings come from.
        threshold: 0.9 or 0.0 in the paper.
    """
    said = _items(prediction)
    return max((_score(said, _items(answer), wordnet, threshold) for answer in answers), default=0.0)


def _score(said: Sequence[str], right: Sequence[str], wordnet: WordNet, threshold: float) -> float:
    alike = [[_alike(one, other, wordnet, threshold) for other in right] for one in said]
    return min(prod(max(row) for row in alike), prod(max(column) for column in zip(*alike, strict=True)))


def _alike(first: str, second: str, wordnet: WordNet, threshold: float) -> float:
    if first == second:
        return 1.0
    pairs = [(a, b) for a in wordnet.meanings(first) for b in wordnet.meanings(second)]
    best = max((wordnet.similarity(a, b) for a, b in pairs), default=0.0)
    return best if best >= threshold else _BELOW * best


def _items(answer: str) -> list[str]:
    return [normalise(item) for item in answer.split(",")]
