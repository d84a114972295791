"""The paired test and the paired difference, against values worked out by hand and by counting all cases."""

from __future__ import annotations

from itertools import product

import pytest

from adapters.evaluation.comparison import compare_hits, mcnemar_exact, paired_difference


@pytest.mark.parametrize(("first", "second"), [(0, 0), (1, 0), (3, 3), (1, 6), (9, 2), (0, 10)])
def test_mcnemar_by_counting_all_cases(first: int, second: int) -> None:
    """How many of the equally likely ways that the questions could fall are at least as one-sided as this one."""
    total, apart = first + second, abs(first - second)
    ways = [sum(case) for case in product((0, 1), repeat=total)]
    as_far = sum(abs(total - 2 * one) >= apart for one in ways)
    assert mcnemar_exact(first, second) == pytest.approx(as_far / len(ways))


def test_mcnemar_of_thousands() -> None:
    assert mcnemar_exact(5000, 5000) == 1.0
    # the normal approximation with its correction: z = (|b - c| - 1) / sqrt(b + c) = 2.99, p = 0.0028
    assert mcnemar_exact(4850, 5150) == pytest.approx(0.0028, abs=0.0002)


def test_the_difference_and_its_interval() -> None:
    value, low, high = paired_difference([0] * 40, [1] * 10 + [0] * 30, range(40))
    assert value == 0.25
    assert (low, high) == pytest.approx((0.25 - 0.134, 0.25 + 0.134), abs=0.03)  # 1.96 √(0.25 · 0.75 / 40)
    assert paired_difference([1, 0], [1, 1], ["a", "a"]) == (0.5, None, None)
    assert paired_difference([1, 1, 0, 0], [1, 1, 0, 0], "abcd") == (0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="no rows"):
        paired_difference([], [], [])


def test_counts_of_two_adapters() -> None:
    found = compare_hits([True, True, False, False, False], [True, False, True, True, False], "abcde")
    assert (found["first"], found["second"], found["difference"]) == (0.4, 0.6, pytest.approx(0.2))
    assert (found["both"], found["first_only"], found["second_only"], found["neither"]) == (1, 1, 2, 1)
    assert found["mcnemar_p"] == 1.0
