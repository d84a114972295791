"""JSON files: an object a line, or a list of objects; told apart by what they begin with, not by their name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from adapters.data.formats.official import official_rows
from adapters.data.formats.raw_rows import RawRow, kind_of, place, shorten, unwritable
from adapters.data.formats.text_lines import joined, read_lines
from qformer.errors import UserError

_NOT_BLANK = re.compile(r"\S")
_ROW_FIELDS = {"image", "file_name", "question", "caption", "messages", "conversations", "instruction"}


def json_lines_rows(path: Path) -> Iterator[RawRow]:
    """JSON lines: one object a line, blank lines ignored; a list of objects is read too."""
    lines = read_lines(path)
    for first in lines:
        if first[1].strip():
            everything = chain([first], lines)
            if first[1].lstrip().startswith("["):
                return _list_rows(path, joined(path, (text for _, text in _from_line_one(everything))))
            return _object_lines(path, everything)
    return iter(())


def json_rows(path: Path) -> Iterator[RawRow]:
    """A JSON file that holds a list of objects, a well-known data set, or an object a line.

    Raises:
        UserError: it is none of these, or is broken.
    """
    text = joined(path, (line for _, line in read_lines(path)))
    start = _NOT_BLANK.search(text)
    if start is None:
        return iter(())
    if text[start.start()] == "[":
        return _list_rows(path, text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        if _begins_with_an_object(text[start.start() :]):
            return _object_lines(path, read_lines(path))
        raise UserError(f"{path} does not hold a list of rows, nor an object a line: {shorten(text)}") from None
    if isinstance(value, dict):
        if (known := official_rows(path, value)) is not None:
            return known
        lists = [name for name, found in value.items() if isinstance(found, list)]
        hint = f"save the list under '{shorten(lists[0])}' alone" if len(lists) == 1 else "JSON lines go by .jsonl"
        if not _ROW_FIELDS & value.keys() and (lists or "\n" in text.strip()):
            raise UserError(f"{path} does not hold a list of rows ({hint}): {shorten(text)}")
        return iter([_object(json.loads(text, object_pairs_hook=_fields), place(path, 1, 1), 1)])  # one row
    raise UserError(f"{path} does not hold a list of rows, but {kind_of(value)}: {shorten(text)}")


def _begins_with_an_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text.partition("\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def _from_line_one(lines: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    """Lines, with empty ones for those that came before, so that places are counted right."""
    for number, text in lines:
        yield number, "\n" * (number - 1) + text
        break
    yield from lines


def _object_lines(path: Path, lines: Iterator[tuple[int, str]]) -> Iterator[RawRow]:
    number, decoder = 0, json.JSONDecoder(object_pairs_hook=_fields)
    for line, text in lines:
        if not text.strip():
            continue
        number += 1
        where = place(path, number, line)
        try:
            yield _object(decoder.decode(text.rstrip("\r\n")), where, number)
        except json.JSONDecodeError as error:
            problem = f"broken JSON at column {error.colno} ({error.msg}): {shorten(text)}: mend the line"
            yield RawRow(where, number, {}, problem)
        except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets without end
            yield RawRow(where, number, {}, f"unreadable JSON ({shorten(str(error))}): mend the line")


def _list_rows(path: Path, text: str) -> Iterator[RawRow]:
    """The elements of a list, read one by one, so that each has its line."""
    start = _NOT_BLANK.search(text)
    assert start is not None
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
        wrong = f'the row is {kind_of(value)} ({shorten(value)}): write an object {{"image": …}}'
        return RawRow(where, number, {}, wrong)
    if isinstance(value, _Twice):
        return RawRow(where, number, value, f"field '{shorten(value.name)}' is there twice: keep one")
    problem = unwritable(value)
    return RawRow(where, number, value if problem is None else {}, problem)
