"""Whether an adapter is as often right as it is sure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BINS = 15  # as many as Guo et al. take


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
