"""The formats that are read: files by the ending of their name, folders by what is in them.

A new format is a function in a file of its own, and a line here. A row that cannot be read is yielded with what is
wrong with it, so that the caller can count and report it. What is wrong with the whole file raises a UserError at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from adapters.data.formats.columnar import arrow_rows, parquet_rows
from adapters.data.formats.delimited import delimited_rows
from adapters.data.formats.excel import refuse_xls, xlsx_rows
from adapters.data.formats.json_files import json_lines_rows, json_rows
from adapters.data.formats.official import refuse_boxes
from adapters.data.formats.picture_folders import class_rows, class_splits, table_rows, table_splits
from adapters.data.formats.raw_rows import RawRow
from adapters.data.formats.saved_dataset import saved_rows, saved_splits
from adapters.data.formats.text_lines import COMPRESSED
from adapters.data.formats.web_dataset import tar_rows

TEXT = {
    ".jsonl": json_lines_rows,
    ".ndjson": json_lines_rows,
    ".json": json_rows,
    ".csv": delimited_rows,
    ".tsv": delimited_rows,
}
"""The function that reads a text file, by its ending; `.gz` or `.zst` may follow it."""

FORMATS: dict[str, Callable[[Path], Iterator[RawRow]]] = {
    **TEXT,
    ".xlsx": xlsx_rows,
    ".parquet": parquet_rows,
    ".arrow": arrow_rows,
    ".tar": tar_rows,
}
"""The function that reads a data file, by the ending of its name."""

REFUSED: dict[str, Callable[[Path], Iterator[RawRow]]] = {".xml": refuse_boxes, ".xls": refuse_xls}
"""Endings of files that are known and not read, with what says why."""

SHARDS = (".parquet", ".tar")
"""Formats whose files make one data set if a folder holds nothing else."""

ENDINGS = (*FORMATS, *REFUSED, *COMPRESSED)
"""All endings that say a format, those that are not read too."""


@dataclass(frozen=True)
class FolderFormat:
    """A folder that is a data set.

    Attributes:
        splits: its splits; ("",) if it has none; None if the folder is none of this format.
        rows: of a split.
    """

    splits: Callable[[Path], tuple[str, ...] | None]
    rows: Callable[[Path, str], Iterator[RawRow]]


FOLDERS = (
    FolderFormat(saved_splits, saved_rows),
    FolderFormat(table_splits, table_rows),
    FolderFormat(class_splits, class_rows),
)
"""Formats of folders; the first that fits is taken."""


def format_of(path: Path) -> str:
    """The ending that says a file's format, in lower case, without that of its compression."""
    endings = [ending.lower() for ending in path.suffixes[-2:]]
    if len(endings) == 2 and endings[1] in COMPRESSED and endings[0] in TEXT:
        return endings[0]
    return path.suffix.lower()


def reader_of(path: Path) -> Callable[[Path], Iterator[RawRow]] | None:
    """The function that reads a file, by its name; None if there is none."""
    ending = format_of(path)
    return FORMATS.get(ending) or REFUSED.get(ending)


def is_json_lines(path: Path) -> bool:
    """Whether a name is one of plain JSON lines."""
    return FORMATS.get(path.suffix.lower()) is json_lines_rows
