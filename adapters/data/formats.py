"""From a data file to its raw rows, each with its place in the file: one function for each file format.

A row that cannot be read is yielded with what is wrong with it, so that the caller can count and report it.
What is wrong with the whole file raises a UserError at once.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qformer.errors import UserError

# A data URI in a cell is far longer than the 128 KiB that the csv module allows by itself.
_LARGEST_CELL = 2**30
_NOT_BLANK = re.compile(r"\S")


@dataclass(frozen=True)
class RawRow:
    """One row: its fields, or what is wrong with it; `number` counts rows from 1, blank lines left out."""

    where: str
    number: int
    fields: dict[str, Any]
    problem: str | None = None


def shorten(value: object, length: int = 50) -> str:
    """Show a value in a one-line message."""
    text = value if isinstance(value, str) else repr(value)
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def place(path: Path, row: int, line: int) -> str:
    """Name a row for messages."""
    return f"{path} row {row} (line {line})"


def jsonl_rows(path: Path) -> Iterator[RawRow]:
    """JSON lines: one object a line, blank lines ignored."""
    number = 0
    for line, text in _lines(path):
        if not text.strip():
            continue
        number += 1
        if number == 1 and text.lstrip().startswith("["):
            raise UserError(f"{path} holds a JSON list, not an object a line: name it .json")
        where = place(path, number, line)
        try:
            yield _object(json.loads(text.rstrip("\r\n")), where, number)
        except json.JSONDecodeError as error:
            problem = f"broken JSON at column {error.colno} ({error.msg}): {shorten(text)}: mend the line"
            yield RawRow(where, number, {}, problem)
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets without end
            yield RawRow(where, number, {}, f"unreadable JSON ({shorten(str(error))}): mend the line")


def json_rows(path: Path) -> Iterator[RawRow]:
    """A JSON file that holds a list of objects. Its elements are read one by one, so that each has its line."""
    text = "".join(line for _, line in _lines(path))
    start = _NOT_BLANK.search(text)
    if start is None:
        return
    if text[start.start()] != "[":
        raise UserError(f"{path} does not hold a list of rows (JSON lines go by .jsonl): {shorten(text)}")
    decoder = json.JSONDecoder()
    position, number, line, counted_to = start.end(), 0, 1, 0
    while True:
        mark = _NOT_BLANK.search(text, position)
        if mark is not None and mark.group() == "]":
            if number and text[mark.end() :].strip():
                raise UserError(f"{path} goes on after its list: {shorten(text[mark.end() :])}: take that out")
            return
        if mark is not None and number:
            mark = _NOT_BLANK.search(text, mark.end()) if mark.group() == "," else None
        if mark is None:
            raise UserError(f"{path}: the list breaks off after row {number}: a comma or ']' is missing")
        line, counted_to = line + text.count("\n", counted_to, mark.start()), mark.start()
        number += 1
        where = place(path, number, line)
        try:
            value, position = decoder.raw_decode(text, mark.start())
        except json.JSONDecodeError as error:  # what follows cannot be found again: the file is broken, not a row
            near = shorten(text[error.pos : error.pos + 50]) or "the end of the file"
            raise UserError(f"{where}: broken JSON in line {error.lineno} ({error.msg}): {near}: mend it") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: unreadable JSON ({shorten(str(error))}): mend it") from None
        yield _object(value, where, number)


def csv_rows(path: Path) -> Iterator[RawRow]:
    """CSV with a header; an empty cell is an absent field; answers, captions and pictures may be JSON lists."""
    previous_limit = csv.field_size_limit(_LARGEST_CELL)
    try:
        reader = csv.reader(text for _, text in _lines(path))
        header: list[str] | None = None
        number, line = 0, 0
        while True:
            first_line = line + 1
            try:
                cells = next(reader, None)
            except csv.Error as error:
                raise UserError(f"{path} line {reader.line_num}: broken CSV ({error}): mend it") from None
            line = reader.line_num
            if cells is None:
                return
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = _csv_header(path, cells)
                continue
            number += 1
            yield _csv_row(header, cells, place(path, number, first_line), number)
    finally:
        csv.field_size_limit(previous_limit)


def _csv_header(path: Path, cells: list[str]) -> list[str]:
    header = [cell.strip() for cell in cells]
    if len(header) == 1 and re.search(r"[;\t|]", header[0]):
        raise UserError(f"{path}: its header is one cell ({shorten(header[0])}): separate the cells with commas")
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise UserError(f"{path}: its header names {', '.join(twice)} twice: rename one")
    return header


def _csv_row(header: list[str], cells: list[str], where: str, number: int) -> RawRow:
    if len(cells) != len(header):
        problem = f"{len(cells)} cells under a header of {len(header)}: put cells that hold commas in quotes"
        return RawRow(where, number, {}, problem)
    fields: dict[str, Any] = {name: cell for name, cell in zip(header, cells, strict=True) if cell.strip()}
    for name in ("answers", "captions", "choices", "images", "image"):
        if fields.get(name, "").lstrip().startswith("["):
            try:
                fields[name] = json.loads(fields[name])
            except (ValueError, RecursionError):
                if name == "image":  # a file may be called "[1].png"
                    continue
                problem = f'\'{name}\' is not a JSON list: {shorten(fields[name])}: write ["…", "…"]'
                return RawRow(where, number, {}, problem)
    return RawRow(where, number, fields)


def _object(value: object, where: str, number: int) -> RawRow:
    if isinstance(value, dict):
        return RawRow(where, number, value)
    problem = f'the row is {kind_of(value)} ({shorten(value)}): write an object {{"image": …}}'
    return RawRow(where, number, {}, problem)


def kind_of(value: object) -> str:
    """Name the type of a JSON value in words."""
    if isinstance(value, bool):
        return "true or false"
    if value is None:
        return "null"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), type(value).__name__)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Yield line numbers and lines, decoded; line ends stay, a byte-order mark does not."""
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    byte = f"byte 0x{line[error.start]:02x}"
                    raise UserError(f"{path} line {number}: not UTF-8 ({byte}): save the file as UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check the file's rights") from error
