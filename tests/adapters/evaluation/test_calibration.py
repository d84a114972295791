"""Calibration bins and the expected calibration error, worked out by hand."""

from __future__ import annotations

import pytest

from adapters.evaluation.calibration import Bin, calibration_bins, expected_calibration_error

SURE = [0.95, 0.9, 0.85, 0.3, 0.2]
RIGHT = [1, 0, 1, 0, 1]


def test_bins_by_hand() -> None:
    low, high = calibration_bins(SURE, RIGHT, bins=2)
    assert low == Bin(0.0, 0.5, 2, pytest.approx(0.25), 0.5)
    assert high == Bin(0.5, 1.0, 3, pytest.approx(0.9), pytest.approx(2 / 3))
    assert [each.n for each in calibration_bins([0.0, 0.5, 0.51, 1.0], [1, 1, 1, 1], bins=2)] == [2, 2]  # (0.5, 1]


def test_the_error_by_hand() -> None:
    assert expected_calibration_error(SURE, RIGHT, bins=2) == pytest.approx((2 * 0.25 + 3 * (0.9 - 2 / 3)) / 5)
    assert expected_calibration_error([0.75] * 4, [1, 1, 1, 0]) == pytest.approx(0)
    assert expected_calibration_error([1.0, 1.0], [0, 0]) == 1.0


def test_what_is_no_confidence() -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        calibration_bins([1.5], [1])
    with pytest.raises(ValueError, match="no answers"):
        expected_calibration_error([], [])
