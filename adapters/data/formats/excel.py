"""Excel's tables (.xlsx): the one sheet that holds something, with a header."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any

from adapters.data.formats.delimited import checked_header
from adapters.data.formats.raw_rows import RawRow, place, shorten, table_row
from qformer.errors import UserError

_LARGEST_PART = 256 * 2**20  # bytes of a sheet: a million short rows are 100 MB
# What openpyxl, zipfile, zlib and the XML parser raise where a file is damaged; they say so in no other way.
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, struct.error, SyntaxError, OSError, EOFError, LookupError, ValueError, TypeError,
    AttributeError, NotImplementedError, RuntimeError, OverflowError, MemoryError,
)  # fmt: skip


def xlsx_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a workbook; a formula is read as the value that Excel has saved with it.

    Raises:
        UserError: it is damaged or none, or several of its sheets hold something.
    """
    from openpyxl import load_workbook
    from openpyxl.utils.exceptions import InvalidFileException

    _check_unpacked(path)
    try:
        book = load_workbook(path, read_only=True, data_only=True)
    except (InvalidFileException, *_DAMAGED) as error:
        raise UserError(
            f"{path} cannot be read as an Excel file ({shorten(str(error), 100)}): save it again as .xlsx or .csv"
        ) from error
    try:
        filled = [(sheet, rows) for sheet in book.worksheets if (rows := _filled(sheet)) is not None]
        if len(filled) > 1:
            names = ", ".join(sheet.title for sheet, _ in filled)
            raise UserError(f"{path}: several sheets hold something ({names}): keep one, or save each as .csv")
        for _, rows in filled:
            yield from _sheet_rows(path, rows)
    except _DAMAGED as error:
        raise UserError(f"{path} is damaged ({shorten(str(error), 100)}): save it again as .xlsx or .csv") from error
    finally:
        book.close()


def refuse_xls(path: Path) -> Iterator[RawRow]:
    """What is said of the workbooks of Excel 2003 and older (.xls)."""
    raise UserError(f"{path}: '.xls' data files are not read: save it as .xlsx")


def _check_unpacked(path: Path) -> None:
    """See that no part of a workbook, which is a zip archive, unpacks to more than a table of people holds."""
    with suppress(*_DAMAGED), zipfile.ZipFile(path) as archive:  # damage is told where the workbook is opened
        for part in archive.infolist():
            if part.file_size > _LARGEST_PART:
                raise UserError(
                    f"{path}: {shorten(part.filename)} in it unpacks to {part.file_size >> 20} MiB, over the"
                    f" {_LARGEST_PART >> 20} MiB that are read: save it as .csv"
                )


def _filled(sheet: Any) -> Iterator[tuple[int, Any]] | None:
    """The numbered rows of a sheet from the first that holds something; None if none does."""
    rows = enumerate(sheet.iter_rows(), start=1)
    for number, cells in rows:
        if any(cell.value is not None for cell in cells):
            return chain([(number, cells)], rows)
    return None


def _sheet_rows(path: Path, rows: Iterator[tuple[int, Any]]) -> Iterator[RawRow]:
    _, first = next(rows)
    names = ["" if cell.value is None else str(cell.value) for cell in first]
    while names and not names[-1]:
        names.pop()
    header = checked_header(path, names)
    number = 0
    for line, cells in rows:
        if not any(cell.value is not None for cell in cells):
            continue
        number += 1
        where = place(path, number, line)
        broken = next((cell for cell in cells if cell.data_type == "e"), None)
        beyond = next((cell for cell in cells[len(header) :] if cell.value is not None), None)
        if broken is not None:
            problem = f"cell {broken.coordinate} holds the error {broken.value}: mend its formula"
            yield RawRow(where, number, {}, problem)
        elif beyond is not None:
            yield RawRow(where, number, {}, f"cell {beyond.coordinate} has no name above it: name its column")
        else:
            values = [cell.value for cell in cells[: len(header)]]
            yield table_row(header, values + [None] * (len(header) - len(values)), where, number)
