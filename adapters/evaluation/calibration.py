"""Whether an adapter is as often right as it is sure."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

BINS = 15  # as many as Guo et al. take
HOTTEST = 20.0  # the highest temperature that is fitted, and one over the lowest
FEWEST = 50  # answers that a temperature is fitted to
_NEAREST = 1e-6  # to 0 and 1, so that one answer that is sure and wrong does not decide alone


@dataclass(frozen=True)
class Bin:
    """Answers of about one confidence.

    Attributes:
        low: the least confidence that belongs to it, exclusive but for 0.
        high: the highest, inclusive.
        n: how many answers.
        confidence: their mean confidence.
        right: the share of them that is right.
    """

    low: float
    high: float
    n: int
    confidence: float
    right: float


def calibration_bins(confidences: Sequence[float], hits: Sequence[float], *, bins: int = BINS) -> list[Bin]:
    """Answers by confidence, in bins of equal width; bins without answers are left out.

    Raises:
        ValueError: the lists are not of one length, or a confidence is not between 0 and 1.
    """
    members: list[list[tuple[float, float]]] = [[] for _ in range(bins)]
    for confidence, hit in zip(confidences, hits, strict=True):
        if not 0 <= confidence <= 1:
            raise ValueError(f"a confidence of {confidence}: it must be between 0 and 1")
        place = next(place for place in range(bins) if confidence <= (place + 1) / bins or place == bins - 1)
        members[place].append((confidence, hit))
    return [
        Bin(
            place / bins, (place + 1) / bins, len(here),
            sum(confidence for confidence, _ in here) / len(here), sum(hit for _, hit in here) / len(here),
        )
        for place, here in enumerate(members)
        if here
    ]  # fmt: skip


def expected_calibration_error(confidences: Sequence[float], hits: Sequence[float], *, bins: int = BINS) -> float:
    """ECE: the mean, over answers, of how far their bin's share of right answers is from its mean confidence.

    Guo et al. 2017 (arXiv 1706.04599), section 2, equation 3, with 15 bins of equal width.

    Raises:
        ValueError: as `calibration_bins`, or there are no answers.
    """
    if not confidences:
        raise ValueError("no answers, so no calibration error")
    found = calibration_bins(confidences, hits, bins=bins)
    return sum(each.n * abs(each.right - each.confidence) for each in found) / len(confidences)


def tempered(log_prob: float, temperature: float) -> float:
    """The confidence of an answer: the geometric mean of its tokens' probabilities to the power of 1 / temperature.

    Args:
        log_prob: the mean log-probability of its tokens, 0 at most.
        temperature: above 1 for what is surer than it is right; 1 changes nothing.
    """
    return math.exp(log_prob / temperature)


def fit_temperature(log_probs: Sequence[float], hits: Sequence[float]) -> float:
    """The temperature with which confidences tell best which answers are right.

    Temperature scaling (Guo et al. 2017, arXiv 1706.04599, section 4.2), for answers of several tokens: it minimises
    the cross-entropy of right and wrong under `tempered`. With one number the order of answers by confidence stays.

    Args:
        log_probs: of each answer, the mean log-probability of its tokens.
        hits: 1 for each that is right, else 0.

    Raises:
        ValueError: there are fewer than `FEWEST` answers, or the lists are not of one length.
    """
    if len(log_probs) < FEWEST:
        raise ValueError(f"{len(log_probs)} answers: a temperature is fitted to {FEWEST} or more")

    def loss(log_temperature: float) -> float:
        total = 0.0
        for log_prob, hit in zip(log_probs, hits, strict=True):
            sure = min(max(tempered(log_prob, math.exp(log_temperature)), _NEAREST), 1 - _NEAREST)
            total -= hit * math.log(sure) + (1 - hit) * math.log(1 - sure)
        return total

    low, high = -math.log(HOTTEST), math.log(HOTTEST)
    grid = [low + (high - low) * place / 40 for place in range(41)]
    best = min(range(len(grid)), key=lambda place: loss(grid[place]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, 40)]
    golden = (math.sqrt(5) - 1) / 2
    for _ in range(30):  # between its neighbours there is one minimum
        one, other = high - golden * (high - low), low + golden * (high - low)
        low, high = (low, other) if loss(one) < loss(other) else (one, high)
    return math.exp((low + high) / 2)


def calibrate(log_probs: Sequence[float], hits: Sequence[float], pictures: Sequence[Hashable]) -> tuple[float, float]:
    """A temperature fitted to all answers, and the calibration error that one fitted to other pictures leaves.

    Pictures are dealt into two halves by turns. The answers on each half have the temperature of the other half.

    Args:
        log_probs: as `fit_temperature` takes them.
        hits: likewise.
        pictures: what each answer is about; answers on one picture stay together.

    Returns:
        The temperature, and the expected calibration error of answers that it was not fitted to.

    Raises:
        ValueError: there are fewer than `FEWEST` answers in a half, or the lists are not of one length.
    """
    place = {picture: number for number, picture in enumerate(dict.fromkeys(pictures))}
    halves = [[row for row, picture in enumerate(pictures) if place[picture] % 2 == half] for half in (0, 1)]
    fitted = [fit_temperature([log_probs[row] for row in rows], [hits[row] for row in rows]) for rows in halves]
    sure, right = list[float](), list[float]()
    for rows, temperature in zip(halves, reversed(fitted), strict=True):
        sure += [tempered(log_probs[row], temperature) for row in rows]
        right += [hits[row] for row in rows]
    return fit_temperature(log_probs, hits), expected_calibration_error(sure, right)
