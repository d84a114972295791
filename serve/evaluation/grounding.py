"""Scores of finding phrases in pictures: rows of phrases with boxes, and whatever says where they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from adapters.data.bad_row import BadRow
from adapters.data.columns import look_for_columns, named_rows
from adapters.data.formats.raw_rows import RawRow, shorten
from adapters.data.image_ref import ImageRef, blank_image
from adapters.data.picture_files import Pictures
from adapters.data.sources import open_source
from adapters.evaluation.grounding import Box, Located, Point, score_grounding
from qformer.errors import UserError
from serve.looking.grounding import Grounder, Grounding

_NUMBERS = "four fractions of the picture: left, top, right and bottom, such as [0.1, 0.2, 0.5, 0.9]"


@dataclass(frozen=True)
class Phrase:
    """A phrase that is somewhere in a picture.

    Attributes:
        image: the picture.
        text: the phrase.
        boxes: where people drew it, one box or several.
        kind: what kind of phrase it is, if the row says so.
        row: its number in the file, from 1.
    """

    image: ImageRef
    text: str
    boxes: tuple[Box, ...]
    kind: str | None
    row: int


Locate = Callable[[Sequence[Phrase]], Sequence[Located]]
"""Says where each phrase is; it must not look at the phrases' boxes."""


def evaluate_grounding(
    locate: Locate,
    data: str | Path,
    *,
    controls: bool = False,
    blank_images: bool = False,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    columns: Mapping[str, str] | None = None,
    allow_outside: bool = False,
    offline: bool = False,
) -> dict[str, Any]:
    """Score where something says that phrases are.

    Args:
        locate: a model, or `boxes_of_file`.
        data: a file of rows {"image", "phrase", "boxes", "kind"}, in any format that holds lists. A box is left, top,
            right and bottom edge as fractions of the picture.
        controls: look for each phrase on a grey picture too, and for another row's phrase in each picture.
        blank_images: look on grey pictures alone.
        limit: only the first so many rows.
        skip_bad_rows: leave bad rows out, and report how many as "skipped".
        columns: the file's name of a field by ours, such as {"image": "photo"}.
        allow_outside: pictures may lie outside the data's own folder; else a row that names one is bad.
        offline: do not fetch a packaged set.

    Returns:
        What `adapters.evaluation.grounding.score_grounding` says, and "skipped"; with `controls` also
        "blank_pointing", "blank_iou_0.5", "other_phrase_pointing" and "other_phrase_iou_0.5".

    Raises:
        UserError: the data cannot be read, or a phrase was not located.
    """
    phrases, skipped = read_phrases(
        data, limit=limit, skip_bad_rows=skip_bad_rows, columns=columns, allow_outside=allow_outside, offline=offline
    )
    pictures = [phrase.image.digest() for phrase in phrases]
    boxes, kinds = [phrase.boxes for phrase in phrases], [phrase.kind for phrase in phrases]

    def scored(asked: Sequence[Phrase]) -> dict[str, Any]:
        return dict(score_grounding(locate(asked), boxes, pictures, kinds))

    blank = [replace(phrase, image=blank_image()) for phrase in phrases]
    scores = scored(blank if blank_images else phrases)
    by_kind = {"by_kind": scores.pop("by_kind")} if "by_kind" in scores else {}
    for name, asked in {"blank": blank, "other_phrase": other_phrases(phrases)}.items() if controls else ():
        without = scored(asked)
        scores |= {f"{name}_{measure}": without[measure] for measure in ("pointing", "iou_0.5")}
    return {**scores, "skipped": skipped, **by_kind}


def other_phrases(phrases: Sequence[Phrase]) -> list[Phrase]:
    """Each picture with the phrase of the row half the file away: what is said of another picture, as a rule."""
    half = len(phrases) // 2
    return [
        replace(phrase, text=other.text)
        for phrase, other in zip(phrases, [*phrases[half:], *phrases[:half]], strict=True)
    ]


def locate_with(grounder: Grounder, *, on_progress: Callable[[int, int], None] | None = None) -> Locate:
    """An adapter as what says where phrases are; each picture is read once.

    An adapter without a grounding head points, and its box is the smallest around all places that have more than half
    of the strongest one's heat.

    Args:
        grounder: the loaded adapter.
        on_progress: called with (phrases done, phrases in all).
    """

    def locate(phrases: Sequence[Phrase]) -> list[Located]:
        of_picture: dict[str, list[int]] = {}
        for place, phrase in enumerate(phrases):
            of_picture.setdefault(phrase.image.digest(), []).append(place)
        found: dict[int, Located] = {}
        for places in of_picture.values():
            said = grounder.find(phrases[places[0]].image, [phrases[place].text for place in places])
            found |= {
                place: Located(one.box or _hot_box(one), one.point) for place, one in zip(places, said, strict=True)
            }
            if on_progress is not None:
                on_progress(len(found), len(phrases))
        return [found[place] for place in range(len(phrases))]

    return locate


