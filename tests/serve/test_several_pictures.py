"""Rows of several pictures from end to end: learned from, scored and asked, as a row of one is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
from command import FAST, Call
from data_rows import borrowed, write_jsonl
from tiny import draw_captions

from adapters.data.examples import Example
from adapters.inference.request import Completion
from serve.evaluation.run import evaluate


@pytest.fixture
def pairs(data_file: Path, tmp_path: Path) -> Path:
    """Twelve rows of two pictures each, with marks or without."""
    rows = []
    for number in range(12):
        images = [borrowed(data_file.parent / f"{n % 12}.png", tmp_path) for n in (number, number + 1)]
        question = "<image> or <image>: which is red?" if number % 2 else "which is red?"
        rows.append({"images": images, "question": question, "answer": "first" if number % 3 == 0 else "none"})
    return write_jsonl(tmp_path / "pairs.jsonl", rows)


def test_pairs_are_learned_from_scored_and_asked(call: Call, recipe_file: Path, pairs: Path, tmp_path: Path) -> None:
    run, out = tmp_path / "run", tmp_path / "out.jsonl"
    val = write_jsonl(tmp_path / "val.jsonl", [json.loads(line) for line in pairs.read_text().splitlines()[:4]])
    data = ["--set", f"data.train={pairs}", "--set", f"data.val={val}", "--set", "train.max_steps=2"]

    done = call("finetune", recipe_file, "--out", run, "--quiet", "--json", *data, *FAST)
    assert done.values["steps"] == 2

    scores = call("evaluate", pairs, "--adapter", run, "--json", "--quiet", *FAST).values
    assert scores["n"] == 12 and scores["skipped"] == 0
    assert scores["commonest_answer"] == pytest.approx(8 / 12)
    blank = call("evaluate", pairs, "--adapter", run, "--json", "--quiet", "--blank-images", *FAST).values
    assert blank["n"] == 12

    call("batch", pairs, "--out", out, "--adapter", run, "--quiet", "--json", "--max-new-tokens", 3, *FAST)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    asked = [json.loads(line) for line in pairs.read_text(encoding="utf-8").splitlines()]
    assert [(line["images"], line["question"]) for line in lines] == [(row["images"], row["question"]) for row in asked]
    one = call(
        "ask", *asked[1]["images"], asked[1]["question"], "--adapter", run, "--max-new-tokens", 3, "--json", *FAST
    ).values
    assert one["answer"] == lines[1]["answer"]


def test_captions_belong_to_all_their_pictures_together(tmp_path: Path) -> None:
    """Two pairs that begin with the same picture are two things to describe."""
    draw_captions(tmp_path)
    pairs = [["red0.png", "red1.png"], ["red0.png", "blue1.png"], ["red0.png", "red1.png"]]
    rows = [{"images": pair, "caption": text} for pair, text in zip(pairs, ("one", "two", "three"), strict=True)]
    data = write_jsonl(tmp_path / "captions.jsonl", rows)

    asked: list[Example] = []

    class Parrot:
        name = "parrot"

        def reply(self, examples: list[Example], task: str, **_: object) -> list[Completion]:
            asked.extend(examples)
            return [Completion("one", 2, True, -0.1) for _ in examples]

    told: list[str] = []
    found = evaluate(cast(Any, Parrot()), data, task="caption", tell=told.append)
    assert found["n"] == 2
    assert [example.answers for example in asked] == [("one", "three"), ("two",)]
    assert found["in_training"] is None and "training data are not here" in told.pop(0)
    assert [line.split()[0] for line in told] == [name for name in ("METEOR", "SPICE") if name not in found]
