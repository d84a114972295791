"""Feature files on disk: one array a file, written all or not at all, checked when read, bounded as a whole.

A file is a `.npy` with four bytes behind it, the CRC-32 of all before (numpy ignores them). Files are not flushed to
the disk one by one, which would cost more than encoding: after a power cut the checksum tells what was lost. The
access time is set by hand to the time of last use, since many systems do not keep it; the modification time stays.
"""

from __future__ import annotations

import contextlib
import functools
import io
import json
import mmap
import os
import re
import shutil
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from qformer.atomic import PARTIAL, whole_file
from qformer.sources import cache_root

SUFFIX = ".npy"
_IDENTITY = "identity.json"
_CHECKSUM_BYTES = 4
_ENCODER_FOLDER = re.compile(r"[0-9a-f]{32}")
# A file's last use is noted once in so many seconds.
_USE_GRAIN = 600
# A file half written for so long was left by a process that was killed.
_ABANDONED_AFTER = 3600


class DamagedFile(Exception):
    """The file is not what was written."""


def write(path: Path, array: np.ndarray) -> int:
    """Write one array; a reader sees all of it or none. Returns the file's size in bytes."""
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, np.ascontiguousarray(array), version=(1, 0), allow_pickle=False)
    content = buffer.getvalue()
    _write_whole(path, content + zlib.crc32(content).to_bytes(_CHECKSUM_BYTES, "little"))
    return len(content) + _CHECKSUM_BYTES


def size_on_disk(array: np.ndarray) -> int:
    """Return the bytes that an array's file takes, near enough to plan with."""
    return array.nbytes + 128 + _CHECKSUM_BYTES


def _write_whole(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        partial.write_bytes(content)


def read(path: Path) -> np.ndarray:
    """Map one array for reading and note its use.

    Raises:
        FileNotFoundError: there is none.
        DamagedFile: it is cut short or altered.
    """
    with path.open("rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if status.st_size <= _CHECKSUM_BYTES:
            raise DamagedFile(path)
        content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    body, checksum = content[:-_CHECKSUM_BYTES], content[-_CHECKSUM_BYTES:]
    if zlib.crc32(body) != int.from_bytes(checksum, "little"):
        raise DamagedFile(path)
    start = 10 + int.from_bytes(body[8:10], "little")  # format 1.0: magic, version, length of the header
    shape, dtype = _header(bytes(body[:start]))
    note_use(path, status)
    return np.frombuffer(body, dtype, offset=start).reshape(shape)  # [P, D]


@functools.lru_cache(maxsize=64)  # all files of an encoder have the same header
def _header(content: bytes) -> tuple[tuple[int, ...], np.dtype]:
    stream = io.BytesIO(content)
    np.lib.format.read_magic(stream)
    shape, _, dtype = np.lib.format.read_array_header_1_0(stream)
    return shape, dtype


def note_use(path: Path, status: os.stat_result) -> None:
    """Set the time of last use, unless that was a short while ago."""
    if time.time() - status.st_atime > _USE_GRAIN:
        with contextlib.suppress(OSError):  # a cache shared read-only serves as well; only its order of use is lost
            os.utime(path, ns=(time.time_ns(), status.st_mtime_ns))


def walk(root: Path) -> Iterator[os.DirEntry[str]]:
    """Yield all files below a folder; what other processes remove meanwhile is passed over."""
    try:
        entries = list(os.scandir(root))
    except (FileNotFoundError, NotADirectoryError):
        return
    for entry in entries:
        if entry.is_dir(follow_symlinks=False):
            yield from walk(Path(entry.path))
        else:
            yield entry


def bound(root: Path, max_bytes: int, keep: Callable[[Path], bool]) -> int:
    """Hold all feature files below `root` to `max_bytes`, and sweep up what killed processes left.

    Over the bound, the files least recently used go until 90 % of it is reached; those that `keep` names never go.

    Returns:
        The bytes that the files take afterwards.
    """
    files: list[tuple[float, int, str]] = []
    for entry in walk(root):
        with contextlib.suppress(FileNotFoundError):
            status = entry.stat()
            if entry.name.endswith(SUFFIX):
                files.append((status.st_atime, status.st_size, entry.path))
            elif entry.name.endswith(PARTIAL) and time.time() - status.st_mtime > _ABANDONED_AFTER:
                os.unlink(entry.path)
    total = sum(size for _, size, _ in files)
    if total <= max_bytes:
        return total
    for _, size, path in sorted(files):
        if total <= 0.9 * max_bytes:
            break
        if not keep(Path(path)):
            Path(path).unlink(missing_ok=True)
            total -= size
    return total


def write_identity(folder: Path, identity: Mapping[str, object]) -> None:
    """Lay the encoder's identity into its folder, for people and for `inventory`; nothing depends on it."""
    path = folder / _IDENTITY
    if not path.exists():
        _write_whole(path, json.dumps(identity, indent=2, sort_keys=True).encode() + b"\n")


@dataclass(frozen=True)
class EncoderFiles:
    """The features of one encoder on disk: `identity` is empty if its file is lost or damaged."""

    key: str
    identity: dict[str, object]
    files: int
    bytes: int


def features_root(root: Path | None = None) -> Path:
    """Where features lie under a cache folder (None: the usual one), a folder for each encoder."""
    return (cache_root() if root is None else Path(root)) / "features"


def features_info(root: Path | None = None) -> list[EncoderFiles]:
    """Tell what features lie under a cache folder (None: the usual one), for each encoder; needs no encoder."""
    return inventory(features_root(root))


def clear_features(root: Path | None = None) -> int:
    """Remove all features under a cache folder (None: the usual one), and nothing else. Returns the bytes freed."""
    return sum(remove(folder) for folder in _encoder_folders(features_root(root)))


def inventory(root: Path) -> list[EncoderFiles]:
    """Count the feature files below `root`, for each encoder."""
    found = []
    for folder in _encoder_folders(root):
        sizes = _sizes(folder, SUFFIX)
        try:
            identity = json.loads((folder / _IDENTITY).read_bytes())
        except (OSError, ValueError):
            identity = {}
        found.append(EncoderFiles(folder.name, identity, len(sizes), sum(sizes)))
    return found


def remove(folder: Path) -> int:
    """Remove a folder of features; another process that uses it encodes again. Returns the bytes freed."""
    freed = folder_bytes(folder)
    if folder.is_dir():
        shutil.rmtree(folder)
    return freed


def folder_bytes(folder: Path) -> int:
    """The bytes of all files below a folder."""
    return sum(_sizes(folder, ""))


def _encoder_folders(root: Path) -> list[Path]:
    """The folders below `root` that are named as encoders' are; whatever else lies there is not ours."""
    if not root.is_dir():
        return []
    return sorted(path for path in root.iterdir() if path.is_dir() and _ENCODER_FOLDER.fullmatch(path.name))


def _sizes(folder: Path, suffix: str) -> list[int]:
    sizes = []
    for entry in walk(folder):
        if entry.name.endswith(suffix):
            with contextlib.suppress(FileNotFoundError):
                sizes.append(entry.stat().st_size)
    return sizes