def _hot_box(found: Grounding) -> Box:
    """The smallest box around the places that have more than half of the strongest one's heat."""
    rows, columns = (found.heat > found.heat.max() / 2).nonzero()
    step = 1 / len(found.rows)
    left, top, right, bottom = found.seen
    across, down = (right - left) / found.size[0], (bottom - top) / found.size[1]

    def edge(first: float, share: float, place: float) -> float:
        return min(max(first + share * place, 0.0), 1.0)

    return (
        edge(left / found.size[0], across, columns.min() * step),
        edge(top / found.size[1], down, rows.min() * step),
        edge(left / found.size[0], across, (columns.max() + 1) * step),
        edge(top / found.size[1], down, (rows.max() + 1) * step),
    )


def boxes_of_file(path: str | Path) -> Locate:
    """Boxes that some model gave, from a JSONL file: {"row", "box"} and, if its point is not the centre, "point".

    "row" is the row's number in the data, from 1.

    Raises:
        UserError: the file cannot be read or a line is bad; later, a row has no line.
    """
    found: dict[int, Located] = {}
    try:
        lines = Path(path).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"--boxes {path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'})"
        ) from error
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            row = values["row"]
            if isinstance(row, bool) or not isinstance(row, int) or row in found:
                raise BadRow(f"'row' is {row!r}; give each row of the data once, by its number from 1")
            found[row] = Located(_box(values["box"]), _point(values["point"]) if "point" in values else None)
        except BadRow as error:
            raise UserError(f"--boxes {path}, line {number}: {error}") from error
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"--boxes {path}, line {number}: {shorten(line)} is not of the form"
                ' {"row": 1, "box": [0.1, 0.2, 0.5, 0.9]}'
            ) from error

    def locate(phrases: Sequence[Phrase]) -> list[Located]:
        missing = [phrase.row for phrase in phrases if phrase.row not in found]
        if missing:
            raise UserError(f"--boxes {path}: no box for row {missing[0]}; {len(missing)} of the data's rows have none")
        return [found[phrase.row] for phrase in phrases]

    return locate


def read_phrases(
    data: str | Path,
    *,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    columns: Mapping[str, str] | None = None,
    allow_outside: bool = False,
    offline: bool = False,
) -> tuple[list[Phrase], int]:
    """Read rows of phrases as `evaluate_grounding` takes them, and count the bad ones that were left out.

    Raises:
        UserError: the file cannot be read, a row is bad, or none is left.
    """
    opened = open_source(data, offline=offline)
    pictures = Pictures(opened.base, also=opened.also, allow_outside=allow_outside)
    phrases, faults = list[Phrase](), list[str]()
    if limit is not None and columns:
        look_for_columns(open_source(data, offline=offline).rows, columns)
    for row in named_rows(opened.rows, columns or {}):
        try:
            phrases.append(_phrase(row, pictures))
        except BadRow as error:
            faults.append(f"{row.where}: {error}")
        if limit is not None and len(phrases) == limit:
            break
    if faults and not (skip_bad_rows and phrases):
        advice = " (--skip-bad-rows leaves them out)" if phrases else ""
        raise UserError(f"{faults[0]}; {len(faults)} of {len(faults) + len(phrases)} rows are bad{advice}")
    if not phrases:
        raise UserError(f"{data} holds no rows: give it at least one")
    return phrases, len(faults)


def _phrase(row: RawRow, pictures: Pictures) -> Phrase:
    if row.problem is not None:
        raise BadRow(row.problem)
    image, text, boxes, kind = (row.fields.get(name) for name in ("image", "phrase", "boxes", "kind"))
    if not isinstance(image, str | ImageRef):
        raise BadRow("field 'image' is missing: name the picture")
    if not isinstance(text, str) or not text.strip():
        raise BadRow("field 'phrase' is missing or empty: write what is to be found")
    if not isinstance(boxes, list) or not boxes:
        raise BadRow(f"field 'boxes' is {shorten(boxes)}: give a list of boxes, each {_NUMBERS}")
    if kind is not None and not isinstance(kind, str):
        raise BadRow(f"field 'kind' is {shorten(kind)}: write a text, or leave it out")
    return Phrase(pictures.find(image, row.where, row.pictures_in), text, tuple(map(_box, boxes)), kind, row.number)


def _box(value: Any) -> Box:
    if not isinstance(value, list) or len(value) != 4 or not all(map(_is_fraction, value)):
        raise BadRow(f"the box {shorten(value)} is not {_NUMBERS}")
    left, top, right, bottom = map(float, value)
    if left >= right or top >= bottom:
        raise BadRow(f"the box {shorten(value)} is empty: give {_NUMBERS}")
    return left, top, right, bottom


def _point(value: Any) -> Point:
    if not isinstance(value, list) or len(value) != 2 or not all(map(_is_fraction, value)):
        raise BadRow(f"the point {shorten(value)} is not two fractions of the picture, such as [0.4, 0.5]")
    return float(value[0]), float(value[1])


def _is_fraction(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1
