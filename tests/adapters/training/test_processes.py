"""Training in two processes, started as the README says: the same as in one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors import safe_open
from tiny import draw_captions, draw_data, save_tiny_bert, tiny_values

ROOT = Path(__file__).parents[3]
# The configuration that ships for two GPUs; with --device cpu its two processes run there. (accelerate's own --cpu
# starts a single one, whatever --num_processes says.)
TWO = ROOT / "adapters" / "accelerate" / "two_gpus.yaml"


def run(folder: Path, *arguments: str, processes: int) -> None:
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(TWO)] if processes > 1 else []
    environment = os.environ | {"QUERYBRIDGE_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launch, "-m", "serve.cli", *arguments, "--device", "cpu", "--dtype", "float32"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]


def validations(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "val_loss" in line]


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_two_processes_finetune_as_one(vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path) -> None:
    values: Any = tiny_values(vision_folder, language_folders["llama"], draw_data(tmp_path / "data"), max_steps=6)
    values["bridge"]["dropout"] = 0.0
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    for processes in (1, 2):
        out = tmp_path / f"run{processes}"
        run(tmp_path, "finetune", str(tmp_path / "recipe.yaml"), "--out", str(out), processes=processes)
    one, two = losses(tmp_path / "run1"), losses(tmp_path / "run2")
    assert len(one) == 6 and two == pytest.approx(one, rel=1e-4)
    with safe_open(tmp_path / "run2" / "state" / "rng.safetensors", "pt") as state:
        assert {name.split(".")[0] for name in state.keys()} == {"0", "1"}  # noqa: SIM118  (it is no mapping)
    for alone, shared in zip(validations(tmp_path / "run1"), validations(tmp_path / "run2"), strict=True):
        assert shared["val_loss"] == pytest.approx(alone["val_loss"], rel=1e-3)
        for name in ("val_exact_match", "val_exact_match_low", "val_blank_images"):
            assert shared[name] == alone[name]
    # and on from its state, with the generators of both processes
    longer = ["finetune", str(tmp_path / "recipe.yaml"), "--out", str(tmp_path / "run2"), "--resume"]
    run(tmp_path, *longer, processes=2)


@pytest.mark.slow
def test_two_processes_pretrain(vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path) -> None:
    data = draw_captions(tmp_path / "data")
    values: Any = tiny_values(vision_folder, language_folders["llama"], data, max_steps=4, batch_size=4)
    values["task"] = "caption"
    values["bridge"] |= {"start": str(save_tiny_bert(tmp_path / "bert")), "dropout": 0.0, "text_branch": True}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    for processes in (1, 2):
        out = tmp_path / f"run{processes}"
        run(tmp_path, "pretrain", str(tmp_path / "recipe.yaml"), "--stage", "1", "--out", str(out), processes=processes)
    first = [json.loads((tmp_path / f"run{n}" / "metrics.jsonl").read_text().splitlines()[0]) for n in (1, 2)]
    assert first[1]["itc"] == pytest.approx(first[0]["itc"], rel=1e-4)  # negatives come from both processes
    assert first[1]["itg"] == pytest.approx(first[0]["itg"], rel=1e-4)  # each token counts alike in both
