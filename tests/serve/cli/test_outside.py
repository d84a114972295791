"""Pictures outside the data's folder, as the commands meet them."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import FAST, Call
from data_rows import VQA, write_jsonl
from PIL import Image


@pytest.fixture
def places(tmp_path: Path) -> Path:
    """A folder of data, with a picture in it and one beside it."""
    data = tmp_path / "data"
    (data / "pictures").mkdir(parents=True)
    for place in (tmp_path / "b.png", data / "pictures" / "own.png"):
        Image.new("RGB", (8, 8), "red").save(place)
    return data


def test_what_a_converted_file_needs_is_told(call: Call, places: Path, tmp_path: Path) -> None:
    path = write_jsonl(places / "rows.jsonl", [VQA | {"image": "pictures/own.png"}])
    beside = call("data", "convert", path, "--out", places / "new.jsonl")
    assert beside.code == 0 and "--allow-outside" not in beside.err
    elsewhere = call("data", "convert", path, "--out", tmp_path / "new.jsonl")
    assert elsewhere.code == 0 and "read it with --allow-outside" not in elsewhere.err  # they lie below it
    (tmp_path / "other").mkdir()
    apart = call("data", "convert", path, "--out", tmp_path / "other" / "new.jsonl")
    assert apart.code == 0 and "read it with --allow-outside" in apart.err
    refused = call("data", "check", tmp_path / "other" / "new.jsonl")
    assert refused.code == 2 and "--allow-outside" in refused.out
    assert call("data", "check", tmp_path / "other" / "new.jsonl", "--allow-outside").code == 0


def test_each_command_names_the_flag_and_takes_it(call: Call, run_folder: Path, places: Path, tmp_path: Path) -> None:
    path = write_jsonl(places / "rows.jsonl", [VQA | {"image": str(tmp_path / "b.png")}])
    for command in (
        ["data", "preview", path, "--out", tmp_path / "sheet.png"],
        ["evaluate", path, "--adapter", run_folder, *FAST],
        ["batch", path, "--out", tmp_path / "answers.jsonl", "--adapter", run_folder, *FAST],
    ):
        refused = call(*command).mistake()
        assert f"{path} row 1 (line 1): image '{tmp_path / 'b.png'}' lies outside" in refused
        assert "add --allow-outside" in refused
        assert call(*command, "--allow-outside").code == 0


def test_training_keeps_it_in_the_recipe(call: Call, places: Path, tmp_path: Path) -> None:
    path = write_jsonl(places / "rows.jsonl", [VQA | {"image": "../b.png"}])
    assert "--allow-outside" in call("finetune", path, "--out", tmp_path / "run").mistake()
    for command in (["finetune", path], ["pretrain", path, "--stage", "1"]):
        told = call(*command, "--allow-outside", "--out", tmp_path / "run", "--set", "train.epochs=x").mistake()
        assert "train.epochs" in told  # the recipe is read, and the rows are not refused
