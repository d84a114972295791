"""Folders of pictures, as Hugging Face's `imagefolder` reads them: with a table beside them, or a folder a class."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from adapters.data.formats.columnar import CLASS_QUESTION, parquet_rows
from adapters.data.formats.delimited import delimited_rows
from adapters.data.formats.json_files import json_lines_rows
from adapters.data.formats.raw_rows import RawRow
from adapters.data.formats.web_dataset import PICTURE_ENDINGS
from qformer.errors import UserError

_TABLES = {
    "metadata.csv": delimited_rows, "metadata.jsonl": json_lines_rows, "metadata.parquet": parquet_rows,
}  # fmt: skip
_SPLITS = ("train", "training", "validation", "valid", "val", "dev", "test", "testing")
_LITTER = {"thumbs.db", "desktop.ini"}


def table_splits(folder: Path) -> tuple[str, ...] | None:
    """The splits of a folder with a metadata table in it, or in each of its splits; None if there is none."""
    return _splits(folder, lambda part: any((part / name).is_file() for name in _TABLES))


def table_rows(folder: Path, split: str) -> Iterator[RawRow]:
    """The rows of the metadata table; `file_name` names the picture, from the folder on.

    Raises:
        UserError: there are two tables.
    """
    part = folder / split
    names = [name for name in _TABLES if (part / name).is_file()]
    if len(names) > 1:
        raise UserError(f"{part} holds {' and '.join(names)}: keep one of them")
    return _TABLES[names[0]](part / names[0])


def class_splits(folder: Path) -> tuple[str, ...] | None:
    """The splits of a folder whose folders are classes, each of pictures; None if it is none."""
    return _splits(folder, _has_classes)


def class_rows(folder: Path, split: str) -> Iterator[RawRow]:
    """A row a picture: its class, the name of its folder, answers `CLASS_QUESTION`.

    A file that is no picture is a bad row; hidden files and those that Windows puts into folders are passed over.
    """
    part = folder / split
    number = 0
    for inside in sorted(part.iterdir()):
        if inside.name.startswith(".") or inside.name.lower() in _LITTER:
            continue
        files = sorted(file for file in _walk(inside)) if inside.is_dir() else [inside]
        for file in files:
            number += 1
            name = file.relative_to(part).as_posix()
            where = f"{part} row {number}"
            if not inside.is_dir():
                problem = f"'{name}' lies in no folder of a class: move it into one"
                yield RawRow(where, number, {}, problem)
            elif not is_picture(file):
                yield RawRow(where, number, {}, f"'{name}' is no picture that is read: save it as JPEG, or take it out")
            else:
                yield RawRow(where, number, {"image": name, "question": CLASS_QUESTION, "answer": inside.name})


def is_picture(file: Path) -> bool:
    """Whether a file has the ending of a picture."""
    return file.suffix.lower().removeprefix(".") in PICTURE_ENDINGS


def _walk(folder: Path) -> Iterator[Path]:
    for inner, _, names in os.walk(folder, followlinks=True):
        yield from (Path(inner) / name for name in names if not name.startswith(".") and name.lower() not in _LITTER)


def _has_classes(folder: Path) -> bool:
    classes = [part for part in folder.iterdir() if part.is_dir() and not part.name.startswith(".")]
    return len(classes) > 1 and all(any(is_picture(file) for file in part.iterdir()) for part in classes)


def _splits(folder: Path, fits: object) -> tuple[str, ...] | None:
    assert callable(fits)
    names = [name for name in _SPLITS if (folder / name).is_dir() and fits(folder / name)]
    if names:
        return tuple(names)
    return ("",) if fits(folder) else None
