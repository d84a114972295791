"""Fixtures shared by the tests of every room."""

from __future__ import annotations

import json
import os
from pathlib import Path

# One thread, and none that spins while it waits: the models are tiny, and a busy core beside the tests must not slow
# them. This comes before torch is imported, and what a test starts inherits it.
os.environ |= {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "TOKENIZERS_PARALLELISM": "false",
}

import pytest
import torch
from tiny import make_tokenizer, tiny_language_model

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def language_folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Folders of tiny LLMs as `qformer.sources.resolve` would return them; llama and qwen2 have a chat template."""
    folders = {}
    for kind in ("llama", "qwen2", "opt", "t5"):
        folder = tmp_path_factory.mktemp("language") / kind
        tiny_language_model(kind).save_pretrained(folder)
        make_tokenizer(chat=kind in ("llama", "qwen2")).save_pretrained(folder)
        folders[kind] = folder
    return folders


@pytest.fixture(scope="session")
def vision_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a tiny random CLIP tower: 32×32 pixels, patches of 16, 24 wide."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vision")
    config = CLIPVisionConfig(
        hidden_size=24, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, image_size=32, patch_size=16
    )
    CLIPVisionModel(config).save_pretrained(folder)
    size = {"height": 32, "width": 32}
    processor = {"image_processor_type": "CLIPImageProcessor", "size": size, "crop_size": size, "do_center_crop": False}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.fixture
def cache_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache folder of the test's own."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("QUERYBRIDGE_CACHE", str(folder))
    return folder
