"""Rows on disk: what comes back is what was kept, and memory does not grow with what they hold."""

from __future__ import annotations

import gc
import json
import tempfile
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from data_rows import VQA
from tiny import make_tokenizer

from adapters.data import row_store
from adapters.data.batches import plan_epoch, tokenise
from adapters.data.examples import Example, merge, mix, repeat, split_by_image
from adapters.data.image_ref import ImageRef
from adapters.data.prompts import PromptBuilder, Turn
from adapters.data.reading import read_data
from adapters.data.row_store import RecordFile, StoredExamples
from qformer.errors import UserError


def test_an_example_comes_back_as_it_was() -> None:
    first, second = ImageRef("a.png", path=Path("/x/a.png"), where="f row 1"), ImageRef("b", data=b"bytes", where="f")
    history = (Turn("system", "Be short."), Turn("user", "<image>?", (first,)), Turn("assistant", "red"))
    rest: Any = {
        "answers": (), "where": "f row 2", "id": "x", "language": "zh", "row": 2, "task": "reason", "context": "text\n",
        "choices": ("a", "b"), "rationale": "because", "kind": "k", "steps": 3, "turn": 1, "history": history,
    }  # fmt: skip
    short = Example((first,), "what?", ("red", "blue"), "f row 1", "1")
    stored = StoredExamples()
    stored.append(short)
    stored.append(Example(images=(first, second), question="which?", **rest))
    assert stored[0] == short
    kept = stored[1].images[1]
    assert stored[1] == Example(images=(first, kept), question="which?", **rest)
    assert (kept.label, kept.where, kept.data, kept.read()) == ("b", "f", None, b"bytes")  # its bytes are on disk
    assert kept.digest() == second.digest()
    assert stored[0].images[0] is stored[1].images[0]  # so its digest is computed once


def test_records_are_read_at_any_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(row_store, "_AT_ONCE", 64)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    file = RecordFile()
    records = [["é" * (number % 30), number, None] for number in range(200)]
    for number, record in enumerate(records):
        file.append(record)
        assert file.read(number) == record and file.read(number // 2) == records[number // 2]
    assert [file.read(number) for number in reversed(range(200))] == records[::-1] and len(file) == 200
    assert not list(tmp_path.iterdir())  # it has no name, so it cannot be left behind


def test_no_room_for_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(row_store, "_AT_ONCE", 1)
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with pytest.raises(UserError, match=r"no room for the rows .* in /nowhere .*: set TMPDIR"):
        RecordFile().append(1)


def test_memory_hardly_grows_with_rows(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Read, joined, split, tokenised and planned, a row takes less than 100 bytes; as objects it had 1 200."""
    monkeypatch.setattr(row_store, "_AT_ONCE", 4096)
    prompts = PromptBuilder(make_tokenizer(chat=False), 3)

    def held(rows: int) -> int:
        path = folder / f"{rows}.jsonl"
        asked = (VQA | {"image": "ab"[row % 2] + ".png", "question": f"{row} {'x' * 60}?"} for row in range(rows))
        path.write_text("".join(json.dumps(row) + "\n" for row in asked))
        gc.collect()
        tracemalloc.start()
        data = merge(mix([repeat(read_data(path), 1)], [1.0]))
        train, val = split_by_image(data, 0.5, seed=0)
        pictures = tokenise(train, prompts, max_tokens=1000)
        plan = plan_epoch(pictures, seed=0, epoch=0, batch_size=8, row_tokens=0)
        gc.collect()
        size = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        assert sum(step.answers for step in plan) == len(train.examples) == rows - len(val.examples) > 0
        return size

    held(100)  # what is made once
    assert (held(700) - held(100)) / 600 < 100


def test_text_that_json_writes_otherwise(folder: Path) -> None:
    odd: dict[str, Any] = VQA | {"question": 'tab\t "quoted" \u2028 é 😀 \\n?', "answer": "\u00a0x\u200b"}
    path = folder / "odd.jsonl"
    path.write_text(json.dumps(odd) + "\n")
    (example,) = read_data(path).examples
    assert example.question == odd["question"]
