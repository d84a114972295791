"""Scores of pointing: where in a picture a phrase is, against the boxes that people drew."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from adapters.evaluation.intervals import with_interval

Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge as fractions of the picture's width and height, from its upper left corner."""
Point = tuple[float, float]

ENOUGH = 0.5  # of intersection over union
WHOLE: Box = (0.0, 0.0, 1.0, 1.0)
CENTRE: Box = (0.25, 0.25, 0.75, 0.75)


@dataclass(frozen=True)
class Located:
    """Where a model finds a phrase.

    Attributes:
        box: around all of it.
        point: inside it; the box's centre if left out.
    """

    box: Box
    point: Point | None = None

    @property
    def pointed(self) -> Point:
        """The point that counts."""
        left, top, right, bottom = self.box
        return self.point or ((left + right) / 2, (top + bottom) / 2)


def inside(point: Point, boxes: Sequence[Box]) -> bool:
    """Whether a point lies in any of the boxes, its edges included."""
    x, y = point
    return any(left <= x <= right and top <= y <= bottom for left, top, right, bottom in boxes)


def union_box(boxes: Sequence[Box]) -> Box:
    """The smallest box around all of them; ValueError if there is none."""
    lefts, tops, rights, bottoms = zip(*boxes, strict=True)
    return min(lefts), min(tops), max(rights), max(bottoms)


def intersection_over_union(first: Box, second: Box) -> float:
    """The area that both cover, over the area that either covers; 0 if neither has any."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    shared = max(width, 0.0) * max(height, 0.0)
    either = _area(first) + _area(second) - shared
    return shared / either if either else 0.0


def score_grounding(
    found: Sequence[Located],
    boxes: Sequence[Sequence[Box]],
    pictures: Sequence[Hashable],
    kinds: Sequence[str | None],
) -> dict[str, float | dict[str, dict[str, float]]]:
    """Pointing accuracy and accuracy at IoU 0.5, with what needs no model beside them.

    Pointing is right in any of a phrase's boxes (Zhang et al. 2016, arXiv 1608.00507, section 4.1, the pointing game,
    without its margin). IoU is taken with the box around all of a phrase's boxes, as Flickr30k Entities merges them
    (Plummer et al. 2015, arXiv 1505.04870), and 0.5 is enough.

    Args:
        found: where each phrase is said to be.
        boxes: where people drew it, one box or several.
        pictures: which picture each phrase is of.
        kinds: what kind of phrase each is, if that is known.

    Returns:
        "n", "pictures", "pointing" and "iou_0.5" as fractions and, if there are two pictures or more, "_low" and
        "_high" of both; then the same two scores of controls: "centre_pointing" and "centre_iou_0.5" for the box of
        half the width and height in the middle, "whole_iou_0.5" for the whole picture (its point is the centre's);
        and "by_kind".

    Raises:
        ValueError: there are no phrases, or a phrase has no box.
    """
    pointing = [inside(one.pointed, right) for one, right in zip(found, boxes, strict=True)]
    unions = [union_box(right) for right in boxes]
    overlaps = [intersection_over_union(one.box, right) >= ENOUGH for one, right in zip(found, unions, strict=True)]
    members: defaultdict[str, list[int]] = defaultdict(list)
    for row, kind in enumerate(kinds):
        if kind:
            members[kind].append(row)

    def scores(rows: Sequence[int]) -> dict[str, float]:
        shown = [pictures[row] for row in rows]
        return {
            "n": len(rows),
            **with_interval("pointing", [pointing[row] for row in rows], shown),
            **with_interval("iou_0.5", [overlaps[row] for row in rows], shown),
        }

    result: dict[str, float | dict[str, dict[str, float]]] = {"pictures": len(set(pictures))}
    result |= scores(range(len(pointing))) | controls(boxes)
    if members:
        result["by_kind"] = {
            kind: scores(rows) | controls([boxes[row] for row in rows])
            for kind, rows in sorted(members.items(), key=lambda item: -len(item[1]))
        }
    return result


def controls(boxes: Sequence[Sequence[Box]]) -> dict[str, float]:
    """What the middle of every picture, and the whole of it, score."""
    unions = [union_box(right) for right in boxes]
    centre = Located(CENTRE)
    return {
        "centre_pointing": sum(inside(centre.pointed, right) for right in boxes) / len(boxes),
        "centre_iou_0.5": sum(intersection_over_union(CENTRE, right) >= ENOUGH for right in unions) / len(boxes),
        "whole_iou_0.5": sum(intersection_over_union(WHOLE, right) >= ENOUGH for right in unions) / len(boxes),
    }


def _area(box: Box) -> float:
    return max(box[2] - box[0], 0.0) * max(box[3] - box[1], 0.0)
