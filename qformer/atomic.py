"""Files and folders that are written whole or not at all: first beside their target under another name, then renamed.

A process that is killed while it writes leaves a file or folder that ends in `.partial`, and its target as it was.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PARTIAL = ".partial"


@contextmanager
def whole_file(target: Path) -> Iterator[Path]:
    """A path to write to, which takes the target's name at the end; after an error, Ctrl-C included, it is removed.

    No two calls, in one process or several, share a path. The target's folder must exist.

    Raises:
        OSError: the file cannot be renamed.
    """
    partial = target.with_name(f"{target.stem}.{os.getpid()}-{secrets.token_hex(4)}{PARTIAL}")
    try:
        yield partial
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """An empty folder to write in, which then replaces the target; after an error, Ctrl-C included, it is removed.

    Raises:
        OSError: the folder cannot be made or renamed.
    """
    building = target.with_name(target.name + PARTIAL)
    shutil.rmtree(building, ignore_errors=True)  # a killed process left it
    try:
        building.mkdir(parents=True)
        yield building
        replace_folder(building, target)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def replace_folder(new: Path, target: Path) -> None:
    """Put a finished folder in the place of another; at every moment one of the two is there whole.

    A process that is killed between the two renames leaves the earlier folder under `earlier_folder(target)`, and it
    stays there until the next one has the target's name.

    Raises:
        OSError: a folder cannot be renamed.
    """
    old = earlier_folder(target)
    if target.exists():
        shutil.rmtree(old, ignore_errors=True)
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def earlier_folder(target: Path) -> Path:
    """The name of a folder while another takes its place."""
    return target.with_name(target.name + ".old")
