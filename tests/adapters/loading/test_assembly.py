"""A recipe put together: what is trained and what is frozen, what is shared, and the path from picture to LLM."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from references import stir_lora
from safetensors.torch import load_file
from tiny import save_tiny_bert, tiny_values
from torch.nn import functional as F

from adapters.data.image_ref import ImageRef, image_ref
from adapters.loading.assembly import Assembly, assemble, chosen_dtype, lora_settings, word_sized_projection
from adapters.loading.vision_side import FrozenModels
from adapters.recipe import LoraSection, Recipe, parse_recipe
from qformer.errors import UserError
from qformer.language import LanguageModel
from qformer.language_loading import load_language_model

pytestmark = pytest.mark.usefixtures("cache_here")


@pytest.fixture
def values(vision_folder: Path, language_folders: dict[str, Path]) -> dict[str, Any]:
    """A recipe as a mapping; its data are not read."""
    return tiny_values(vision_folder, language_folders["llama"], Path("not_read.jsonl"))


@pytest.fixture
def pictures(tmp_path: Path) -> list[ImageRef]:
    names = []
    for name, colour in (("a", (200, 40, 10)), ("b", (10, 40, 200))):
        Image.new("RGB", (32, 32), colour).save(tmp_path / f"{name}.png")
        names.append(str(tmp_path / f"{name}.png"))
    return [image_ref(name) for name in names]


def made(values: dict[str, Any], **options: Any) -> Assembly:
    return assemble(recipe_of(values), dtype="float32", **options)


def recipe_of(values: dict[str, Any]) -> Recipe:
    return parse_recipe(values, "test")


def test_norm_bridge_projection_and_lora_train_and_nothing_else(values: dict[str, Any]) -> None:
    assembly = made(values)
    trained = {name for name, parameter in assembly.model.named_parameters() if parameter.requires_grad}
    parts = {f"{part}.{name}" for part, module in assembly.parts().items() for name, _ in module.named_parameters()}
    lora = {name for name in trained if "lora_" in name}
    assert trained == parts | lora and lora and not parts & lora
    assert {name.partition(".")[0] for name in parts} == {"feature_norm", "bridge", "projection"}
    assert all(name.startswith("language.") for name in lora)
    assert set(assembly.fingerprints) == {"vision.0", "language"}
    assert not assembly.model.training and assembly.caches == assembly.vision_side.caches


def test_pictures_reach_the_llm_through_norm_bridge_and_projection(
    values: dict[str, Any], pictures: list[ImageRef]
) -> None:
    assembly = made(values)
    with torch.no_grad():
        found = assembly.image_embeddings(pictures)
        normed = assembly.vision_side.feature_norm([tower.float() for tower in assembly.features(pictures)])
        queries = assembly.vision_side.bridge(normed).queries
        weights = assembly.parts()["projection"].state_dict()
        expected = queries @ weights["weight"].T + weights["bias"]
    assert found.shape == (2, 3, 64)
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found[0], found[1])


def test_a_question_changes_what_an_instruction_aware_bridge_sees(
    values: dict[str, Any], pictures: list[ImageRef], tmp_path: Path
) -> None:
    values["bridge"] |= {"start": str(save_tiny_bert(tmp_path / "bert")), "instruction_aware": True}
    assembly = made(values)
    with torch.no_grad():
        asked = assembly.image_embeddings([pictures[0]] * 2, ["a red square", "the picture"])
        alone = assembly.image_embeddings([pictures[0]], ["the picture"])
        unasked, empty = (assembly.image_embeddings([pictures[0]], words) for words in (None, [""]))
    ids, mask, _ = assembly.beside_features(pictures[:1], assembly.features(pictures[:1]), ["a red square"])
    assert assembly.reads_instructions and ids is not None and mask is not None and ids.shape == mask.shape
    assert not torch.allclose(asked[0], asked[1], atol=1e-5)
    torch.testing.assert_close(asked[1:], alone, atol=1e-5, rtol=1e-5)  # whatever is beside it in the batch
    assert torch.equal(unasked, empty)


def test_another_bridge_reads_no_question(values: dict[str, Any], pictures: list[ImageRef]) -> None:
    assembly = made(values)
    assert not assembly.reads_instructions
    beside = assembly.beside_features(pictures[:1], assembly.features(pictures[:1]), ["a red square"])
    assert beside == (None, None, None)
    with torch.no_grad():
        first, second = (assembly.image_embeddings(pictures[:1], [words]) for words in ("a red square", "the picture"))
    assert torch.equal(first, second)


def test_fresh_weights_follow_the_seed_and_nothing_before(values: dict[str, Any]) -> None:
    def trained(seed: int, before: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(before)
        values["train"]["seed"] = seed
        model = made(values).model
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}

    first, again, other = trained(0, 1), trained(0, 2), trained(1, 2)
    assert all(torch.equal(tensor, again[name]) for name, tensor in first.items())
    assert not torch.equal(first["projection.weight"], other["projection.weight"])
    values["bridge"]["num_layers"] = 1  # a bridge that draws fewer numbers
    assert torch.equal(first["projection.weight"], trained(0, 3)["projection.weight"])


def test_the_projection_speaks_in_the_size_of_words(language_folders: dict[str, Path]) -> None:
    """Inputs of unit variance come out about the words' mean and as spread as the words are, in the mean of squares."""
    language = load_language_model(language_folders["llama"], quantize="none", compute_dtype=torch.float32)
    words = load_file(language_folders["llama"] / "model.safetensors")["model.embed_tokens.weight"]  # [V, 64]
    torch.manual_seed(0)
    projection = word_sized_projection(400, language)
    with torch.no_grad():
        out = projection(torch.randn(4000, 400))
    assert (projection.in_features, projection.out_features) == (400, 64)
    torch.testing.assert_close(projection.bias.detach(), words.mean(dim=0))
    spread = (words - words.mean(dim=0)).square().sum() / (len(words) - 1) / words.shape[1]
    found = (out - words.mean(dim=0)).square().mean()
    assert found.item() == pytest.approx(spread.item(), rel=0.03)


