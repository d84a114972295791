"""The probe of an image encoder: it finds what features show, and no more."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from scripts_as_modules import load_script

from adapters.data.scenes.drawing import make_scenes


def f1_of(features: torch.Tensor, shown: torch.Tensor, patch: pytest.MonkeyPatch) -> float:
    """What the probe's F1 is on the last third, learned from the rest."""
    script = load_script("probe_encoder", patch)
    patch.setattr(script, "EPOCHS", 100)
    torch.manual_seed(0)
    learned = 2 * len(features) // 3
    found = script.probe(features[:learned], shown[:learned], features[learned:]) > 0
    right = shown[learned:] > 0
    return float(2 * (found & right).sum() / (found.sum() + right.sum()))


def test_what_a_patch_shows_is_found_and_noise_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    shown = (torch.rand(90, 6, generator=generator) < 0.3).float()
    patches = torch.zeros(90, 9, 6)
    for row, column in shown.nonzero():
        place = torch.randint(9, (1,), generator=generator)
        patches[row, place, column] = 4.0
    assert f1_of(patches, shown, monkeypatch) > 0.95
    assert f1_of(torch.randn(90, 9, 6, generator=generator), shown, monkeypatch) < 0.6


def test_things_are_those_of_the_scene(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes = make_scenes(5, 0)
    shown = load_script("probe_encoder", monkeypatch).things_in(scenes)
    assert shown.shape == (5, 35)
    assert [int(row.sum()) for row in shown] == [len({(t.colour, t.shape) for t in s.things}) for s in scenes]


def test_each_layer_gets_a_line_and_a_wrong_one_is_told(
    vision_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = load_script("probe_encoder", monkeypatch)
    monkeypatch.setattr(script, "EPOCHS", 1)
    few = ["--train", "6", "--test", "4"]
    monkeypatch.setattr("sys.argv", ["probe_encoder.py", str(vision_folder), "--layers=-1,-2", *few])
    assert script.main() == 0
    assert re.fullmatch(r"(layer -[12]: \d+ patches of \d+, F1 (0\.\d{3}|1\.000)\n){2}", capsys.readouterr().out)
    monkeypatch.setattr("sys.argv", ["probe_encoder.py", str(vision_folder), "--layers=-90", *few])
    assert script.main() == 2
    assert "layer -90" in capsys.readouterr().err
