"""Whether one adapter is better than another on the same questions: a paired bootstrap and McNemar's exact test."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from fractions import Fraction

import numpy as np

from adapters.evaluation.intervals import interval_of


def mcnemar_exact(first_only: int, second_only: int) -> float:
    """The two-sided p of McNemar's exact test.

    McNemar 1947 (Psychometrika 12), in its exact form: of the questions that exactly one of the two answers right,
    each is as likely the first's as the second's if they are equally good. Questions on one picture are taken for
    independent here; the interval of `paired_difference` does not take them so.

    Args:
        first_only: questions that only the first answers right.
        second_only: questions that only the second answers right.
    """
    total, fewer = first_only + second_only, min(first_only, second_only)
    ways, term = 0, 1  # term: total over k
    for k in range(fewer + 1):
        ways += term
        term = term * (total - k) // (k + 1)
    return float(min(Fraction(2 * ways, 2**total), Fraction(1)))


def paired_difference(
    first: Sequence[float], second: Sequence[float], pictures: Sequence[Hashable]
) -> tuple[float, float | None, float | None]:
    """How much higher the second's mean score is than the first's on the same rows.

    Returns:
        The difference and its 95 % interval, low and high, by drawing whole pictures; no interval if there is one
        picture.

    Raises:
        ValueError: there are no rows, or not as many of each.
    """
    apart = np.array([b - a for a, b in zip(first, second, strict=True)], dtype=float)
    if not len(apart):
        raise ValueError("no rows, so no difference")
    if len(set(pictures)) < 2:
        return float(apart.mean()), None, None
    parts = np.stack([apart, np.ones(len(apart))], axis=1)  # [rows, 2]
    low, high = interval_of(parts, pictures, lambda sums: sums[:, 0] / sums[:, 1])
    return float(apart.mean()), low, high


def compare_hits(
    first: Sequence[bool], second: Sequence[bool], pictures: Sequence[Hashable]
) -> dict[str, float | None]:
    """Exact match of two adapters on the same rows.

    Returns:
        "first" and "second" as fractions; "difference", "difference_low" and "difference_high" of
        `paired_difference`; "both", "first_only", "second_only" and "neither": how many rows are answered right so;
        and "mcnemar_p".
    """
    pairs = list(zip(first, second, strict=True))
    difference, low, high = paired_difference(first, second, pictures)
    first_only, second_only = pairs.count((True, False)), pairs.count((False, True))
    return {
        "first": sum(first) / len(pairs),
        "second": sum(second) / len(pairs),
        "difference": difference,
        "difference_low": low,
        "difference_high": high,
        "both": pairs.count((True, True)),
        "first_only": first_only,
        "second_only": second_only,
        "neither": pairs.count((False, False)),
        "mcnemar_p": mcnemar_exact(first_only, second_only),
    }
