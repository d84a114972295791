"""Rows and files of rows for the tests of readers and batch jobs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from adapters.data.readers import read_data
from qformer.errors import UserError

VQA = {"image": "a.png", "question": "What is it?", "answer": "a cat"}
CAPTION = {"image": "a.png", "caption": "A cat."}


def complaint(path: Path | str, **options: object) -> str:
    """What is said, in one line, about data that cannot be read."""
    with pytest.raises(UserError) as caught:
        read_data(path, **options)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write_jsonl(path: Path, rows: Sequence[object]) -> Path:
    """Write rows, as objects or as they are, a line each."""
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the rows back; only a line feed ends a line."""
    return [json.loads(line) for line in path.read_bytes().decode().split("\n")[:-1]]
