"""The GPU recipes with no GPU and no hub: each is built on the meta device from its published configuration.

Published parameter counts are the independent reference; each recipe's header is held to what is built.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from adapters.memory.estimate import estimate_memory
from adapters.memory.known_models import KNOWN_MODELS
from adapters.memory.meta_model import build_meta_model
from adapters.memory.summary import ModuleSummary, is_four_bit, summarise_modules
from adapters.recipe import load_recipe, shipped_recipes
from adapters.training.setup import read_split
from qformer.errors import UserError
from qformer.model import TokenBatch, VisionLanguageModel

RECIPES = sorted(name for name in shipped_recipes() if name.startswith("gpu_"))
REHEARSED = ("gpu_clip224_smollm2", "gpu_blip2_opt")  # of the others, the part that takes seconds is marked slow
NUMBER = r"([\d,.]+)"
HEADER = re.compile(
    rf"trainable parameters\s+{NUMBER} \(bridge, norm and projection {NUMBER}; LoRA {NUMBER}\)"
    rf".*in 4-bit\s+{NUMBER} of {NUMBER} in the LLM's linear layers"
    rf".*weights {NUMBER} \+ gradients {NUMBER} \+ optimiser {NUMBER} \+ activations {NUMBER} \+ features {NUMBER}"
    rf".*\+ the rest {NUMBER} = {NUMBER} GiB: a GPU of {NUMBER} GB.*checkpointing, {NUMBER} pictures"
    rf".*feature cache\s+{NUMBER} MiB"
)


def header(name: str) -> list[float]:
    """The numbers in a recipe's opening comment, in their order."""
    lines = shipped_recipes()[name].read_text(encoding="utf-8").split("task:")[0].splitlines()
    text = " ".join(line.lstrip("#").strip() for line in lines)
    match = HEADER.search(text)
    assert match, f"{name}: the header is not worded as the others are"
    return [float(number.replace(",", "")) for number in match.groups()]


def build(name: str, **changes: Any) -> VisionLanguageModel:
    options = {"compute_dtype": torch.bfloat16, "tower_dtype": torch.float16, **changes}
    return build_meta_model(load_recipe(name), **options)


def size_of(parts: list[ModuleSummary], *names: str, trainable: bool | None = None) -> int:
    return sum(
        part.parameters for part in parts if part.name in names and trainable in (None, part.trainable)
    )  # fmt: skip


def unpinned(source: str) -> str:
    """A hub's name without its revision."""
    return source.partition("@")[0]


@pytest.mark.parametrize("name", RECIPES)
def test_what_the_hub_gives_is_pinned_to_a_commit(name: str) -> None:
    """All but two: one whose known commits hold a pickle alone, and one of which no commit is known here."""
    recipe = load_recipe(name)
    sources = {recipe.vision.towers[0].source, recipe.language.source, recipe.bridge.start or ""}
    loose = {"openai/clip-vit-large-patch14-336", "Salesforce/instructblip-flan-t5-xl"}
    assert all(re.fullmatch(r"[^@]+@[0-9a-f]{40}", source) for source in sources - loose)


def test_the_pairs_the_project_promises_are_there() -> None:
    pairs = {
        (unpinned(recipe.vision.towers[0].source), unpinned(recipe.language.source))
        for recipe in (load_recipe(name) for name in RECIPES)
    }  # fmt: skip
    clip = ("openai/clip-vit-large-patch14", "openai/clip-vit-large-patch14-336")
    llms = ("HuggingFaceTB/SmolLM2-1.7B-Instruct", "Qwen/Qwen3-4B-Instruct-2507", "Qwen/Qwen2.5-7B-Instruct")
    whole = {f"Salesforce/{name}" for name in ("blip2-opt-2.7b", "blip2-flan-t5-xl", "instructblip-flan-t5-xl")}
    assert pairs == {(tower, llm) for tower in clip for llm in llms} | {(source, source) for source in whole}


