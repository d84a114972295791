"""The rehearsal of a recipe at its real size, at a tiny one: what is built is loaded, trained, saved and asked."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from published import save_published
from safetensors import safe_open
from scripts_as_modules import load_script
from tiny import save_tiny_bert

from adapters.memory.known_models import KNOWN_MODELS

pytestmark = pytest.mark.usefixtures("cache_here")


def recipe_file(folder: Path, tower: Path, language: Path, start: Path | None) -> Path:
    values: dict[str, Any] = {
        "data": {"train": "not_read.jsonl"},
        "vision": {"towers": [{"source": str(tower)}]},
        "bridge": {"preset": "tiny", "num_queries": 3, "start": str(start) if start else None},
        "language": {"source": str(language), "lora": {"rank": 4, "alpha": 8}},
        "train": {"micro_batch_tokens": 160},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(values))
    return folder / "recipe.yaml"


@pytest.mark.slow
@pytest.mark.skipif("QUERYBRIDGE_SLOW_TESTS" not in os.environ, reason="takes a minute: set QUERYBRIDGE_SLOW_TESTS=1")
def test_a_recipe_is_built_trained_loaded_and_asked(
    tmp_path: Path,
    vision_folder: Path,
    language_folders: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rehearse = load_script("rehearse", monkeypatch)
    recipe = recipe_file(tmp_path, vision_folder, language_folders["llama"], save_tiny_bert(tmp_path / "bert"))
    out = tmp_path / "out"
    status = rehearse.main([str(recipe), "--out", str(out)])
    said = capsys.readouterr().out
    assert "train: " in said and "answer: " in said and "of it" in said
    trained, asked = (json.loads((out / f"{name}.json").read_text()) for name in ("train", "answer"))
    calculated = json.loads((out / "estimate.json").read_text())["total_gib"] * 2**30
    assert status == int(abs(trained["anonymous"] / calculated - 1) > rehearse.WITHIN)
    assert trained["anonymous"] > 100 * 2**20 and max(trained["course"]) == trained["anonymous"]
    assert any("step 2" in line for line, _ in trained["stages"])
    assert asked["output"].strip()
    with safe_open(out / "run" / "best" / "bridge.safetensors", "pt") as kept:
        assert any("query" in name for name in kept.keys())  # noqa: SIM118  (not a mapping)


@pytest.mark.parametrize("kind", ["blip2-opt", "instructblip-t5"])
def test_a_whole_checkpoint_holds_what_transformers_saves(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = load_script("random_weights", monkeypatch)
    save_published(tmp_path / "theirs", kind)
    count = weights.build(weights.folder_config(tmp_path / "theirs"), tmp_path / "ours")
    theirs, ours = shapes(tmp_path / "theirs"), shapes(tmp_path / "ours")
    assert ours == theirs and count == sum(size for size in map(numbers, theirs.values()))


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {}
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            found |= {name: tuple(opened.get_slice(name).get_shape()) for name in opened.keys()}  # noqa: SIM118
    return found


def numbers(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count


def test_shipped_recipes_have_the_shapes_that_are_published(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = load_script("random_weights", monkeypatch)
    vision = KNOWN_MODELS["Salesforce/blip2-opt-2.7b"].config
    config = weights.whole_config(vision, KNOWN_MODELS["facebook/opt-2.7b"].config)
    assert (config.vision_config.hidden_size, config.qformer_config.encoder_hidden_size) == (1408, 1408)
    assert (config.qformer_config.num_hidden_layers, config.num_query_tokens) == (12, 32)
    assert (config.text_config.ffn_dim, config.text_config.num_hidden_layers) == (10240, 32)


def test_a_mistake_is_one_line(
    tmp_path: Path, vision_folder: Path, language_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearse = load_script("rehearse", monkeypatch)
    recipe = recipe_file(tmp_path, vision_folder, language_folders["llama"], None)
    assert rehearse.main([str(recipe), "--out", str(tmp_path / "out"), "--parts", "paint"]) == 2
    assert rehearse.main(["no_such_recipe", "--out", str(tmp_path / "out")]) == 2
