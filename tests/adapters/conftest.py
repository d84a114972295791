"""Fixtures for the tests of data, caches and training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from data_rows import write_jsonl


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four files with names of pictures: the reader looks for them and does not open them."""
    for name in ("a.png", "b.png", "c.png", "d.png"):
        (tmp_path / name).write_bytes(name.encode())
    return tmp_path


@pytest.fixture
def jsonl(folder: Path) -> Callable[..., Path]:
    """Writes rows, as objects or as they are, to a file beside those pictures."""

    def write(*rows: object) -> Path:
        return write_jsonl(folder / "data.jsonl", rows)

    return write