def test_lora_is_as_the_recipe_has_it(values: dict[str, Any], language_folders: dict[str, Path]) -> None:
    """On the very layers it names: base output plus alpha / rank times B A of the input."""
    values["language"]["lora"] = {"rank": 3, "alpha": 12, "targets": ["q_proj"], "dropout": 0.0}
    assembly = made(values)
    stir_lora(assembly.model, seed=1)
    layers = {name: module for name, module in assembly.model.language.named_modules() if hasattr(module, "lora_A")}
    assert len(layers) == 2 and all(name.endswith("q_proj") for name in layers)
    original = load_file(language_folders["llama"] / "model.safetensors")
    layer: Any = layers[next(name for name in layers if ".layers.1." in name)]
    inputs = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert a.shape == (3, 64) and b.shape == (64, 3)
    expected = F.linear(inputs, original["model.layers.1.self_attn.q_proj.weight"]) + 4 * (inputs @ a.T) @ b.T
    with torch.no_grad():
        torch.testing.assert_close(layer(inputs), expected.detach(), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("why", ["null in the recipe", "left to an artefact"])
def test_no_lora(values: dict[str, Any], why: str) -> None:
    if why == "null in the recipe":
        values["language"]["lora"] = None
    assembly = made(values, lora=why == "null in the recipe")
    assert not assembly.model.language.has_lora
    assert not any(p.requires_grad for p in assembly.model.language.parameters())


def test_the_settings_of_lora_are_the_section_s() -> None:
    found = lora_settings(LoraSection(rank=2, alpha=5, dropout=0.25, targets=("q_proj",)))
    assert (found.rank, found.alpha, found.dropout, found.targets) == (2, 5, 0.25, ("q_proj",))


def test_adapters_share_towers_and_llm_and_keep_their_own_lora(values: dict[str, Any]) -> None:
    frozen = FrozenModels()
    one, other = made(values, frozen=frozen), made(values, frozen=frozen)
    assert other.vision_side.encoders[0] is one.vision_side.encoders[0]
    assert other.model.language is not one.model.language
    assert other.model.language.base is one.model.language.base
    assert len(frozen.towers) == len(frozen.languages) == 1
    stir_lora(one.model, seed=1)
    ids = torch.tensor([[7, 8, 9, 10]])
    first = logits(one.model.language, ids)
    second = logits(other.model.language, ids)
    assert torch.equal(logits(one.model.language, ids), first) and not torch.allclose(first, second, atol=1e-3)
    values["language"]["quantize"] = "nf4"
    assert made(values, frozen=frozen).model.language.base is not one.model.language.base
    assert len(frozen.languages) == 2


@torch.no_grad()
def logits(language: LanguageModel, ids: torch.Tensor) -> torch.Tensor:
    language.activate()
    return language.model(inputs_embeds=language.embed(ids)).logits.float()


@pytest.mark.parametrize(("kind", "is_encoder_decoder"), [("llama", False), ("t5", True)])
def test_prompts_are_of_the_llm_and_of_the_recipe_s_wording(
    values: dict[str, Any], language_folders: dict[str, Path], kind: str, is_encoder_decoder: bool
) -> None:
    values["language"]["source"] = str(language_folders[kind])
    values["prompt"] = {"question": "Look: {question}"}
    prompts = made(values).prompts
    assert (prompts.num_queries, prompts.is_encoder_decoder) == (3, is_encoder_decoder)
    ids = prompts.vqa("what colour?").ids
    assert ids.count(-1) == 3  # places of the picture's vectors
    assert "Look: what colour?" in prompts.tokenizer.decode([one for one in ids if one >= 0])


def test_gradient_checkpointing_is_switched_on(values: dict[str, Any]) -> None:
    assert not made(values).model.language.checkpointing
    values["language"]["gradient_checkpointing"] = True
    assert made(values).model.language.checkpointing


def test_the_dtype_that_is_chosen() -> None:
    assert chosen_dtype(None) is None
    assert (chosen_dtype("float32"), chosen_dtype("bfloat16")) == (torch.float32, torch.bfloat16)
    with pytest.raises(UserError, match=r"--dtype float16: take one of float32, bfloat16"):
        chosen_dtype("float16")


def test_a_wrong_dtype_is_said_before_anything_is_loaded(values: dict[str, Any]) -> None:
    values["language"]["source"] = values["vision"]["towers"][0]["source"] = "no_such_folder/nowhere/at_all"
    with pytest.raises(UserError, match="--dtype half"):
        assemble(recipe_of(values), dtype="half")
