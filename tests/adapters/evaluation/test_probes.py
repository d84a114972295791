"""POPE's scores, worked out by hand."""

from __future__ import annotations

import pytest

from adapters.evaluation.probes import plain, says_yes, score_probes


@pytest.mark.parametrize(
    ("answer", "yes"),
    [
        ("yes", True),
        ("No, there is no dog.", False),
        ("no", False),
        ("There is not", False),
        ("Yes. There is no doubt", True),  # the first sentence counts
        ("NO", False),
        ("nothing", True),  # neither word: whatever is not a no is a yes
        ("", True),
    ],
)
def test_what_counts_as_yes(answer: str, yes: bool) -> None:
    assert says_yes(answer) is yes


def test_answers_that_are_neither_are_told() -> None:
    assert plain("Yes, it is") and plain("no") and plain("it is not")
    assert not plain("nothing") and not plain("") and not plain("a dog")


def test_scores_by_hand() -> None:
    right = [True, True, True, False, False]
    said = [True, True, False, True, False]  # two hits, one missed, one false, one refused
    found = score_probes(said, right, ["a"] * 5)
    assert found == {
        "n": 5,
        "accuracy": 3 / 5,
        "precision": 2 / 3,
        "recall": 2 / 3,
        "F1": pytest.approx(2 / 3),
        "yes_rate": 3 / 5,
    }


def test_fractions_of_nothing_are_zero() -> None:
    found = score_probes([False, False], [True, False], ["a", "a"])
    assert (found["precision"], found["recall"], found["F1"], found["yes_rate"]) == (0, 0, 0, 0)
    with pytest.raises(ValueError, match="no probes"):
        score_probes([], [], [])


def test_every_score_has_its_interval() -> None:
    found = score_probes([True] * 10 + [False] * 10, ([True] * 8 + [False] * 2) * 2, list(range(20)))
    for name in ("accuracy", "precision", "recall", "F1", "yes_rate"):
        assert 0 <= found[f"{name}_low"] <= found[name] <= found[f"{name}_high"] <= 1
    assert (found["yes_rate_low"], found["yes_rate_high"]) == pytest.approx((0.3, 0.7), abs=0.06)  # binomial: ±0.22
