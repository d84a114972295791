"""A complete tiny adapter, trained for three steps on drawn pictures, for the engine, the batch job and the command."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from api_server import served
from command import Call, Outcome
from data_rows import borrowed, write_jsonl
from PIL import Image, ImageDraw
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from adapters.finetune import finetune
from adapters.recipe import load_recipe
from qformer.decoding import Decoding
from serve.adapter import LoadedAdapter, load_adapter
from serve.batch.predictor import VQAPredictor
from serve.cli.command import main

QUESTIONS = ["what colour is it?", "is it a circle?", "is it red?"]
COLOURS = {"red": (220, 20, 60), "green": (46, 139, 87), "blue": (65, 105, 225)}


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _own_cache(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUERYBRIDGE_CACHE", str(cache_folder))


@pytest.fixture(scope="session")
def data_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve pictures in three colours and two shapes, two questions about each."""
    folder = tmp_path_factory.mktemp("pictures")
    rows = []
    for number in range(12):
        name, colour = list(COLOURS.items())[number % 3]
        picture = Image.new("RGB", (40, 40), "white")
        draw = ImageDraw.Draw(picture)
        place = (4 + number, 6, 24 + number, 28)
        (draw.ellipse if number % 2 else draw.rectangle)(place, fill=colour)
        picture.save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "question": "what colour is it?", "answer": name})
        rows.append({"image": f"{number}.png", "question": "is it a circle?", "answer": "yes" if number % 2 else "no"})
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return folder / "data.jsonl"


@pytest.fixture(scope="session")
def clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP tower of 16 patches, as a hub would hold it."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=32, patch_size=8)).save_pretrained(folder)
    side = {"height": 32, "width": 32}
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=side).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def recipe_file(
    tmp_path_factory: pytest.TempPathFactory, clip_folder: Path, language_folders: dict[str, Path], data_file: Path
) -> Path:
    recipe = {
        "description": "Tells the colour and the shape.",
        "data": {"train": str(data_file), "val_fraction": 0.2},
        "vision": {"towers": [{"source": str(clip_folder)}]},
        "bridge": {"preset": "tiny"},
        "language": {"source": str(language_folders["llama"]), "quantize": "nf4", "lora": {"rank": 2, "alpha": 4}},
        "train": {"max_steps": 3, "batch_size": 8, "warmup_steps": 0, "validate_every": 3, "log_every": 1},
    }
    path = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory, recipe_file: Path, cache_folder: Path) -> Path:
    """A finished run; copy it before changing anything in it."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(cache_folder))
        finetune(load_recipe(recipe_file), folder, device="cpu", dtype="float32", quiet=True)
    return folder


@pytest.fixture(scope="session")
def engine(run_folder: Path, cache_folder: Path) -> Iterator[LoadedAdapter]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(cache_folder))
        yield load_adapter(run_folder, device="cpu", dtype="float32", offline=True)


@pytest.fixture
def predictor(engine: LoadedAdapter) -> VQAPredictor:
    """A predictor over the session's engine, so that the models are loaded once."""
    predictor = object.__new__(VQAPredictor)
    predictor.engine, predictor.decoding, predictor.batch_size = engine, Decoding(max_new_tokens=5), 4
    return predictor


@pytest.fixture
def rows(data_file: Path, tmp_path: Path) -> list[dict[str, Any]]:
    return [
        {"image": borrowed(data_file.parent / f"{number % 5}.png", tmp_path), "question": QUESTIONS[number % 3]}
        for number in range(10)
    ]


@pytest.fixture
def source(tmp_path: Path, rows: list[dict[str, Any]]) -> Path:
    return write_jsonl(tmp_path / "rows.jsonl", rows)


@pytest.fixture
def url(engine: Any) -> Iterator[str]:
    """The address of a server over the module's engine."""
    with served(engine) as url:
        yield url


@pytest.fixture
def pool() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Call:
    # What the command sets before it imports transformers comes too late in this process; test_cli sees it work.
    monkeypatch.setattr("transformers.utils.logging._tqdm_active", False)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["querybridge", *map(str, arguments)])
        capfd.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main()
        out, err = capfd.readouterr()
        return Outcome(int(exit_.value.code or 0), out, err)

    return run
