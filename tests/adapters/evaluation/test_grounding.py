"""Pointing and overlap, worked out by hand."""

from __future__ import annotations

import pytest

from adapters.evaluation.grounding import (
    CENTRE,
    WHOLE,
    Box,
    Located,
    controls,
    inside,
    intersection_over_union,
    score_grounding,
    union_box,
)

LEFT: Box = (0.0, 0.0, 0.5, 1.0)
TOP: Box = (0.0, 0.0, 1.0, 0.5)


def test_overlaps_by_hand() -> None:
    assert intersection_over_union(LEFT, LEFT) == 1.0
    assert intersection_over_union(LEFT, TOP) == pytest.approx(0.25 / 0.75)
    assert intersection_over_union(LEFT, (0.5, 0.0, 1.0, 1.0)) == 0.0  # they touch
    assert intersection_over_union(LEFT, WHOLE) == 0.5
    assert intersection_over_union((0.2, 0.2, 0.2, 0.2), (0.2, 0.2, 0.2, 0.2)) == 0.0


def test_boxes_and_points() -> None:
    assert union_box([(0.1, 0.2, 0.3, 0.4), (0.2, 0.1, 0.9, 0.3)]) == (0.1, 0.1, 0.9, 0.4)
    assert inside((0.5, 0.5), [(0.0, 0.0, 0.1, 0.1), (0.5, 0.5, 1.0, 1.0)])  # an edge counts
    assert not inside((0.5, 0.51), [TOP])
    assert Located(LEFT).pointed == (0.25, 0.5)
    assert Located(LEFT, (0.9, 0.9)).pointed == (0.9, 0.9)


def test_scores_by_hand() -> None:
    apart = [(0.0, 0.0, 0.2, 0.2), (0.8, 0.8, 1.0, 1.0)]  # two things in opposite corners: their union is everything
    found = [
        Located((0.0, 0.0, 0.2, 0.2)),  # points at one of them; a small part of the union
        Located(WHOLE),  # the whole is the union; its centre is in neither
        Located((0.0, 0.0, 0.25, 1.0)),  # half of LEFT: exactly 0.5
        Located((0.6, 0.0, 1.0, 1.0), (0.1, 0.1)),  # its point is right, its box is not
    ]
    scores = score_grounding(
        found, [apart, apart, [LEFT], [LEFT]], ["a", "a", "b", "b"], ["things", "things", None, "x"]
    )
    assert (scores["n"], scores["pictures"]) == (4, 2)
    assert (scores["pointing"], scores["iou_0.5"]) == (0.75, 0.5)
    assert (scores["pointing_low"], scores["pointing_high"]) == (0.5, 1.0)
    kinds = scores["by_kind"]
    assert isinstance(kinds, dict) and list(kinds) == ["things", "x"]
    assert kinds["things"] == {
        "n": 2, "pointing": 0.5, "iou_0.5": 0.5, "centre_pointing": 0.0, "centre_iou_0.5": 0.0, "whole_iou_0.5": 1.0,
    }  # fmt: skip


def test_what_needs_no_model() -> None:
    assert controls([[CENTRE], [LEFT], [(0.0, 0.0, 0.1, 0.1)], [(0.1, 0.1, 0.9, 0.9)]]) == {
        "centre_pointing": 0.75,
        "centre_iou_0.5": 0.25,  # the last: 0.25 / 0.64
        "whole_iou_0.5": 0.5,
    }
