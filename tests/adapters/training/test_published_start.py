"""Runs that start from a published BLIP-2 or InstructBLIP: what they take of it, what they freeze, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from published import save_published
from safetensors.torch import load_file
from tiny import draw_captions, draw_data, tiny_values

from adapters.artefact.artefact import load_artefact, read_recipe
from adapters.artefact.exporting import export_adapter
from adapters.artefact.importing import import_published
from adapters.finetune import finetune
from adapters.loading.assembly import assemble
from adapters.pretrain import pretrain
from adapters.recipe import Recipe, load_recipe, parse_recipe
from adapters.training.start import sections_of
from qformer.errors import UserError

pytestmark = pytest.mark.usefixtures("cache_here")
SIZES = {"preset": "tiny", "num_queries": 3, "num_layers": 3, "layer_norm_eps": 1e-12}
TEXT_SIZES = {"vocab_size": 40, "max_text_positions": 48}


@pytest.fixture(scope="module")
def opt(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A tiny BLIP-2 with OPT: its folder and its tensors."""
    folder = tmp_path_factory.mktemp("published") / "opt"
    return folder, save_published(folder, "blip2-opt").state_dict()


def recipe_of(folder: Path, data: Path, language: Path | None = None, **train: object) -> dict[str, Any]:
    """A recipe on a checkpoint's tower, bridge and, if no other is named, LLM."""
    values: Any = tiny_values(folder, language or folder, data, **train)
    values["bridge"] = {**SIZES, "start": str(folder)}
    return values


def made(values: dict[str, Any]) -> Recipe:
    return parse_recipe(values, "test")


def test_norm_queries_q_former_and_projection_are_the_checkpoint_s(opt: tuple[Path, dict[str, Any]]) -> None:
    folder, state = opt
    assembly = assemble(made(recipe_of(folder, Path("not_read.jsonl"))), dtype="float32")
    assert torch.equal(assembly.model.bridge.state_dict()["query_tokens"], state["query_tokens"])
    norm = assembly.model.feature_norm.norms[0]
    assert torch.equal(norm.weight, state["vision_model.post_layernorm.weight"]) and norm.eps == 1e-5
    assert assembly.projection_taken
    assert torch.equal(assembly.model.projection.weight, state["language_projection.weight"])


def test_the_projection_to_another_llm_is_fresh(
    opt: tuple[Path, dict[str, Any]], language_folders: dict[str, Path]
) -> None:
    folder, state = opt
    values = recipe_of(folder, Path("not_read.jsonl"), language_folders["opt"])
    assembly = assemble(made(values), dtype="float32")
    assert not assembly.projection_taken and assembly.vision_side.start is not None
    assert not torch.equal(assembly.model.projection.weight, state["language_projection.weight"])
    said = assembly.vision_side.start.describe(projection=False)
    assert said == (
        f"the bridge starts from {folder}: norm, queries, Q-Former; the projection is fresh, as the LLM is another"
    )


def test_a_text_side_is_taken_where_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "retrieval"
    state = save_published(folder, "blip2-retrieval").state_dict()
    data = draw_captions(tmp_path / "data")
    values = recipe_of(folder, data, None, max_steps=2, validate_every=2, batch_size=4)
    values["bridge"] |= {"text_branch": True, **TEXT_SIZES}
    values |= {"task": "caption", "command": "pretrain", "stage": 1}
    result = pretrain(made(values), tmp_path / "run", dtype="float32", quiet=True)
    kept = load_file(result.best / "bridge.safetensors")
    for ours, theirs in {
        "heads.matching.weight": "itm_head.weight",
        "heads.image_projection.weight": "vision_projection.weight",
        "bridge.layers.1.text_feed_forward.inner.weight": "qformer.encoder.layer.1.intermediate.dense.weight",
        "feature_norm.norms.0.weight": "vision_model.post_layernorm.weight",
    }.items():  # two steps at most move it by two learning rates
        torch.testing.assert_close(kept[ours].float(), state[theirs], atol=0.02, rtol=0)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"num_queries": 4}, "bridge.num_queries is 4, there it is 3"),
        (
            {"num_layers": 2, "num_heads": 2},
            "num_layers is 2, there it is 3; bridge.num_heads is 2, there it is 4",
        ),
        ({"layer_norm_eps": 1e-5}, "bridge.layer_norm_eps is 1e-05, there it is 1e-12"),
        ({"text_branch": True, **TEXT_SIZES}, "it has no text side; set bridge.text_branch"),
    ],
)
def test_other_sizes_are_one_line(opt: tuple[Path, dict[str, Any]], change: dict[str, Any], says: str) -> None:
    values = recipe_of(opt[0], Path("not_read.jsonl"))
    values["bridge"] |= change
    with pytest.raises(UserError, match=says) as error:
        assemble(made(values), dtype="float32")
    assert "\n" not in str(error.value)


def test_another_tower_s_width_is_one_line(opt: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    config = CLIPVisionConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=16
    )
    CLIPVisionModel(config).save_pretrained(tmp_path / "clip")
    values = recipe_of(opt[0], Path("not_read.jsonl"))
    values["vision"] = {"towers": [{"source": str(tmp_path / "clip")}]}
    with pytest.raises(UserError, match="the towers' width is 32, there it is 24"):
        assemble(made(values), dtype="float32")


