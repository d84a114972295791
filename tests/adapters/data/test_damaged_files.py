"""Files damaged at random: a clear error or bad rows, never another exception, whatever the format."""

from __future__ import annotations

import io
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import webdataset
from data_rows import VQA
from PIL import Image

from adapters.data.image_ref import image_ref
from adapters.data.reading import read_rows
from adapters.data.sources import open_source
from qformer.errors import UserError

ROWS = [VQA | {"question": f"question {number}?"} for number in range(6)]
TALK = {
    "messages": [
        {
            "role": "user",
            "content": [{"type": "image_url", "image_url": {"url": "a.png"}}, {"type": "text", "text": "x"}],
        },
        {"role": "assistant", "content": "y"},
    ]
}
TRIES = 120  # of each file


def write_tar(path: Path, content: bytes) -> None:
    with webdataset.TarWriter(str(path)) as sink:
        for number in range(3):
            sink.write({"__key__": str(number), "png": content, "json": {"question": "?", "answer": "x"}, "txt": "c"})


def makers() -> dict[str, Callable[[Path], Any]]:
    frame = pandas.DataFrame(ROWS)
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(buffer, "PNG")
    inside = frame.assign(image=[buffer.getvalue()] * len(ROWS))
    return {
        "r.jsonl": lambda path: path.write_text("\n".join(map(json.dumps, [*ROWS, TALK]))),
        "r.json": lambda path: path.write_text(json.dumps([*ROWS, TALK])),
        "r.jsonl.gz": lambda path: frame.to_json(path, orient="records", lines=True),
        "r.jsonl.zst": lambda path: frame.to_json(path, orient="records", lines=True),
        "r.csv": lambda path: frame.to_csv(path, index=False, sep=";"),
        "w.csv": lambda path: frame.to_csv(path, index=False, encoding="utf-16"),
        "r.xlsx": lambda path: frame.to_excel(path, index=False),
        "r.parquet": lambda path: inside.to_parquet(path),
        "r.arrow": lambda path: inside.to_feather(path),
        "r.tar": lambda path: write_tar(path, buffer.getvalue()),
    }


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut off, or with some bytes changed, put in or left out."""
    changed = bytearray(content)
    place, way = rng.randrange(len(content)), rng.random()
    if way < 0.3:
        return content[:place]
    if way < 0.7:
        for _ in range(rng.choice((1, 2, 20))):
            changed[rng.randrange(len(content))] = rng.randrange(256)
    elif way < 0.85:
        changed[place:place] = rng.randbytes(rng.randrange(1, 40))
    else:
        del changed[place : place + rng.randrange(1, 60)]
    return bytes(changed)


@pytest.mark.parametrize("name", makers())
def test_damage_is_told(name: str, folder: Path) -> None:
    path = folder / name
    makers()[name](path)
    content = path.read_bytes()
    assert len(read_rows(path).examples) >= 3
    rng = random.Random(name)
    told = 0
    for _ in range(TRIES):
        path.write_bytes(damaged(content, rng))
        try:
            told += bool(read_rows(path).faults)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            told += 1
    assert told > TRIES // 4  # most damage cannot be overlooked


def test_a_home_of_nobody(folder: Path) -> None:
    assert image_ref("~nobody-there/a.png", base=folder).path == folder / "~nobody-there/a.png"
    with pytest.raises(UserError, match="is not there"):
        open_source("~nobody-there/a.jsonl")
