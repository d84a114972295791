"""One raw row with its place in its file, and what all formats share: values in words, cells of tables."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.data.image_ref import ImageRef

LISTED = ("answers", "captions", "choices", "images", "messages", "conversations", "texts", "history")
"""Columns whose cell is a JSON list if it begins with a bracket."""
PERHAPS_LISTED = ("answer", "caption", "image")
"""The same if it is one, else text: a file may be called "[1].png"."""


@dataclass(frozen=True)
class RawRow:
    """One row: its fields, or what is wrong with it.

    Attributes:
        where: file and row, for messages.
        number: counts rows from 1, blank lines left out.
        fields: values as JSON has them; a picture that lies inside the file is an `ImageRef`.
        problem: what is wrong with the row, if it cannot be read.
        label: the field that holds the picture's class by its name, if the file says that there is one.
        pictures_in: the folder beside the file that its format keeps pictures in, if it is known to.
    """

    where: str
    number: int
    fields: dict[str, Any]
    problem: str | None = None
    label: str | None = None
    pictures_in: Path | None = None


def shorten(value: object, length: int = 50) -> str:
    """Show a value in a one-line message."""
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.encode(errors="backslashreplace").decode().split())  # a lone surrogate cannot be printed
    return text if len(text) <= length else text[: length - 1] + "…"


def place(path: Path, row: int, line: int) -> str:
    """Name a row for messages."""
    return f"{path} row {row} (line {line})"


def kind_of(value: object) -> str:
    """Name the type of a JSON value in words."""
    if isinstance(value, bool):
        return "true or false"
    if value is None:
        return "null"
    if isinstance(value, ImageRef):
        return "a picture"
    if isinstance(value, datetime.date | datetime.time):
        return "a date or time"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def known_file(names: Iterable[str]) -> str | None:
    """What is said of a well-known file that holds several lists instead of rows, by the lists' names."""
    if "questions" in names:
        return "it is VQAv2's file of questions: save it as .json, beside that of answers"
    if "annotations" in names and "images" in names:
        return "it is a file of COCO's: save it as .json"
    if "annotations" in names:
        return "it is VQAv2's file of answers: save it as .json, beside that of questions"
    return None


def unwritable(fields: Mapping[str, Any]) -> str | None:
    """What is said of a row that could not be written again: half a character, such as \\ud83d alone, or too deep."""
    for name, value in fields.items():
        if isinstance(value, ImageRef) or (isinstance(value, str) and value.isascii() and name.isascii()):
            continue
        try:
            json.dumps([[{name: value}]], ensure_ascii=False, default=str).encode()
        except RecursionError:
            return f"'{shorten(name)}' is nested too deeply: leave it out"
        except UnicodeEncodeError as error:
            half = shorten(error.object[error.start])
            return f"'{shorten(name)}' holds half a character ({half}) in {shorten(value)}: write the whole one"
    return None


def table_row(
    header: Iterable[str], cells: Iterable[Any], where: str, number: int, *, may_be_empty: Iterable[str] = ()
) -> RawRow:
    """A row of a table: an empty cell is an absent field, and a cell may hold a JSON list where a field may.

    Space around text is left out. A number without a fraction is written without one, and NaN is an empty cell, since
    tables turn whole numbers into such if one is missing.

    Args:
        header: the columns' names.
        cells: as many values.
        where: file and row, for messages.
        number: of the row.
        may_be_empty: columns in which an empty text is one, not an absent field.
    """
    header, may_be_empty = list(header), set(may_be_empty)
    fields: dict[str, Any] = {}
    for name, cell in zip(header, cells, strict=True):
        value = cell.strip() if isinstance(cell, str) else cell
        if isinstance(value, float):
            value = None if math.isnan(value) else int(value) if value.is_integer() else value
        if value is not None and (value != "" or name in may_be_empty):
            fields[name] = value
    if "question" in header and not {"question", "caption", "captions"} & fields.keys():
        fields["question"] = ""  # a table of questions lacks one here; the row is no picture alone
    for name in (*LISTED, *PERHAPS_LISTED):
        value = fields.get(name)
        if isinstance(value, str) and value.startswith("["):
            try:
                fields[name] = json.loads(value)
            except (ValueError, RecursionError):
                if name in PERHAPS_LISTED:
                    continue
                problem = f'\'{name}\' is not a JSON list: {shorten(value)}: write ["…", "…"]'
                return RawRow(where, number, {}, problem)
    return RawRow(where, number, fields)