def test_a_frozen_bridge_stays_bit_by_bit_while_lora_learns(
    opt: tuple[Path, dict[str, Any]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, state = opt
    values = recipe_of(folder, draw_data(tmp_path), bridge=False, max_steps=4)
    run = finetune(made(values), tmp_path / "run", dtype="float32")
    assert "norm, queries, Q-Former and projection" in capfd.readouterr().err
    kept = load_file(run.best / "bridge.safetensors")
    assert torch.equal(kept["bridge.query_tokens"].float(), state["query_tokens"])
    assert torch.equal(kept["projection.weight"].float(), state["language_projection.weight"])
    lora = load_file(run.best / "lora" / "adapter_model.safetensors")
    assert all(tensor.abs().max() > 0 for name, tensor in lora.items() if "lora_B" in name)
    again, _ = load_artefact(tmp_path / "run", dtype="float32")
    assert torch.equal(again.model.projection.weight, state["language_projection.weight"])


def test_a_resumed_run_has_its_frozen_bridge(opt: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    folder, _ = opt
    import_published(str(folder), tmp_path / "imported")
    values = recipe_of(folder, draw_data(tmp_path), bridge=False, max_steps=4, validate_every=2)
    values["bridge"] = read_recipe(tmp_path / "imported").bridge.model_dump()
    how: Any = {"dtype": "float32", "quiet": True}
    start = str(tmp_path / "imported")
    finetune(made(values | {"train": values["train"] | {"max_steps": 2}}), tmp_path / "part", start_from=start, **how)
    text = (tmp_path / "part" / "recipe.yaml").read_text().replace("max_steps: 2", "max_steps: 4")
    (tmp_path / "part" / "recipe.yaml").write_text(text)
    position = tmp_path / "part" / "state" / "position.json"
    position.write_text(position.read_text().replace('"total": 2', '"total": 4'))
    finetune(made(values), tmp_path / "part", resume=True, **how)
    imported = load_file(tmp_path / "imported" / "bridge.safetensors")
    later = load_file(tmp_path / "part" / "last" / "bridge.safetensors")
    assert later.keys() == imported.keys()
    assert all(torch.equal(tensor, imported[name]) for name, tensor in later.items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"train": {"text_side_every": 5}}, "train.text_side_every=5: it trains the bridge"),
        ({"language": {"lora": None}}, "without language.lora nothing would be trained"),
        ({"bridge": {"start": None}}, "the bridge would stay as it was drawn"),
    ],
)
def test_what_does_not_go_with_a_frozen_bridge_is_one_line(
    opt: tuple[Path, dict[str, Any]], tmp_path: Path, change: dict[str, dict[str, Any]], says: str
) -> None:
    values = recipe_of(opt[0], draw_data(tmp_path), bridge=False, max_steps=1)
    for section, keys in change.items():
        values[section] = values[section] | keys
    with pytest.raises(UserError, match=says):
        finetune(made(values), tmp_path / "run", dtype="float32", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["instructblip-t5"])
def test_fine_tuning_goes_on_from_an_import_in_4_bit(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "published"
    save_published(folder, kind)
    import_published(str(folder), tmp_path / "imported")
    sections = sections_of(str(tmp_path / "imported"))
    assert sections["language"] == {"source": str(folder)}
    values = tiny_values(folder, folder, draw_data(tmp_path), max_steps=2, validate_every=2) | sections
    recipe = made(values)
    assert recipe.language.quantize == "nf4" and recipe.language.lora is not None
    result = finetune(recipe, tmp_path / "run", start_from=str(tmp_path / "imported"), dtype="float32", quiet=True)
    assert result.steps == 2
    loaded, facts = load_artefact(tmp_path / "run", dtype="float32")
    assert facts.imported is None and facts.started_from == str(tmp_path / "imported")
    assert any("its model card" in line for line in facts.terms)
    assert loaded.reads_instructions == kind.startswith("instructblip")


def test_the_gpu_recipes_start_from_published_bridges() -> None:
    for name in ("gpu_blip2_opt", "gpu_blip2_flan_t5", "gpu_instructblip"):
        recipe = load_recipe(name)
        assert recipe.bridge.start == recipe.vision.towers[0].source == recipe.language.source
    assert load_recipe("gpu_instructblip").bridge.instruction_aware


def test_an_exported_adapter_is_a_better_start_than_none(opt: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """Out through transformers' format and in again: what was learned of colours is still known."""
    folder, _ = opt
    data = draw_data(tmp_path / "data")
    how: Any = {"dtype": "float32", "quiet": True}
    learning = {"max_steps": 30, "validate_every": 30, "learning_rate": 1e-2}
    finetune(made(recipe_of(folder, data, **learning)), tmp_path / "first", **how)
    export_adapter(str(tmp_path / "first"), "blip2", tmp_path / "out")
    few = {"max_steps": 2, "validate_every": 2}
    started = finetune(made(recipe_of(tmp_path / "out", data, **few)), tmp_path / "second", **how)
    values = recipe_of(folder, data, **few)
    values["bridge"].pop("start")
    fresh = finetune(made(values), tmp_path / "third", **how)
    assert started.metrics["val_loss"] < 0.5 * fresh.metrics["val_loss"]
