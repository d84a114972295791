"""A folder that Hugging Face's `datasets` wrote with `save_to_disk`, read with pyarrow, memory-mapped."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from adapters.data.formats.columnar import arrow_rows
from adapters.data.formats.raw_rows import RawRow
from qformer.errors import UserError

_STATE, _SPLITS = "state.json", "dataset_dict.json"


def saved_splits(folder: Path) -> tuple[str, ...] | None:
    """The splits of a saved dataset; ("",) if it has none; None if the folder is no such dataset."""
    if (folder / _SPLITS).is_file():
        return tuple(_read(folder / _SPLITS, "splits"))
    return ("",) if (folder / _STATE).is_file() else None


def saved_rows(folder: Path, split: str) -> Iterator[RawRow]:
    """The rows of a saved dataset, or of a split of it.

    Raises:
        UserError: a file of it is missing or damaged, or its rows are a selection that was not written out.
    """
    part = folder / split if split else folder
    state = _read(part / _STATE, None)
    if state.get("_indices_data_files"):
        raise UserError(f"{part} is a selection of other rows: call flatten_indices() before save_to_disk()")
    number = 0
    for entry in _read(part / _STATE, "_data_files"):
        for row in arrow_rows(part / Path(str(entry.get("filename"))).name):
            number += 1
            yield replace(row, number=number, where=f"{part} row {number}")


def _read(path: Path, key: str | None) -> Any:
    try:
        value = json.loads(path.read_bytes())
        return value if key is None else value[key]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is missing or damaged: save the dataset again with save_to_disk()") from error
