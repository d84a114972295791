"""Tables as text: cells between commas, semicolons or tabs, told by the header; UTF-8 or UTF-16."""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from adapters.data.formats.raw_rows import RawRow, place, shorten, table_row
from adapters.data.formats.text_lines import read_lines
from qformer.errors import UserError

# A data URI in a cell is far longer than the 128 KiB that the csv module allows by itself.
_LARGEST_CELL = 2**30
_SEPARATORS = (",", ";", "\t", "|")  # the first is taken if several would do
_MADE_FRACTION = re.compile(r"[+-]?\d+\.0")
_NAMED = re.compile(r"sep=(.)\s*")  # Excel's own first line


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


def delimited_rows(path: Path) -> Iterator[RawRow]:
    """A table with a header; an empty cell is an absent field; answers, captions and pictures may be JSON lists.

    The separator is the one that cuts the header into most cells, or what a first line `sep=;` names. Space around
    cells is left out. A row whose quotes do not close is bad, and is its first line alone: the lines after it are rows
    again. Whole numbers are written without the fraction that pandas gives them in a column with an empty cell.
    """
    previous_limit = csv.field_size_limit(_LARGEST_CELL)
    try:
        whole = _made_fractions(path) if path.is_file() else frozenset()
        yield from _rows(path, *_separated(read_lines(path)), whole)
    finally:
        csv.field_size_limit(previous_limit)


def _made_fractions(path: Path) -> frozenset[str]:
    """Columns of whole numbers that pandas wrote as 3.0, for it has no whole number beside a missing one."""
    numbered, separator = _separated(read_lines(path))
    rows = csv.reader(
        (text for _, text in numbered), delimiter=separator, strict=True, skipinitialspace=separator != "\t"
    )
    header: list[str] = []
    perhaps, empty, filled = set[int](), set[int](), set[int]()  # columns
    try:
        for cells in rows:
            if not header and any(cell.strip() for cell in cells):
                header, perhaps = [cell.strip() for cell in cells], set(range(len(cells)))
            elif len(cells) == len(header) and any(cells):
                for place in list(perhaps):
                    cell = cells[place].strip()
                    (filled if cell else empty).add(place)
                    if cell and not _MADE_FRACTION.fullmatch(cell):
                        perhaps.discard(place)
                if not perhaps:
                    break
    except csv.Error:  # told when the row is read; what follows it is not known
        return frozenset()
    return frozenset(header[place] for place in perhaps & empty & filled)


def _separated(numbered: Iterator[tuple[int, str]]) -> tuple[Iterator[tuple[int, str]], str]:
    """The lines from the header on, and what separates their cells."""
    before: list[tuple[int, str]] = []
    for number, text in numbered:
        if not before and (named := _NAMED.fullmatch(text)):
            return numbered, named[1]
        before.append((number, text))
        if text.strip():
            break
    rest = _chain(before, numbered)
    return rest, max(_SEPARATORS, key=lambda mark: _cells(before[-1][1], mark)) if before else ","


def _chain(before: list[tuple[int, str]], rest: Iterator[tuple[int, str]]) -> Iterator[tuple[int, str]]:
    yield from before
    yield from rest


def _cells(line: str, separator: str) -> int:
    try:
        return len(next(csv.reader([line], delimiter=separator, skipinitialspace=True), []))
    except csv.Error:
        return 0


def _rows(path: Path, numbered: Iterator[tuple[int, str]], separator: str, whole: frozenset[str]) -> Iterator[RawRow]:
    lines = _Lines(numbered)
    reader = csv.reader(lines, delimiter=separator, strict=True, skipinitialspace=separator != "\t")
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
            header = checked_header(path, cells)
            continue
        number += 1
        where = place(path, number, lines.taken[0][0])
        if len(cells) != len(header):
            mark = {",": "commas", ";": "semicolons", "\t": "tabs"}.get(separator, f"'{separator}'")
            problem = f"{len(cells)} cells under a header of {len(header)}: put cells that hold {mark} in quotes"
            yield RawRow(where, number, {}, problem)
        else:
            if whole:
                cells = [
                    cell.strip().removesuffix(".0") if name in whole else cell
                    for name, cell in zip(header, cells, strict=True)
                ]
            yield table_row(header, cells, where, number)


def checked_header(path: Path, cells: list[str]) -> list[str]:
    """The names of a table's columns.

    Raises:
        UserError: one is there twice.
    """
    header = [cell.strip() for cell in cells]
    twice = sorted({name for name in header if name and header.count(name) > 1})
    if twice:
        raise UserError(f"{path}: its header names {', '.join(twice)} twice: rename one")
    return header
