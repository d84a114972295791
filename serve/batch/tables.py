"""Answers as a table: CSV or Parquet, written whole from the lines that a job has kept.

A Parquet file cannot be read before its end is written, and the columns of a table are known only when all rows are. So
a job's lines are kept beside the table, where they may break off at any byte, and the table is made from them. Both
walks through the lines hold a few thousand rows.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.data.formats.registry import ENDINGS, is_json_lines
from qformer.atomic import whole_file
from qformer.errors import UserError
from serve.batch.lines import FIELDS

if TYPE_CHECKING:
    import pyarrow

TABLES = (".csv", ".parquet")
_GROUP = 16_384  # rows of a group in a Parquet file
_INT64 = 2**63


def check_table(out: Path) -> None:
    """See that the name of a file of answers says no format that is not written; JSON lines have any other name.

    Raises:
        UserError: it does.
    """
    ending = out.suffix.lower()
    if ending in ENDINGS and ending not in TABLES and not is_json_lines(out):
        stem = out.name.partition(".")[0]
        names = f"{stem}.jsonl, {stem}.csv or {stem}.parquet"
        raise UserError(f"--out {out}: '{out.suffix}' is not written; name it {names}")


def journal_of(out: Path) -> Path:
    """The file that a job's lines are kept in: that of the answers itself, if it holds lines."""
    return out.with_name(out.name + ".rows.jsonl") if out.suffix.lower() in TABLES else out


def write_table(journal: Path, out: Path) -> None:
    """Write a job's lines as a table, whole or not at all.

    In CSV a list or an object is written as JSON, and what a row lacks is empty. In Parquet a column keeps the type
    that all its values have; values of several types, and nested ones that are not ours, are written as JSON texts.

    Raises:
        OSError: it cannot be written.
    """
    kinds = _kinds(journal)
    with whole_file(out) as partial:
        if out.suffix.lower() == ".csv":
            _write_csv(journal, partial, list(kinds))
        else:
            _write_parquet(journal, partial, kinds)


def _lines(journal: Path) -> Iterator[dict[str, Any]]:
    with journal.open("rb") as file:
        for line in file:
            yield json.loads(line)


def _kinds(journal: Path) -> dict[str, set[str]]:
    """The columns of all lines, ours first, each with the kinds of values that it holds."""
    found: dict[str, set[str]] = {}
    for line in _lines(journal):
        for name, value in line.items():
            kinds = found.setdefault(name, set())
            if value is not None:
                kinds.add(_kind(value))
    ours = [name for name in FIELDS if name in found]
    return {name: found[name] for name in [*ours, *(name for name in found if name not in ours)]}


def _kind(value: object) -> str:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -_INT64 <= value < _INT64 else "json"
    if isinstance(value, float):
        return "float"
    return "text" if isinstance(value, str) else "json"


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _write_csv(journal: Path, path: Path, names: list[str]) -> None:
    with path.open("w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(names)
        for line in _lines(journal):
            writer.writerow(["" if line.get(name) is None else _as_text(line[name]) for name in names])


def _write_parquet(journal: Path, path: Path, kinds: dict[str, set[str]]) -> None:
    import pyarrow
    import pyarrow.parquet

    schema = pyarrow.schema([(name, _type(name, held)) for name, held in kinds.items()])
    rows = _lines(journal)
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while part := list(islice(rows, _GROUP)):
            columns = [
                pyarrow.array([_value(name, line.get(name), schema.field(name).type) for line in part], field.type)
                for name, field in zip(schema.names, schema, strict=True)
            ]
            writer.write_table(pyarrow.table(columns, schema=schema))


def _type(name: str, held: set[str]) -> pyarrow.DataType:
    import pyarrow

    ours = {
        "confidence": pyarrow.float64(),
        "images": pyarrow.list_(pyarrow.string()),
        "reference": pyarrow.list_(pyarrow.string()),
        "choices": pyarrow.list_(pyarrow.struct([("choice", pyarrow.string()), ("probability", pyarrow.float64())])),
        "logprobs": pyarrow.list_(pyarrow.struct([("token", pyarrow.string()), ("logprob", pyarrow.float64())])),
        "embedding": pyarrow.list_(pyarrow.list_(pyarrow.float32())),
    }
    alone = {"bool": pyarrow.bool_(), "int": pyarrow.int64(), "float": pyarrow.float64()}
    if name in ours:
        return ours[name]
    if held == {"int", "float"}:
        return pyarrow.float64()
    return alone[next(iter(held))] if len(held) == 1 and held <= alone.keys() else pyarrow.string()


def _value(name: str, value: Any, wanted: pyarrow.DataType) -> Any:
    import pyarrow

    if value is None:
        return None
    if name == "choices" and isinstance(value, dict):
        return [{"choice": choice, "probability": share} for choice, share in value.items()]
    if pyarrow.types.is_string(wanted):
        return _as_text(value).encode(errors="backslashreplace").decode()
    return float(value) if pyarrow.types.is_float64(wanted) else value
