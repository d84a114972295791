"""Calibration bins and the expected calibration error, worked out by hand."""

from __future__ import annotations

import math

import pytest

from adapters.evaluation.calibration import (
    HOTTEST,
    Bin,
    calibrate,
    calibration_bins,
    expected_calibration_error,
    fit_temperature,
    tempered,
)

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


def _answers(temperature: float) -> tuple[list[float], list[float], list[int]]:
    """Mean log-probabilities of answers that are right as often as those to the power of 1 / temperature say."""
    log_probs, hits = [], []
    for place in range(40):
        sure = 0.05 + 0.9 * place / 39
        for turn in range(20):
            log_probs.append(temperature * math.log(sure))
            hits.append(float(turn < round(20 * sure)))
    return log_probs, hits, [row // 4 for row in range(len(hits))]


@pytest.mark.parametrize("temperature", [0.4, 1.0, 3.0])
def test_the_temperature_is_found_that_answers_have(temperature: float) -> None:
    log_probs, hits, pictures = _answers(temperature)
    assert fit_temperature(log_probs, hits) == pytest.approx(temperature, rel=0.05)
    fitted, error = calibrate(log_probs, hits, pictures)
    assert fitted == pytest.approx(temperature, rel=0.05) and error < 0.04
    assert tempered(log_probs[0], temperature) == pytest.approx(0.05)


def test_answers_that_are_all_right_or_too_few() -> None:
    assert fit_temperature([-1.0] * 60, [1.0] * 60) == pytest.approx(HOTTEST, rel=0.01)  # as sure as may be
    with pytest.raises(ValueError, match="49 answers"):
        fit_temperature([-1.0] * 49, [1.0] * 49)
