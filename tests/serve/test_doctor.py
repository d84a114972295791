"""What `doctor` says of the machine and of a loaded model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from references import linear_memory

from adapters.artefact.artefact import load_artefact
from qformer.errors import UserError
from serve import doctor
from serve.adapter import load_adapter
from serve.doctor import describe, examine


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Anything that would load or fetch a model fails."""

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("nothing may be loaded or fetched here")

    for name in (
        "adapters.loading.assembly.assemble",
        "adapters.artefact.artefact.load_artefact",
        "qformer.sources.resolve",
    ):
        monkeypatch.setattr(name, refuse)
    monkeypatch.setattr("qformer.wheels.build", refuse)
    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)


@pytest.mark.usefixtures("no_loading")
def test_the_machine_alone(cache_here: Path) -> None:
    found = json.loads(json.dumps(examine()))
    assert "model" not in found
    assert found["libraries"]["torch"] == torch.__version__
    assert found["cpu"]["cores"] >= 1 and found["cpu"]["compute_dtype"] in ("float32", "bfloat16")
    assert found["four_bit"]["cpu"] == "works"
    assert found["cache"]["folder"] == str(cache_here) and not cache_here.exists()  # looking makes nothing
    assert found["cache"]["free_gib"] > 0
    assert len(found["gpus"]) == torch.cuda.device_count()
    text = describe(found)
    for words in (torch.__version__, found["cpu"]["name"], str(cache_here), "4-bit on the cpu", "works"):
        assert words in text


def test_a_recipes_modules(recipe_file: Path) -> None:
    found = examine(str(recipe_file), device="cpu", dtype="float32", offline=True)["model"]
    names = [module["name"] for module in found["modules"]]
    assert names[:4] == ["image encoder 0", "feature norm", "bridge", "projection"] and names[-1] == "LoRA"
    modules = {module["name"]: module for module in found["modules"]}
    assert modules["LLM linear layers"]["dtype"] == "nf4" and modules["LLM linear layers"]["quantized"]
    trained = {name for name, module in modules.items() if module["trainable"]}
    assert trained == {"feature norm", "bridge", "projection", "LoRA"}
    assert found["trainable"] == sum(modules[name]["parameters"] for name in trained)
    assert found["bytes"] == sum(module["bytes"] for module in found["modules"])
    assert (found["device"], found["compute_dtype"]) == ("cpu", "float32")


def test_an_adapters_modules_are_counted_as_torch_counts_them(run_folder: Path) -> None:
    found = examine(str(run_folder), device="cpu", dtype="float32", offline=True)
    assembly, _ = load_artefact(run_folder, device="cpu", dtype="float32", offline=True)
    model = assembly.model  # in 4-bit, as it is trained
    plain = sum(p.numel() for p in model.parameters() if type(p).__name__ != "Params4bit")
    packed = sum(2 * p.numel() for p in model.parameters() if type(p).__name__ == "Params4bit")
    assert found["model"]["parameters"] == plain + packed
    assert found["model"]["trainable"] == sum(p.numel() for p in model.parameters() if p.requires_grad)
    linear = sum(module["bytes"] for module in found["model"]["modules"] if module["quantized"])
    lora = sum(module["bytes"] for module in found["model"]["modules"] if module["name"] == "LoRA")
    assert linear + lora == pytest.approx(linear_memory(model.language.base)["linear"], rel=0.01)
    text = describe(found)
    table = text[text.index("module ") :].splitlines()
    assert len({len(line) for line in table[:-2]}) == 1  # columns are aligned
    assert "frozen" in text and "trained" in text and f"{found['model']['parameters']:,}" in text


def test_what_answering_takes_is_what_a_served_adapter_holds(run_folder: Path) -> None:
    found = examine(str(run_folder), device="cpu", dtype="float32", offline=True)
    served = load_adapter(str(run_folder), device="cpu", dtype="float32", offline=True).assembly.model.language.base
    trained, _ = load_artefact(run_folder, device="cpu", dtype="float32", offline=True)
    unpacked = linear_memory(served)["linear"] - linear_memory(trained.model.language.base)["linear"]
    assert unpacked > 0
    assert found["model"]["serving_bytes"] - found["model"]["bytes"] == pytest.approx(unpacked, rel=0.01)
    assert "unpacked" in describe(found).splitlines()[-1]


@pytest.mark.parametrize("target", ["no_such_thing", "gone.jsonl"])
def test_what_is_neither_recipe_nor_adapter_is_one_line(target: str) -> None:
    with pytest.raises(UserError, match=target) as caught:
        examine(target)
    assert "easy_vqa_cpu" in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_without_an_adapter_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no artefact"):
        examine(str(tmp_path))


def test_broken_four_bit_is_told_and_not_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel for this\nand more")

    monkeypatch.setattr("bitsandbytes.nn.Linear4bit.forward", broken)
    assert doctor._four_bit("cpu") == "does not work: no kernel for this"
    monkeypatch.setattr("bitsandbytes.nn.Linear4bit.forward", lambda _, x: torch.zeros_like(x))
    assert "off by 100 %" in doctor._four_bit("cpu")


def test_gpus_are_described(cache_here: Path) -> None:
    found = examine()
    found["gpus"] = [{"name": "Some GPU", "memory_gib": 23.6, "bf16": True}]
    assert "Some GPU, 23.6 GiB, bfloat16 yes" in describe(found)
