"""Any data file as JSON lines or Parquet: the same rows, with their pictures found, or brought along, by the new file.

Every field is kept, those that nothing reads too. Into JSON lines a picture goes as a path from the new file on; a
picture that lay inside the old file becomes a file of its own beside the new one. Into Parquet pictures go as bytes, in
the struct of bytes and path that Hugging Face's `datasets` reads.
"""

from __future__ import annotations

import base64
import datetime
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from adapters.data.columns import READ, named_rows
from adapters.data.formats.raw_rows import RawRow
from adapters.data.image_ref import ImageRef, image_ref
from adapters.data.picture_files import is_in
from adapters.data.reading import no_rows, read_rows
from adapters.data.rows import IMAGE_FIELDS
from adapters.data.sources import Source, open_source
from qformer.atomic import whole_file
from qformer.errors import UserError

ENDINGS = (".jsonl", ".parquet")
_ROWS_A_GROUP = 256
_PICTURE_PARTS = ("image", "image_url", "input_image")


@dataclass(frozen=True)
class Converted:
    """What was written.

    Attributes:
        out: the file.
        rows: in it.
        bad_rows: that were left out.
        pictures: files that were written beside it.
        outside: pictures of it lie outside its folder, so that it is read with `--allow-outside` alone.
    """

    out: Path
    rows: int
    bad_rows: int
    pictures: int
    outside: bool = False


def convert_data(
    source: str | Path,
    out: str | Path,
    *,
    task: str | None = None,
    need_answers: bool = True,
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
    allow_outside: bool = False,
    offline: bool = False,
) -> Converted:
    """Write the rows of a data file as JSON lines or Parquet, by the ending of `out`. It is whole or not there.

    Args:
        source: as `adapters.data.reading.read_data` takes it.
        out: a `.jsonl` or `.parquet` file that is not there yet.
        task: as `read_data` takes it.
        need_answers: False for rows to be answered.
        columns: the file's name of a field by ours; the new file has ours.
        skip_bad_rows: leave bad rows out, instead of writing nothing.
        allow_outside: as `read_data` takes it.
        offline: do not fetch a packaged set.

    Raises:
        UserError: rows are bad, there are none, or `out` is there or cannot be written.
    """
    out = Path(out)
    if out.suffix.lower() not in ENDINGS:
        raise UserError(f"--out {out}: name a file that ends in {' or '.join(ENDINGS)}")
    if out.exists():
        raise UserError(f"--out {out}: a file stands there; name a new one, or delete it")
    if not out.parent.is_dir():
        raise UserError(f"--out {out}: there is no folder {out.parent}; make it, or name another")
    found = read_rows(
        source, task=task, need_answers=need_answers, columns=columns, allow_outside=allow_outside, offline=offline
    )
    if not found.rows:
        raise UserError(no_rows(source))
    bad = {fault.row for fault in found.faults}
    if bad and not skip_bad_rows:
        rows = f"{len(bad)} of {found.rows} rows are bad"
        raise UserError(f"{found.faults[0]}; {rows} (--skip-bad-rows leaves them out)")
    if len(bad) == found.rows:
        raise UserError(f"{found.faults[0]}; all {len(bad)} rows are bad, so none are left")

    def good() -> Iterator[tuple[RawRow, Source]]:
        opened = open_source(source, offline=offline)
        yield from ((row, opened) for row in named_rows(opened.rows, columns or {}) if row.number not in bad)

    try:
        if out.suffix.lower() == ".jsonl":
            count, pictures, outside = _write_jsonl(out, good)
        else:
            count, pictures, outside = _write_parquet(out, good), 0, False
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"--out {out}: cannot be written ({reason}); free space, or name another") from error
    return Converted(out, count, len(bad), pictures, outside)


_Rows = Callable[[], Iterable[tuple[RawRow, Source]]]


def _write_jsonl(out: Path, rows: _Rows) -> tuple[int, int, bool]:
    folder = out.with_suffix(".pictures")
    written: set[Path] = set()
    count = 0
    here = os.path.realpath(out.parent)
    outside = False

    def path_of(base: Path, picture: str | ImageRef) -> str:
        if isinstance(picture, str) and picture.startswith("data:"):
            return picture
        nonlocal outside
        ref = image_ref(picture, base=base) if isinstance(picture, str) else picture
        if ref.path is not None:
            path = ref.path.absolute()
            outside = outside or not is_in(os.path.realpath(path), here)
            return os.path.relpath(path, out.parent.absolute()) if not Path(str(picture)).is_absolute() else str(path)
        file = folder / f"{ref.content_digest()[:32]}{Path(ref.label).suffix.lower() or _ending(ref)}"
        if file not in written:
            folder.mkdir(exist_ok=True)
            file.write_bytes(ref.read())
            written.add(file)
        return str(file.relative_to(out.parent))

    with whole_file(out) as new, new.open("w", encoding="utf-8", newline="\n") as file:
        for row, source in rows():
            fields = _with_pictures(row.fields, partial(path_of, source.base))
            file.write(json.dumps(fields, ensure_ascii=False, default=str) + "\n")
            count += 1
    return count, len(written), outside


def _ending(picture: ImageRef) -> str:
    """The ending of a picture's format."""
    try:
        with Image.open(picture.open()) as opened:
            return {"JPEG": ".jpg"}.get(str(opened.format), f".{str(opened.format).lower()}")
    except (OSError, ValueError, Image.DecompressionBombError):
        return ".img"


