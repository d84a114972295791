"""Intervals by picture against the binomial one, and of scores that are no means against their own formula."""

from __future__ import annotations

import numpy as np
import pytest

from adapters.evaluation.intervals import interval_by_picture, interval_of, with_interval


def test_the_interval_of_pictures_with_one_question_each_is_the_binomial_one() -> None:
    hits = [1.0] * 30 + [0.0] * 70
    low, high = interval_by_picture(hits, range(100))
    error = 1.96 * (0.3 * 0.7 / 100) ** 0.5
    assert low == pytest.approx(0.3 - error, abs=0.015)
    assert high == pytest.approx(0.3 + error, abs=0.015)


def test_more_questions_on_the_same_pictures_do_not_narrow_the_interval() -> None:
    hits, pictures = [1.0] * 30 + [0.0] * 70, list(range(100))
    once = interval_by_picture(hits, pictures)
    assert interval_by_picture(hits * 10, pictures * 10) == pytest.approx(once)
    taken_for_independent = interval_by_picture(hits * 10, range(1000))
    assert taken_for_independent[1] - taken_for_independent[0] < 0.5 * (once[1] - once[0])


def test_pictures_weigh_by_their_questions() -> None:
    # one picture with three right answers, one with a wrong one: drawn anew these are 3/3, 3/4 and 0/1
    low, high = interval_by_picture([1, 1, 1, 0], ["a", "a", "a", "b"])
    assert (low, high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="so no interval"):
        interval_by_picture([], [])


def test_the_interval_of_a_ratio_of_sums() -> None:
    """Precision over five pictures, against draws that are made and combined one by one."""
    hits, said = np.array([2.0, 0, 1, 3, 1]), np.array([2.0, 2, 2, 3, 4])
    found = interval_of(np.stack([hits, said], axis=1), "abcde", lambda sums: sums[:, 0] / sums[:, 1], draws=4000)
    generator = np.random.default_rng(7)
    chosen = [generator.choice(5, size=5) for _ in range(4000)]
    ratios = [hits[rows].sum() / said[rows].sum() for rows in chosen]
    assert found == pytest.approx(np.quantile(ratios, [0.025, 0.975]), abs=0.02)


def test_rows_of_one_picture_are_drawn_together() -> None:
    rows = [[1.0], [1.0], [-1.0], [-1.0]]
    assert interval_of(rows, ["a", "b", "a", "b"], lambda sums: sums[:, 0]) == (0.0, 0.0)


def test_a_mean_with_its_interval() -> None:
    assert with_interval("recall", [1, 0], ["a", "a"]) == {"recall": 0.5}
    found = with_interval("recall", [1, 0], ["a", "b"])
    assert found == {"recall": 0.5, "recall_low": 0.0, "recall_high": 1.0}
