"""Parquet and Arrow: columns with types, as pandas, Polars and Hugging Face `datasets` write them.

A class label becomes its name, and a picture may be a path, bytes, or Hugging Face's struct of both.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.data.formats.delimited import checked_header
from adapters.data.formats.raw_rows import RawRow, shorten, table_row, unwritable
from adapters.data.picture_store import PictureStore
from qformer.errors import UserError

if TYPE_CHECKING:
    import pyarrow

ROWS_AT_ONCE = 64  # at most, in memory, with their pictures
_BYTES_AT_ONCE = 32 * 2**20  # of unpacked values: fewer rows are read at once if a row may have more
_READ_AHEAD = 2**20  # bytes of each column; else all that a row group has of it is read, which may be gigabytes
_MOST_UNPACKED = 64 * 2**20  # bytes of a column in a row group, if that is over 100 times what they take in the file
CLASS_QUESTION = "What is this?"
"""What is asked of a picture that has a class and no question."""
_PICTURES = ("image", "images", "file_name", "img", "picture", "photo")  # columns of bytes that may be pictures


def parquet_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a Parquet file.

    Raises:
        UserError: it is damaged, breaks off, or is none; a column of it unpacks to over 64 MiB and 100 times its size.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_READ_AHEAD) as file:
            at_once = _rows_at_once(path, file.metadata)
            yield from typed_rows(path, file.schema_arrow, file.iter_batches(batch_size=at_once))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        raise UserError(f"{path} cannot be read as Parquet ({_first_line(error)}): write it again") from error


def _rows_at_once(path: Path, metadata: Any) -> int:
    """How many rows of a Parquet file may be in memory, by the sizes that its footer states.

    A value has as many bytes as its column's mean, or as its dictionary, whose one value may stand in every row.
    """
    rows = ROWS_AT_ONCE
    for group in range(metadata.num_row_groups):
        largest = 0.0  # bytes of a row
        for column in map(metadata.row_group(group).column, range(metadata.num_columns)):
            packed, unpacked = max(column.total_compressed_size, 1), column.total_uncompressed_size
            if unpacked > max(_MOST_UNPACKED, 100 * packed):
                raise UserError(
                    f"{path}: column {shorten(column.path_in_schema)} unpacks from {packed} bytes to"
                    f" {unpacked >> 20} MiB in one row group, and a column that shrinks so much may have"
                    f" {_MOST_UNPACKED >> 20}: write it with smaller row groups (row_group_size=1000)"
                )
            dictionary = 0
            if column.has_dictionary_page and column.dictionary_page_offset is not None:
                dictionary = column.data_page_offset - column.dictionary_page_offset
            largest += max(unpacked / max(metadata.row_group(group).num_rows, 1), dictionary * unpacked / packed)
        rows = min(rows, int(_BYTES_AT_ONCE / max(largest, 1)))
    return max(rows, 1)


def arrow_rows(path: Path) -> Iterator[RawRow]:
    """The rows of an Arrow file, as a stream (Hugging Face's) or with a footer (Feather).

    Raises:
        UserError: as `parquet_rows`.
    """
    import pyarrow

    try:
        with pyarrow.memory_map(str(path)) as mapped:
            yield from typed_rows(path, *_opened(mapped))
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError, MemoryError) as error:
        raise UserError(f"{path} cannot be read as Arrow ({_first_line(error)}): write it again") from error


def _opened(mapped: Any) -> tuple[Any, Iterable[Any]]:
    import pyarrow

    if mapped.read(6) == b"ARROW1":
        mapped.seek(0)
        file = pyarrow.ipc.open_file(mapped)
        return file.schema, (file.get_batch(number) for number in range(file.num_record_batches))
    mapped.seek(0)
    stream = pyarrow.ipc.open_stream(mapped)
    return stream.schema, stream


def typed_rows(
    name: Path | str,
    schema: pyarrow.Schema,
    batches: Iterable[pyarrow.RecordBatch],
    *,
    features: Mapping[str, Any] | None = None,
) -> Iterator[RawRow]:
    """The rows of batches of columns.

    Args:
        name: the file's, for messages.
        schema: of the batches.
        batches: what it holds.
        features: Hugging Face's types of the columns; left out, those that the schema carries.
    """
    features = features if features is not None else _features(schema)
    header = checked_header(Path(name), schema.names)
    store = PictureStore()
    convert = {column: _converter(schema.field(column).type, features.get(column), column) for column in header}
    classes = [column for column in header if _is_class(features.get(column))]
    label = classes[0] if len(classes) == 1 else None
    number = 0
    for batch in batches:
        if batch.schema.names != schema.names:
            raise UserError(f"{name} is damaged: its columns change on the way; write it again")
        batch.validate(full=True)  # a damaged file must not be believed: its offsets may lead anywhere
        for part in range(0, batch.num_rows, ROWS_AT_ONCE):
            for values in batch.slice(part, ROWS_AT_ONCE).to_pylist():
                number += 1
                where = f"{name} row {number}"
                keep = _keeper(store, f"picture of row {number}")
                try:
                    cells = [convert[column](values[column], keep) for column in header]
                except ValueError as error:
                    yield RawRow(where, number, {}, str(error))
                    continue
                row = table_row(header, cells, where, number, may_be_empty=("rationale",))
                if row.problem is None and (problem := unwritable(row.fields)):
                    row = RawRow(where, number, {}, problem)
                yield replace(row, label=label)


Keep = Callable[[bytes, str | None], Any]
_Convert = Callable[[Any, Keep], Any]


def _keeper(store: PictureStore, label: str) -> Keep:
    return lambda content, name: store.keep(content, name or label)


def _features(schema: Any) -> dict[str, Any]:
    """Hugging Face's types of the columns, as they write them into a schema; {} if there are none."""
    try:
        found = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
    except (ValueError, KeyError, TypeError):
        return {}
    return found if isinstance(found, dict) else {}


def _is_class(feature: Any) -> bool:
    return isinstance(feature, dict) and feature.get("_type") == "ClassLabel"


def _converter(kind: Any, feature: Any, column: str) -> _Convert:
    """What makes a value of a column one of JSON's, or a kept picture."""
    import pyarrow

    if _is_class(feature) and isinstance(feature.get("names"), list):
        return _class_namer(feature["names"], column)
    if pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind) or pyarrow.types.is_fixed_size_list(kind):
        inner_feature = feature.get("feature") if isinstance(feature, dict) else None
        inner_feature = feature[0] if isinstance(feature, list) and len(feature) == 1 else inner_feature
        inner = _converter(kind.value_type, inner_feature, column)
        return lambda value, keep: None if value is None else [inner(item, keep) for item in value]
    if pyarrow.types.is_struct(kind):
        names = {kind.field(place).name for place in range(kind.num_fields)}
        if names == {"bytes", "path"}:
            return _picture
        fields = feature if isinstance(feature, dict) else {}
        inside = {name: _converter(kind.field(name).type, fields.get(name), f"{column}.{name}") for name in names}
        return lambda value, keep: (
            None if value is None else {name: inside[name](item, keep) for name, item in value.items()}
        )
    if pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind):
        if column in _PICTURES:
            return lambda value, keep: keep(value, None) if value else None
        return lambda value, keep: _text(value, column)
    return lambda value, keep: value


def _picture(value: Any, keep: Keep) -> Any:
    if value is None:
        return None
    if value["bytes"]:
        return keep(value["bytes"], value["path"])
    return value["path"]


def _class_namer(names: list[Any], column: str) -> _Convert:
    def name(value: Any, keep: Keep) -> Any:
        if value is None or value == -1:  # Hugging Face's mark of a class that is not known
            return None
        if not isinstance(value, int) or not 0 <= value < len(names):
            raise ValueError(f"'{column}' is class {value}, and there are {len(names)}: correct it")
        return str(names[value])

    return name


def _text(value: bytes | None, column: str) -> str | None:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError:
        raise ValueError(f"'{column}' holds bytes that are no text: leave the column out") from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
