"""The check on a GPU, at a tiny size on a CPU: every part runs, and the page says what it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from scripts_as_modules import load_script
from tiny import draw_data, save_tiny_efficientnet

pytestmark = pytest.mark.usefixtures("cache_here")


def test_the_check_runs_on_a_cpu_and_says_that_it_waits_for_a_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check = load_script("check_gpu", monkeypatch)
    data = str(draw_data(tmp_path / "data"))
    page = tmp_path / "gpu.md"
    page.write_text(f"old figures\n{check.KEPT}\n\n## Kept\n")
    words = ["--out", str(tmp_path / "out"), "--device", "cpu", "--steps", "12", "--questions", "4", "--timed", "2"]
    words += ["--tower", str(save_tiny_efficientnet(tmp_path / "tower")), "--data", data, "--test", data]
    status = check.main([*words, "--page", str(page), "--no-tests"])
    found = json.loads((tmp_path / "out" / "found.json").read_text())
    assert status == int(bool(found["wrong"]))
    text = page.read_text()
    assert "waiting for a GPU" in text and "old figures" not in text and text.endswith(f"{check.KEPT}\n\n## Kept\n")
    assert {name: len(rows) for name, rows in found["rows"].items()} == {
        "training": 2, "memory": 2, "answers": 4, "speed": 2
    }  # fmt: skip
    first = found["rows"]["answers"][0]
    assert first[:2] == ["float32", "100.0%"]


def test_without_a_gpu_one_line_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    check = load_script("check_gpu", monkeypatch)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert check.main(["--out", str(tmp_path / "out")]) == 2
    assert "--device cpu" in capsys.readouterr().err and not (tmp_path / "out").exists()
