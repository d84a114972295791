"""From a data file to its raw rows, each with its place in the file: one function for each file format.

A new format is a function here and a line in `FORMATS`.

A row that cannot be read is yielded with what is wrong with it, so that the caller can count and report it.
What is wrong with the whole file raises a UserError at once.
"""

from __future__ import annotations

import csv
import json
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qformer.errors import UserError

# A data URI in a cell is far longer than the 128 KiB that the csv module allows by itself.
_LARGEST_CELL = 2**30
_NOT_BLANK = re.compile(r"\S")
_LISTED = ("answers", "captions", "choices", "images")  # columns whose cell is a JSON list if it begins with a bracket
_PERHAPS_LISTED = ("answer", "caption", "image")  # the same if it is one, else text: a file may be called "[1].png"


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
    text = " ".join(text.encode(errors="backslashreplace").decode().split())  # a lone surrogate cannot be printed
    return text if len(text) <= length else text[: length - 1] + "…"


def place(path: Path, row: int, line: int) -> str:
    """Name a row for messages."""
    return f"{path} row {row} (line {line})"


def jsonl_rows(path: Path) -> Iterator[RawRow]:
    """JSON lines: one object a line, blank lines ignored."""
    number, decoder = 0, json.JSONDecoder(object_pairs_hook=_fields)
    for line, text in _lines(path):
        if not text.strip():
            continue
        number += 1
        if number == 1 and text.lstrip().startswith("["):
            raise UserError(f"{path} holds a JSON list, not an object a line: name it .json")
        where = place(path, number, line)
        try:
            yield _object(decoder.decode(text.rstrip("\r\n")), where, number)
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
        raise UserError(f"{path} does not hold a list of rows ({_what_it_holds(text)}): {shorten(text)}")
    decoder = json.JSONDecoder(object_pairs_hook=_fields)
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


def _what_it_holds(text: str) -> str:
    """How to go on with a JSON file that is no list, in words."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    lists = [name for name, found in value.items() if isinstance(found, list)] if isinstance(value, dict) else []
    if other := known_file(lists):
        return other
    return f"save the list under '{shorten(lists[0])}' alone" if len(lists) == 1 else "JSON lines go by .jsonl"


def known_file(names: Iterable[str]) -> str | None:
    """What is said of a well-known file that holds several lists instead of rows, by the lists' names."""
    if "questions" in names:
        return "it is VQAv2's file of questions: write a row for each, with its picture's path and its answers"
    if "annotations" in names and "images" in names:
        return "it is a file of COCO's: write a row for each annotation, with its picture's path"
    if "annotations" in names:
        return "it is VQAv2's file of answers: write a row for each, with its question and its picture's path"
    return None


class _Lines:
    """The lines of a table as they are taken for one row; what a broken row has taken too many is given back.

    Args:
        numbered: lines with their numbers.
    """

    def __init__(self, numbered: Iterator[tuple[int, str]]) -> None:
        self._numbered = numbered
        self._given_back: deque[tuple[int, str]] = deque()
        self.taken: list[tuple[int, str]] = []  # for the row that is being read

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.taken.append(self._given_back.popleft() if self._given_back else next(self._numbered))
        return self.taken[-1][1]

    def give_back(self) -> None:
        """Let the row that is being read be its first line alone."""
        self._given_back.extendleft(reversed(self.taken[1:]))


def csv_rows(path: Path) -> Iterator[RawRow]:
    """CSV with a header; an empty cell is an absent field; answers, captions and pictures may be JSON lists.

    Space around cells is left out. A row whose quotes do not close is bad, and is its first line alone: the lines after
    it are rows again.
    """
    previous_limit = csv.field_size_limit(_LARGEST_CELL)
    try:
        lines = _Lines(_lines(path))
        reader = csv.reader(lines, strict=True, skipinitialspace=True)
        header: list[str] | None = None
        number = 0
        while True:
            lines.taken = []
            try:
                cells = next(reader, None)
            except csv.Error as error:
                first_line, text = lines.taken[0]
                if header is None:
                    raise UserError(f"{path} line {first_line}: broken CSV ({error}): mend it") from None
                lines.give_back()
                number += 1
                problem = f'broken CSV ({error}): {shorten(text)}: close the quote, and write "" for one within a cell'
                yield RawRow(place(path, number, first_line), number, {}, problem)
                continue
            if cells is None:
                return
            if not any(cell.strip() for cell in cells):
                continue
            if header is None:
                header = _csv_header(path, cells)
                continue
            number += 1
            yield _csv_row(header, cells, place(path, number, lines.taken[0][0]), number)
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
    fields: dict[str, Any] = {name: cell.strip() for name, cell in zip(header, cells, strict=True) if cell.strip()}
    if "question" in header and not {"question", "caption", "captions"} & fields.keys():
        fields["question"] = ""  # a table of questions lacks one here; the row is no picture alone
    for name in (*_LISTED, *_PERHAPS_LISTED):
        if fields.get(name, "").startswith("["):
            try:
                fields[name] = json.loads(fields[name])
            except (ValueError, RecursionError):
                if name in _PERHAPS_LISTED:
                    continue
                problem = f'\'{name}\' is not a JSON list: {shorten(fields[name])}: write ["…", "…"]'
                return RawRow(where, number, {}, problem)
    return RawRow(where, number, fields)


class _Twice(dict[str, Any]):
    """An object that names one of its fields twice."""

    name = ""


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) == len(pairs):
        return fields
    doubled = _Twice(fields)
    names = [name for name, _ in pairs]
    doubled.name = next(name for name in names if names.count(name) > 1)
    return doubled


def _object(value: object, where: str, number: int) -> RawRow:
    if not isinstance(value, dict):
        problem = f'the row is {kind_of(value)} ({shorten(value)}): write an object {{"image": …}}'
        return RawRow(where, number, {}, problem)
    if isinstance(value, _Twice):
        return RawRow(where, number, value, f"field '{shorten(value.name)}' is there twice: keep one")
    unwritable = _unwritable(value)
    return RawRow(where, number, value if unwritable is None else {}, unwritable)


def _unwritable(fields: dict[str, Any]) -> str | None:
    """What is said of a row that could not be written again: half a character, such as \\ud83d alone, or too deep."""
    for name, value in fields.items():
        if isinstance(value, str) and value.isascii() and name.isascii():
            continue
        try:
            json.dumps([[{name: value}]], ensure_ascii=False).encode()
        except RecursionError:
            return f"'{shorten(name)}' is nested too deeply: leave it out"
        except UnicodeEncodeError as error:
            half = shorten(error.object[error.start])
            return f"'{shorten(name)}' holds half a character ({half}) in {shorten(value)}: write the whole one"
    return None


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


FORMATS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    ".jsonl": jsonl_rows,
    ".json": json_rows,
    ".csv": csv_rows,
}
"""The function that reads a data file, by the ending of its name."""
