"""Scores of finding phrases in pictures: rows of phrases with boxes, and whatever says where they are."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.data.bad_row import BadRow
from adapters.data.columns import named_rows
from adapters.data.formats.raw_rows import RawRow, shorten
from adapters.data.image_ref import ImageRef
from adapters.data.rows import Pictures
from adapters.data.sources import open_source
from adapters.evaluation.grounding import Box, Located, Point, score_grounding
from qformer.errors import UserError

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
    limit: int | None = None,
    skip_bad_rows: bool = False,
    columns: Mapping[str, str] | None = None,
    offline: bool = False,
) -> dict[str, Any]:
    """Score where something says that phrases are.

    Args:
        locate: a model, or `boxes_of_file`.
        data: a file of rows {"image", "phrase", "boxes", "kind"}, in any format that holds lists. A box is left, top,
            right and bottom edge as fractions of the picture.
        limit: only the first so many rows.
        skip_bad_rows: leave bad rows out, and report how many as "skipped".
        columns: the file's name of a field by ours, such as {"image": "photo"}.
        offline: do not fetch a packaged set.

    Returns:
        What `adapters.evaluation.grounding.score_grounding` says, and "skipped".

    Raises:
        UserError: the data cannot be read, or a phrase was not located.
    """
    phrases, skipped = read_phrases(data, limit=limit, skip_bad_rows=skip_bad_rows, columns=columns, offline=offline)
    found = locate(phrases)
    pictures = [phrase.image.digest() for phrase in phrases]
    boxes, kinds = [phrase.boxes for phrase in phrases], [phrase.kind for phrase in phrases]
    scores = score_grounding(found, boxes, pictures, kinds)
    by_kind = {"by_kind": scores.pop("by_kind")} if "by_kind" in scores else {}
    return {**scores, "skipped": skipped, **by_kind}


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
    offline: bool = False,
) -> tuple[list[Phrase], int]:
    """Read rows of phrases as `evaluate_grounding` takes them, and count the bad ones that were left out.

    Raises:
        UserError: the file cannot be read, a row is bad, or none is left.
    """
    opened = open_source(data, offline=offline)
    pictures, phrases, faults = Pictures(opened.base), list[Phrase](), list[str]()
    for row in named_rows(opened.rows, columns or {}, limited=limit is not None):
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
    return Phrase(pictures.find(image, row.where), text, tuple(map(_box, boxes)), kind, row.number)


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
