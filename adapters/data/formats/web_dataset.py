"""WebDataset's shards: a tar archive whose members share a name with what belongs to them (`0001.jpg`, `0001.json`).

Nothing is unpacked: a picture is the place of its bytes in the archive. No member is ever run or unpickled.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from adapters.data.formats.raw_rows import RawRow, kind_of, shorten, unwritable
from adapters.data.image_ref import ByteRange, ImageRef
from qformer.errors import UserError

PICTURE_ENDINGS = ("jpg", "jpeg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "avif", "ppm", "jp2")
_TEXTS = ("txt", "text", "caption")
_LARGEST_TEXT = 16 * 2**20


class _Bad(Exception):
    """What is wrong with a sample."""


def tar_rows(path: Path) -> Iterator[RawRow]:
    """The samples of a shard: pictures, `.json` with the row's fields, `.txt` with a caption, else a field a member.

    Raises:
        UserError: it is no tar archive, is compressed, breaks off, or has members of one sample apart.
    """
    try:
        with tarfile.open(path, "r:") as archive:
            seen: set[str] = set()
            for number, (key, members) in enumerate(_samples(archive), start=1):
                if key in seen:
                    raise UserError(
                        f"{path}: members of sample '{key}' lie apart: sort them, as `tar --sort=name` does"
                    )
                seen.add(key)
                where = f"{path} sample {number} ({key})"
                try:
                    fields = _fields(path, archive, key, members)
                    problem = unwritable(fields)
                    yield RawRow(where, number, {} if problem else fields, problem)
                except _Bad as error:
                    yield RawRow(where, number, {}, str(error))
            _check_end(path, archive)
    except (tarfile.TarError, EOFError) as error:
        with path.open("rb") as file:
            advice = "unpack .tar.gz first" if file.read(2) == b"\x1f\x8b" else "write it again"
        raise UserError(f"{path} cannot be read as a tar archive ({error}): {advice}") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror or error}): check the file's rights") from error


def _samples(archive: tarfile.TarFile) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Members by the part of their name before its first dot, as WebDataset groups them."""
    current: str | None = None
    members: dict[str, tarfile.TarInfo] = {}
    for member in archive:
        name = member.name.removeprefix("./")
        folder, _, base = name.rpartition("/")
        stem, dot, ending = base.partition(".")
        if not member.isreg() or not dot or not stem:  # folders; and WebDataset passes over hidden files
            continue
        key = f"{folder}/{stem}" if folder else stem
        if key != current and members:
            assert current is not None
            yield current, members
            members = {}
        current = key
        members[ending.lower()] = member
        vars(archive)["members"] = []  # else it remembers every member
    if members:
        assert current is not None
        yield current, members


def _check_end(path: Path, archive: tarfile.TarFile) -> None:
    """An archive ends with an empty block; a shorter one has lost members, which tarfile does not say."""
    with path.open("rb") as file:
        file.seek(archive.offset)
        if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise UserError(f"{path} breaks off: the end of the archive is missing; write it again")


def _fields(path: Path, archive: tarfile.TarFile, key: str, members: dict[str, tarfile.TarInfo]) -> dict[str, Any]:
    pictures: list[ImageRef] = []
    fields: dict[str, Any] = {}
    for ending, member in sorted(members.items()):
        if ending.rpartition(".")[2] in PICTURE_ENDINGS:
            part = ByteRange(path, member.offset_data, member.size)
            pictures.append(ImageRef(f"{key}.{ending}", part=part))
    if "json" in members:
        fields = _json(archive, members["json"])
        if not isinstance(fields, dict):
            raise _Bad(f"{members['json'].name} holds {kind_of(fields)}: write an object with the row's fields")
    for ending, member in members.items():
        last = ending.rpartition(".")[2]
        if last in PICTURE_ENDINGS or ending == "json":
            continue
        name = "caption" if ending in _TEXTS else ending.removesuffix(f".{last}") if last in _TEXTS else ending
        value: Any
        if last == "json":
            name, value = ending.removesuffix(".json"), _json(archive, member)
        else:
            value = _read(archive, member).strip()
        if name in fields and fields[name] != value and str(fields[name]).strip() != str(value):
            raise _Bad(f"'{name}' is there twice, in .json and as a member, and they differ: keep one")
        if not (name == "caption" and "captions" in fields):
            fields[name] = value
    named = {field: fields[field] for field in ("image", "images", "file_name") if field in fields}
    ours = [f"{key}.{ending}".rpartition("/")[2] for ending in sorted(members)]
    for field, value in named.items():
        for one in value if isinstance(value, list) else [value]:
            if pictures and str(one).rpartition("/")[2] not in ours:
                raise _Bad(f"'{field}' names {shorten(one)}, and the sample has the picture {pictures[0].label}")
        if pictures:
            del fields[field]
    if len(pictures) == 1:
        fields["image"] = pictures[0]
    elif pictures:
        fields["images"] = pictures
    return fields


def _json(archive: tarfile.TarFile, member: tarfile.TarInfo) -> Any:
    try:
        return json.loads(_read(archive, member))
    except (ValueError, RecursionError) as error:
        raise _Bad(f"{member.name} is broken JSON ({shorten(str(error))}): mend it") from None


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    if member.size > _LARGEST_TEXT:
        raise _Bad(f"{member.name} is larger than {_LARGEST_TEXT >> 20} MiB: it is no text")
    file = archive.extractfile(member)
    assert file is not None  # a regular file
    try:
        return file.read().decode()
    except UnicodeDecodeError:
        raise _Bad(f"{member.name} is neither a picture nor text in UTF-8: leave it out") from None