def _with_pictures(fields: Mapping[str, Any], place: Callable[[str | ImageRef], Any]) -> dict[str, Any]:
    """A row's fields with other pictures: those of its own fields, and those in the parts of its messages."""

    def within(value: Any) -> Any:
        if isinstance(value, ImageRef):
            return place(value)
        if isinstance(value, list):
            return [within(item) for item in value]
        if not isinstance(value, dict):
            return value
        if value.get("type") in _PICTURE_PARTS:
            return {name: _placed_part(name, item, place) for name, item in value.items()}
        return {name: within(item) for name, item in value.items()}

    changed: dict[str, Any] = {}
    for name, value in fields.items():
        if name in IMAGE_FIELDS:
            changed[name] = [place(one) for one in value] if isinstance(value, list) else place(value)
        else:
            changed[name] = within(value)
    return changed


def _placed_part(name: str, value: Any, place: Callable[[str | ImageRef], Any]) -> Any:
    if name in ("image", "url", "path", "image_url") and isinstance(value, str | ImageRef):
        return place(value)
    if name == "image_url" and isinstance(value, dict) and isinstance(value.get("url"), str):
        return {**value, "url": place(value["url"])}
    return value


# -- Parquet -----------------------------------------------------------------------------------------------------------


def _write_parquet(out: Path, rows: _Rows) -> int:
    import pyarrow
    from pyarrow import parquet

    kinds: dict[str, set[str]] = {}
    for row, _ in rows():
        for name, value in row.fields.items():
            if value is not None:
                kinds.setdefault(_column(name), set()).add(_kind(name, value))
    columns = {name: _typed(name, found) for name, found in kinds.items()}
    schema = pyarrow.schema([pyarrow.field(name, kind) for name, (kind, _) in columns.items()])
    features = {name: feature for name, (_, feature) in columns.items()}
    schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    count = 0
    with whole_file(out) as new, parquet.ParquetWriter(new, schema) as writer:
        waiting: list[dict[str, Any]] = []

        def write() -> None:
            writer.write_table(pyarrow.Table.from_pylist(waiting, schema=schema))
            waiting.clear()

        for row, source in rows():
            waiting.append({_column(name): _cell(name, value, schema, source) for name, value in row.fields.items()})
            count += 1
            if len(waiting) == _ROWS_A_GROUP:
                write()
        if waiting:
            write()
    return count


def _column(name: str) -> str:
    return "image" if name == "file_name" else name


def _kind(name: str, value: Any) -> str:
    """What a value is: bool, int, float, text, texts, turns, picture, pictures, or else."""
    if name in IMAGE_FIELDS or isinstance(value, ImageRef):
        return "pictures" if isinstance(value, list) else "picture"
    if isinstance(value, list):
        if value and all(isinstance(item, str) for item in value):
            return "texts"
        turns = all(isinstance(item, dict) and set(item) == {"role", "content"} for item in value)
        plain = turns and all(isinstance(text, str) for item in value for text in item.values())
        return "turns" if value and plain else "else"
    if isinstance(value, float) and name in READ:
        return "else"  # its digits are part of an answer: 3.0 is no 3
    found = {bool: "bool", int: "int", float: "float", str: "text"}.get(type(value), "else")
    return "else" if isinstance(value, int) and not -(2**63) <= value < 2**63 else found


def _typed(name: str, kinds: set[str]) -> tuple[Any, Any]:
    """A column's type, of Arrow and as Hugging Face writes it; values of several kinds are JSON as text."""
    import pyarrow

    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    turn = pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())])
    text = {"dtype": "string", "_type": "Value"}
    types: dict[str, tuple[Any, Any]] = {
        "picture": (picture, {"_type": "Image"}),
        "pictures": (pyarrow.list_(picture), {"feature": {"_type": "Image"}, "_type": "List"}),
        "text": (pyarrow.string(), text),
        "texts": (pyarrow.list_(pyarrow.string()), {"feature": text, "_type": "List"}),
        "turns": (pyarrow.list_(turn), {"feature": {"role": text, "content": text}, "_type": "List"}),
        "bool": (pyarrow.bool_(), {"dtype": "bool", "_type": "Value"}),
        "int": (pyarrow.int64(), {"dtype": "int64", "_type": "Value"}),
        "float": (pyarrow.float64(), {"dtype": "float64", "_type": "Value"}),
    }
    if name in IMAGE_FIELDS and kinds == {"picture", "pictures"}:
        return types["pictures"]
    if kinds == {"int", "float"}:
        return types["float"]
    return types[next(iter(kinds))] if len(kinds) == 1 and "else" not in kinds else types["text"]


def _cell(name: str, value: Any, schema: Any, source: Source) -> Any:
    import pyarrow

    def whole(picture: str | ImageRef) -> dict[str, Any]:
        ref = image_ref(picture, base=source.base) if isinstance(picture, str) else picture
        return {"bytes": ref.read(), "path": None if ref.data is not None else Path(ref.label).name}

    if value is None:
        return None
    kind = schema.field(_column(name)).type
    if name in IMAGE_FIELDS or isinstance(value, ImageRef):
        if pyarrow.types.is_list(kind):
            return [whole(one) for one in (value if isinstance(value, list) else [value])]
        return whole(value)
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if kind == pyarrow.string() and not isinstance(value, str):
        placed = _with_pictures({name: value}, lambda picture: _as_uri(picture, source))[name]
        return json.dumps(placed, ensure_ascii=False, default=str)
    return value


def _as_uri(picture: str | ImageRef, source: Source) -> str:
    """A picture inside a message's text, as a data URI."""
    if isinstance(picture, str) and picture.startswith("data:"):
        return picture
    ref = image_ref(picture, base=source.base) if isinstance(picture, str) else picture
    kind = Path(ref.label).suffix.lower().removeprefix(".").replace("jpg", "jpeg") or "png"
    return f"data:image/{kind};base64,{base64.b64encode(ref.read()).decode()}"
