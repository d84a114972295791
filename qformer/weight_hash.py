"""A hash of tensors rather than of files: the same weights have the same one however they are sharded or headed."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterable
from pathlib import Path

from qformer.errors import UserError


def hash_tensors(files: Iterable[Path], parts: tuple[str, ...] = ()) -> str:
    """`sha256:…` over name, dtype, shape and bytes of every tensor in the safetensors `files`, in the order of names.

    Args:
        files: of one model.
        parts: only tensors whose names begin so count; () for all.

    Raises:
        UserError: a file is cut short or is no safetensors file.
    """
    places: dict[str, tuple[Path, str, int, int]] = {}
    for file in files:
        try:
            places |= _tensors(file)
        except (ValueError, KeyError, TypeError, AttributeError, MemoryError) as error:
            raise UserError(f"{file} is damaged or no safetensors file ({error}): fetch or save it anew") from error
    digest = hashlib.sha256()
    for name in sorted(places):
        if parts and not name.startswith(parts):
            continue
        file, kind, start, end = places[name]
        digest.update(f"{name} {kind} {end - start}\n".encode())
        if end > start:
            with file.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
                digest.update(memoryview(content)[start:end])
    return f"sha256:{digest.hexdigest()}"


def _tensors(file: Path) -> dict[str, tuple[Path, str, int, int]]:
    """Per tensor: its file, its dtype with its shape, and where its bytes start and end in the file."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > size - 8:
            raise ValueError("its header is cut short")
        header = json.loads(opened.read(length))
    places = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = (8 + length + offset for offset in entry["data_offsets"])
        if end > size:
            raise ValueError(f"tensor {name} is cut short")
        places[name] = (file, f"{entry['dtype']} {entry['shape']}", start, end)
    return places
