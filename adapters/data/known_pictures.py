"""What earlier runs found out about pictures, so that a start on known ones reads none of them.

`<cache>/indexes/pictures.sqlite3` holds the SHA-256 of each picture's file, known by its path, size, times and inode,
and what it looks like, known by its SHA-256, for the search of near copies. It is a memory, not a truth: without it, or
if it is damaged or locked, files are read again. Any number of processes may use it at once.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import sqlite3
import stat
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from io import BufferedReader, BytesIO
from pathlib import Path

from qformer.sources import cache_root

FILE = Path("indexes") / "pictures.sqlite3"
_TABLES = """
CREATE TABLE IF NOT EXISTS files (path TEXT PRIMARY KEY, stamp TEXT NOT NULL, digest TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS looks (digest TEXT PRIMARY KEY, look BLOB NOT NULL) WITHOUT ROWID;
"""
_TOGETHER = 2000  # rows written at once
_ASKED_TOGETHER = 500  # files that one query asks for: SQLite takes 999 values at least
# A file that was written so short a while ago may be written again within the same tick of its file system's clock.
_SETTLED_NS = 2_000_000_000


def known_pictures() -> KnownPictures:
    """The memory of this process, in the cache folder that is set now."""
    return _opened(cache_root() / FILE, os.getpid())


@lru_cache(maxsize=4)
def _opened(path: Path, _process: int) -> KnownPictures:  # a connection must not be shared with a forked process
    known = KnownPictures(path)
    atexit.register(known.flush)
    return known


def stamp_of(status: os.stat_result) -> str:
    """What tells a file from one that was written later: size, times of content and of inode in ns, and inode."""
    return f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} {status.st_ino}"


class KnownPictures:
    """Digests of files and looks of pictures, remembered between runs.

    Args:
        path: the database; it is made when there is something to write.
        settled_ns: a file whose times are younger than this is read, but not remembered.
    """

    def __init__(self, path: Path, *, settled_ns: int = _SETTLED_NS) -> None:
        self.path = path
        self.settled_ns = settled_ns
        self._lock = threading.RLock()
        self._connection: sqlite3.Connection | None = None
        self._usable = True
        self._files: dict[str, tuple[str, str]] = {}  # not written yet
        self._looks: dict[str, bytes] = {}

    def digest(self, file: Path) -> str | None:
        """The SHA-256 of a file that has not changed since it was remembered; None if it has to be read."""
        try:
            status = os.stat(file)
        except (OSError, ValueError):
            return None
        if not stat.S_ISREG(status.st_mode):
            return None
        name = os.path.abspath(file)
        with self._lock:
            found = self._files.get(name) or self._one("SELECT stamp, digest FROM files WHERE path = ?", name)
        if found is None or found[0] != stamp_of(status):
            return None
        return str(found[1])

    def digests(self, files: Sequence[Path]) -> dict[Path, str]:
        """As `digest`, of those of many files that are known."""
        found: dict[Path, str] = {}
        for start in range(0, len(files), _ASKED_TOGETHER):
            part = {os.path.abspath(file): file for file in files[start : start + _ASKED_TOGETHER]}
            marks = ",".join("?" * len(part))
            query = f"SELECT path, stamp, digest FROM files WHERE path IN ({marks})"
            for name, stamp, digest in self._all(query, tuple(part)):
                with suppress(OSError, ValueError):
                    status = os.stat(part[str(name)])
                    if stat.S_ISREG(status.st_mode) and stamp_of(status) == stamp:
                        found[part[str(name)]] = str(digest)
        return found

    def read(self, file: Path, opened: BufferedReader | BytesIO) -> str:
        """The SHA-256 of an open file, in hex; it is remembered if the file stayed as it was meanwhile."""
        before = os.fstat(opened.fileno())
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
        after = os.fstat(opened.fileno())
        young = time.time_ns() - max(after.st_mtime_ns, after.st_ctime_ns) < self.settled_ns
        if stamp_of(before) == stamp_of(after) and not young:
            with self._lock:
                self._files[os.path.abspath(file)] = stamp_of(after), digest
                self._flush_if_many()
        return digest

    def look(self, digest: str) -> bytes | None:
        """What a picture of this SHA-256 looks like, as `remember_look` was given it; None if it is not known."""
        with self._lock:
            if digest in self._looks:
                return self._looks[digest]
            found = self._one("SELECT look FROM looks WHERE digest = ?", digest)
        return found[0] if found is not None and isinstance(found[0], bytes) else None

    def remember_look(self, digest: str, look: bytes) -> None:
        """Keep what a picture looks like."""
        with self._lock:
            self._looks[digest] = look
            self._flush_if_many()

    def flush(self) -> None:
        """Write what was found out."""
        with self._lock:
            if not (self._files or self._looks):
                return
            files = [(name, *known) for name, known in self._files.items()]
            looks = list(self._looks.items())
            self._files, self._looks = {}, {}
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                connection = self._connect(make=True)
                if connection is None:
                    return
                with connection:  # one transaction
                    connection.executemany("INSERT OR REPLACE INTO files VALUES (?, ?, ?)", files)
                    connection.executemany("INSERT OR REPLACE INTO looks VALUES (?, ?)", looks)
            except (sqlite3.Error, OSError) as error:
                self._give_up(error)

    def _flush_if_many(self) -> None:
        if len(self._files) + len(self._looks) >= _TOGETHER:
            self.flush()

    def _one(self, query: str, key: str) -> tuple[str | bytes, ...] | None:
        return next(iter(self._all(query, (key,))), None)

    def _all(self, query: str, values: Sequence[str]) -> list[tuple[str | bytes, ...]]:
        with self._lock:
            try:
                connection = self._connect(make=False)
                return [] if connection is None else connection.execute(query, values).fetchall()
            except sqlite3.Error as error:
                self._give_up(error)
                return []

    def _connect(self, *, make: bool) -> sqlite3.Connection | None:
        """The connection; None if there is no file yet, or none can be had."""
        if not self._usable or (self._connection is None and not make and not self.path.is_file()):
            return None
        if self._connection is None:
            self._connection = sqlite3.connect(self.path, timeout=10, check_same_thread=False)
            self._connection.executescript(_TABLES)
        elif make and not self.path.is_file():  # the cache was cleared meanwhile
            self._connection.close()
            self._connection = None
            return self._connect(make=True)
        return self._connection

    def _give_up(self, error: BaseException) -> None:
        """Use the file no more; a damaged one is removed, so that the next run begins a new one."""
        self._usable = False
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        if isinstance(error, sqlite3.DatabaseError) and not isinstance(error, sqlite3.OperationalError):
            self.path.unlink(missing_ok=True)