@pytest.mark.parametrize("name", RECIPES)
def test_trainable_parameters_and_four_bit_coverage_are_as_the_header_says(name: str) -> None:
    model = build(name)
    parts = summarise_modules(model)
    trainable, ours, lora, quantized, linear, weights, gradients, optimiser, *_ = header(name)
    assert size_of(parts, "bridge", "feature norm", "projection", trainable=True) == ours
    assert size_of(parts, "LoRA", trainable=True) == lora
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable == ours + lora
    assert sum(part.parameters for part in parts if part.quantized) == quantized
    assert size_of(parts, "LLM linear layers") == linear
    assert sum(part.bytes for part in parts) / 2**30 == pytest.approx(weights, abs=0.01)
    assert 4 * trainable / 2**30 == pytest.approx(gradients, abs=0.01)
    assert 8 * trainable / 2**30 == pytest.approx(optimiser, abs=0.01)
    for part in (model.encoders, model.feature_norm, model.bridge, model.projection):
        assert not any(is_four_bit(parameter) for parameter in part.parameters())
    assert not any(parameter.requires_grad for parameter in model.encoders.parameters())
    head = model.language.base.get_output_embeddings()
    plain = {
        path.rpartition(".")[2]
        for path, module in model.language.base.named_modules()
        if type(module) is torch.nn.Linear and "lora_" not in path and module is not head
    }
    if model.language.is_encoder_decoder:  # transformers keeps T5's `wo` in 16 bit: 48 blocks of 2048 x 5120
        assert plain == {"base_layer"} and linear - quantized == 48 * 2048 * 5120
    else:
        assert not plain and quantized == linear


