"""The calculated memory against real models: loaded ones for weights, a real pass on the CPU for activations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from references import linear_memory
from typer.testing import CliRunner

from adapters.loading.assembly import assemble
from adapters.memory.activations import LiveBytes, MicroBatch, measure_activations
from adapters.memory.estimate import describe_estimate, estimate_memory
from adapters.memory.meta_model import build_meta_model
from adapters.memory.summary import four_bit_bytes, summarise_modules
from adapters.recipe import Recipe, load_recipe, parse_recipe
from qformer.errors import UserError
from qformer.model import TokenBatch

KINDS = ["llama", "qwen2", "opt", "t5"]
SHAPE = MicroBatch(rows=4, row_tokens=40, answer_tokens=8)


def recipe_of(tower: Path | str, language: Path | str, **changes: Any) -> Recipe:
    values: dict[str, Any] = {
        "vision": {"towers": [{"source": str(tower)}]},
        "bridge": {"preset": "tiny", "dropout": 0.0},
        "language": {"source": str(language), **changes},
    }
    return parse_recipe(values, "test")


def skeleton(recipe: Recipe, quantized: bool = True, attention: str = "eager") -> Any:
    return build_meta_model(
        recipe, compute_dtype=torch.float32, tower_dtype=torch.float32, quantized=quantized, attention=attention
    )


@pytest.mark.parametrize(("kind", "quantize"), [*((kind, "nf4") for kind in KINDS), ("opt", "int8"), ("t5", "int8")])
def test_a_skeleton_is_what_is_loaded(
    cache_here: Path, vision_folder: Path, language_folders: dict[str, Path], kind: str, quantize: str
) -> None:
    """Every group of weights of the loaded packed model: dtype, quantised, trained, count and bytes."""
    recipe = recipe_of(vision_folder, language_folders[kind], quantize=quantize)
    loaded = summarise_modules(assemble(recipe, device="cpu", dtype="float32").model)
    assert summarise_modules(skeleton(recipe)) == loaded
    assert any(part.quantized for part in loaded) and any(part.trainable for part in loaded)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_four_bit_bytes_are_those_of_a_loaded_llm(
    cache_here: Path, vision_folder: Path, language_folders: dict[str, Path], kind: str
) -> None:
    recipe = recipe_of(vision_folder, language_folders[kind], lora=None)
    loaded = assemble(recipe, device="cpu", dtype="float32").model.language.base
    calculated = sum(part.bytes for part in summarise_modules(skeleton(recipe)) if part.name == "LLM linear layers")
    assert calculated == pytest.approx(linear_memory(loaded)["linear"], rel=0.01)


@pytest.mark.parametrize("shape", [(64, 64), (576, 1536), (100, 96)])
def test_four_bit_bytes_are_those_of_a_real_layer(shape: tuple[int, int]) -> None:
    layer = Linear4bit(*shape, bias=False, quant_type="nf4", compress_statistics=True).to("cpu")
    assert four_bit_bytes(shape[0] * shape[1]) == pytest.approx(linear_memory(torch.nn.Sequential(layer))["linear"])


def test_double_quantisation_takes_what_its_paper_says() -> None:
    """8 / 64 + 32 / (64 · 256) = 0.127 bit a parameter (arXiv 2305.14314, section 3)."""
    assert 8 * four_bit_bytes(2**24) / 2**24 == pytest.approx(4.127, abs=1e-3)


@pytest.mark.parametrize(("kind", "checkpointing"), [("llama", False), ("llama", True), ("opt", True)])
def test_a_rehearsal_is_what_a_real_pass_holds(
    cache_here: Path, vision_folder: Path, language_folders: dict[str, Path], kind: str, checkpointing: bool
) -> None:
    """The same count over a real forward and backward of `VisionLanguageModel` on the CPU."""
    recipe = recipe_of(vision_folder, language_folders[kind], quantize="none", gradient_checkpointing=checkpointing)
    rehearsed = measure_activations(skeleton(recipe), SHAPE)
    model = assemble(recipe, device="cpu", dtype="float32").model.train()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    size = (SHAPE.rows, SHAPE.row_tokens)
    labels = torch.full(size, -100)
    labels[:, -SHAPE.answer_tokens :] = 7
    slots = torch.zeros(size, dtype=torch.bool)
    slots[:, : model.num_queries] = True
    mask = torch.ones(size[0], 1, size[1], size[1], dtype=torch.bool).tril()
    positions = torch.arange(size[1]).expand(size)
    batch = TokenBatch(torch.full(size, 6), mask, slots, labels, positions)
    features = [torch.randn(SHAPE.rows, 5, 24)]
    with LiveBytes() as live:
        loss, count = model(batch, features)
        loss.backward()
    assert count == SHAPE.rows * SHAPE.answer_tokens
    assert rehearsed == pytest.approx(live.peak, rel=0.05)


def test_few_blocks_stand_for_many_and_checkpointing_keeps_less(vision_folder: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig

    sizes = {"hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaConfig(vocab_size=128, num_hidden_layers=6, **sizes).save_pretrained(tmp_path)

    def activations(depth: int, checkpointing: bool) -> int:
        recipe = recipe_of(vision_folder, tmp_path, gradient_checkpointing=checkpointing)
        return measure_activations(skeleton(recipe, quantized=False), SHAPE, depth=depth)

    plain, less = activations(0, False), activations(0, True)
    assert less < 0.5 * plain
    assert activations(2, False) == pytest.approx(plain, rel=0.02)
    assert activations(2, True) == pytest.approx(less, rel=0.02)


def test_a_micro_batch_holds_as_many_pictures_as_its_tokens_allow() -> None:
    assert MicroBatch.of(4096, num_queries=32).rows == 4096 // (32 + 48)
    assert MicroBatch.of(16, num_queries=32).rows == 1


def test_an_estimate_adds_up_and_is_json() -> None:
    found = json.loads(json.dumps(estimate_memory(load_recipe("easy_vqa_cpu"))))
    assert found["device"] == "cpu" and found["fits"] is None  # all its models come in wheels
    assert sum(found["bytes"].values()) / 2**30 == pytest.approx(found["total_gib"])
    trainable = found["parameters"]["trainable"]
    assert trainable["total"] == sum(count for name, count in trainable.items() if name != "total")
    assert found["bytes"]["optimiser"] == 2 * found["bytes"]["gradients"] == 8 * trainable["total"]
    text = describe_estimate(found)
    assert f"{trainable['total']:,}" in text and "GiB" in text and "activations" in text


def test_a_gpu_is_calculated_for_where_it_is_asked() -> None:
    found = estimate_memory(load_recipe("easy_vqa_cpu"), device="cuda")
    encoder = next(module for module in found["modules"] if module["name"] == "image encoder 0")
    assert (found["compute_dtype"], encoder["dtype"], found["fits"]) == ("bfloat16", "float16", 6)


@pytest.mark.parametrize(
    ("key", "source"),
    [
        ("language.source", "nobody/no-such-model"),
        ("language.source", "pypi:no-such-wheel"),
        ("language.source", "not a name"),
        ("vision.towers.0.source", "nobody/no-such-tower"),
    ],
)
def test_an_unknown_model_is_one_line_that_says_how_to_go_on(cache_here: Path, key: str, source: str) -> None:
    recipe = load_recipe("easy_vqa_cpu", [f"{key}={source}"])
    with pytest.raises(UserError) as caught:
        estimate_memory(recipe)
    message = str(caught.value)
    assert key in message and source in message and "folder" in message and "\n" not in message


def test_a_tower_of_no_known_kind_is_one_line(cache_here: Path, language_folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"model_type 'llama'.*clip"):
        estimate_memory(recipe_of(language_folders["llama"], language_folders["llama"]))


def test_the_command_prints_one_json_object() -> None:
    from serve.cli.command import app

    done = CliRunner().invoke(app, ["estimate", "easy_vqa_cpu", "--json"])
    assert done.exit_code == 0
    assert json.loads(done.stdout)["total_gib"] > 0
