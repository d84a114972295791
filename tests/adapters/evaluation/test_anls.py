"""ANLS and edit distances, worked out by hand."""

from __future__ import annotations

import pytest

from adapters.evaluation.anls import anls, levenshtein


@pytest.mark.parametrize(
    ("first", "second", "edits"),
    [("kitten", "sitting", 3), ("", "abc", 3), ("flaw", "lawn", 2), ("same", "same", 0), ("intention", "execution", 5)],
)
def test_edit_distances_of_textbooks(first: str, second: str, edits: int) -> None:
    assert levenshtein(first, second) == levenshtein(second, first) == edits


@pytest.mark.parametrize(
    ("said", "answers", "expected"),
    [
        ("Coca  Cola ", ["coca cola"], 1.0),
        ("coca-cola", ["coca cola"], 1 - 1 / 9),
        ("abcd", ["abxy"], 0.0),  # half of it is wrong: 0.5 is not under the threshold
        ("abcde", ["abcxy"], 1 - 2 / 5),
        ("tea", ["coffee", "teas"], 1 - 1 / 4),  # the best of the answers
        ("", ["tea"], 0.0),
        ("", [""], 1.0),
    ],
)
def test_anls_by_hand(said: str, answers: list[str], expected: float) -> None:
    assert anls(said, answers) == pytest.approx(expected)