@pytest.mark.parametrize("name", RECIPES)
def test_shapes_fit_from_pixels_to_the_loss(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole forward runs on meta tensors. Labels are real, as they say how long the loss is, and nothing else may
    look at values: attention is eager, and T5's padding mask is made without a look at whether it is needed."""

    def cross_entropy(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> torch.Tensor:
        return real_cross_entropy(logits, target.to(logits.device), **options)

    real_cross_entropy = F.cross_entropy
    monkeypatch.setattr(F, "cross_entropy", cross_entropy)
    monkeypatch.setattr("transformers.masking_utils._ignore_bidirectional_mask_sdpa", lambda *_: False)
    options = {"compute_dtype": torch.float32, "tower_dtype": torch.float32, "quantized": False}
    model = build(name, **options, attention="eager")
    model.eval()
    pictures, length, answer = 2, 48, 5
    encoder: Any = model.encoders[0]
    features = encoder(torch.empty(pictures, 3, encoder.image_size, encoder.image_size, device="meta"))
    assert features.shape == (pictures, encoder.num_tokens, encoder.width)
    embeddings = model.image_embeddings([features])
    assert embeddings.shape == (pictures, 32, model.language.width)
    labels = torch.full((pictures, answer if model.language.is_encoder_decoder else length), -100)
    labels[:, -answer:] = 3
    ids = torch.zeros(pictures, length, dtype=torch.long, device="meta")
    slots = torch.zeros(pictures, length, dtype=torch.bool, device="meta")
    if model.language.can_pack:
        mask = torch.ones(pictures, 1, length, length, dtype=torch.bool, device="meta")
        positions = torch.zeros_like(ids)
    else:  # read for padding, so real
        mask, positions = torch.ones(pictures, length, dtype=torch.long), None
    loss, count = model(TokenBatch(ids, mask, slots, labels, positions), [features])
    assert (loss.shape, loss.device.type, count) == ((), "meta", pictures * answer)


@pytest.mark.parametrize(
    "name", [name if name in REHEARSED else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES]
)
def test_the_memory_is_as_the_header_says(name: str) -> None:
    found = estimate_memory(load_recipe(name))
    needed = {part: size / 2**30 for part, size in found["bytes"].items()}
    *_, activations, features, rest, total, gpu, pictures, cached = header(name)
    assert needed["activations"] == pytest.approx(activations, rel=0.02)
    assert needed["features"] == pytest.approx(features, abs=0.01)
    assert needed["dequantised"] + needed["runtime"] == pytest.approx(rest, abs=0.01)
    assert found["total_gib"] == pytest.approx(total, abs=0.1)
    assert (found["fits"], found["micro_batch"]["pictures"]) == (gpu, pictures)
    assert found["picture_bytes"] / 2**20 == pytest.approx(cached, abs=0.01)


@pytest.mark.parametrize("name", RECIPES)
def test_the_machine_it_needs_is_the_headers(name: str) -> None:
    assert load_recipe(name).needs == f"a {header(name)[-3]:.0f} GB GPU"


@pytest.mark.parametrize("name", RECIPES)
def test_settings_are_those_of_the_papers(name: str) -> None:
    """QLoRA (arXiv 2305.14314) and BLIP-2 (arXiv 2301.12597)."""
    recipe = load_recipe(name)
    lora = recipe.language.lora
    assert recipe.language.quantize == "nf4" and recipe.language.gradient_checkpointing
    assert lora is not None and 8 <= lora.rank <= 16 and lora.alpha == 2 * lora.rank and lora.targets == "all-linear"
    whole = recipe.language.source.startswith("Salesforce/")  # then the bridge is the checkpoint's own
    start = unpinned(recipe.language.source) if whole else "google-bert/bert-base-uncased"
    assert (recipe.bridge.preset, unpinned(recipe.bridge.start or "")) == ("blip2", start)
    assert recipe.vision.towers[0].layer == -2
    train = recipe.train
    assert (train.learning_rate, train.betas, train.weight_decay, train.clip_norm) == (1e-4, (0.9, 0.98), 0.05, 0.3)


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_holds_the_command(name: str) -> None:
    lines = shipped_recipes()[name].read_text(encoding="utf-8").splitlines()
    assert lines[1].startswith(f"#   querybridge finetune {name} --set data.train=")
    assert f"querybridge estimate {name}" in " ".join(lines)


def test_without_the_data_file_one_line_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data/train\.jsonl") as caught:
        read_split(load_recipe(RECIPES[0]))
    assert "\n" not in str(caught.value)


def published(what: str) -> list[str]:
    return [name for name, model in KNOWN_MODELS.items() if model.what == what]


@pytest.mark.parametrize("source", published("language model"))
def test_a_language_model_has_as_many_parameters_as_published(source: str) -> None:
    small = shipped_recipes()["easy_vqa_cpu"]
    overrides = [f"language.source={source}", "language.lora=null"]
    model = build_meta_model(
        load_recipe(small, overrides), compute_dtype=torch.bfloat16, tower_dtype=torch.float16, quantized=False
    )
    assert sum(p.numel() for p in model.language.parameters()) == KNOWN_MODELS[source].parameters


@pytest.mark.parametrize("source", published("image encoder"))
def test_a_whole_tower_has_as_many_parameters_as_published(source: str) -> None:
    from transformers import Blip2VisionConfig, Blip2VisionModel, CLIPVisionConfig, CLIPVisionModel

    from qformer.efficientnet import EfficientNetLite, EfficientNetLiteConfig

    values = {key: value for key, value in KNOWN_MODELS[source].config.items() if key != "model_type"}
    with torch.device("meta"):
        if source.startswith("Salesforce/"):
            tower: Any = Blip2VisionModel._from_config(Blip2VisionConfig(**values))
        elif source.startswith("openai/"):
            tower = CLIPVisionModel._from_config(CLIPVisionConfig(**values))
        else:
            tower = EfficientNetLite(EfficientNetLiteConfig(**values))
    assert sum(p.numel() for p in tower.parameters()) == KNOWN_MODELS[source].parameters


def test_blip2_with_opt_adds_up_to_the_published_model() -> None:
    """3.74 B parameters on its model card; about 107 M trained in the second stage (Q-Former, norm, projection)."""
    parts = summarise_modules(build("gpu_blip2_opt", quantized=False))
    whole = sum(part.parameters for part in parts if part.name != "LoRA")
    assert round(whole / 1e9, 2) == 3.74
    assert round(size_of(parts, "bridge", "feature norm", "projection") / 1e6) == 107
