"""A run that starts from another adapter: which weights it takes, what may differ, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from references import stir_lora
from tiny import save_tiny_bert, tiny_values
from torch import Tensor

from adapters.artefact.artefact import save_artefact
from adapters.artefact.facts import Facts
from adapters.loading.assembly import Assembly, assemble
from adapters.loading.vision_side import VisionSide, load_vision_side
from adapters.recipe import parse_recipe
from adapters.training.start import Start, has_lora, sections_of, start_from_artefact
from qformer.errors import UserError

pytestmark = pytest.mark.usefixtures("cache_here")
TERMS = ("CC BY-SA 4.0",)


@pytest.fixture
def values(vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path) -> dict[str, Any]:
    """A recipe with its text side; its data are not read."""
    values: Any = tiny_values(vision_folder, language_folders["llama"], Path("not_read.jsonl"))
    values["bridge"] |= {"text_branch": True, "start": str(save_tiny_bert(tmp_path / "bert"))}
    return values


@torch.no_grad()
def stir(made: Assembly | VisionSide) -> None:
    """Make the weights tell where they are from."""
    generator = torch.Generator().manual_seed(9)
    for part in made.parts().values():
        for parameter in part.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.1, generator=generator)


def trained_as(values: dict[str, Any], folder: Path) -> Assembly:
    """Save an adapter with an LLM, whose weights are none that a run would draw."""
    made = assemble(parse_recipe(values, "test"), dtype="float32")
    stir(made)
    stir_lora(made.model, seed=3)
    save_artefact(folder, made, Facts(made.fingerprints, terms=TERMS))
    return made


def begun(values: dict[str, Any], *, lora: bool = False) -> Assembly:
    """A run's model, as it is before it starts; without LoRA in place, for an adapter that brings its own."""
    return assemble(parse_recipe(values, "test"), dtype="float32", lora=lora)


def weights(made: Assembly | VisionSide, *parts: str) -> dict[str, Tensor]:
    """What is trained of some parts, as an artefact keeps it."""
    return {
        f"{part}.{name}": parameter.detach().bfloat16()
        for part in parts
        for name, parameter in made.parts()[part].named_parameters()
        if parameter.requires_grad
    }


def same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


def test_a_run_takes_every_weight_and_the_terms(values: dict[str, Any], tmp_path: Path) -> None:
    theirs = trained_as(values, tmp_path / "adapter")
    ours = begun(values)
    start = start_from_artefact(ours, str(tmp_path / "adapter"))
    assert start == Start(str(tmp_path / "adapter"), TERMS, ())
    assert str(start) == f"starting from {tmp_path / 'adapter'}; terms: CC BY-SA 4.0"
    parts = ("feature_norm", "bridge", "heads", "projection")
    assert set(ours.parts()) == set(parts) and same(weights(ours, *parts), weights(theirs, *parts))
    found, expected = ours.model.language.lora_state(), theirs.model.language.lora_state()
    assert found.keys() == expected.keys() and len(found) > 0
    assert all(torch.equal(found[name], tensor.bfloat16().float()) for name, tensor in expected.items())


def test_what_a_start_says_of_itself() -> None:
    assert str(Start("runs/a", (), ())) == "starting from runs/a; terms: not stated"
    assert str(Start("a", ("CC0", "MIT"), ("x", "y"))) == "starting from a; terms: CC0; MIT; new to its bridge: x, y"


def test_the_second_stage_keeps_a_projection_and_lora_of_its_own(values: dict[str, Any], tmp_path: Path) -> None:
    theirs = load_vision_side(parse_recipe(values, "test"))
    stir(theirs)
    save_artefact(tmp_path / "stage1", theirs, Facts(theirs.fingerprints))
    values["bridge"]["text_branch"] = False  # left behind, as BLIP-2 does
    ours, fresh = begun(values, lora=True), begun(values, lora=True)
    assert start_from_artefact(ours, str(tmp_path / "stage1")).terms == ()
    assert set(ours.parts()) == {"feature_norm", "bridge", "projection"}
    taken = weights(ours, "feature_norm", "bridge")
    assert same(taken, weights(theirs, "feature_norm", "bridge"))
    assert len(weights(theirs, "bridge")) > len(weights(ours, "bridge"))  # a feed-forward of texts
    assert same(weights(ours, "projection"), weights(fresh, "projection"))
    found, expected = ours.model.language.lora_state(), fresh.model.language.lora_state()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert not has_lora(tmp_path / "stage1")


def test_a_first_stage_starts_from_an_adapter_with_an_llm(values: dict[str, Any], tmp_path: Path) -> None:
    theirs = trained_as(values, tmp_path / "adapter")
    ours = load_vision_side(parse_recipe(values, "test"))
    start_from_artefact(ours, str(tmp_path / "adapter"))
    parts = ("feature_norm", "bridge", "heads")
    assert same(weights(ours, *parts), weights(theirs, *parts))


def test_an_adapter_without_lora_leaves_the_run_its_own(values: dict[str, Any], tmp_path: Path) -> None:
    lora = values["language"].pop("lora")
    theirs = trained_as(values | {"language": values["language"] | {"lora": None}}, tmp_path / "adapter")
    assert not has_lora(tmp_path / "adapter")
    ours = begun(values | {"language": values["language"] | {"lora": lora}}, lora=True)
    before = {name: tensor.clone() for name, tensor in ours.model.language.lora_state().items()}
    start_from_artefact(ours, str(tmp_path / "adapter"))
    assert same(weights(ours, "projection"), weights(theirs, "projection"))
    assert len(before) > 0 and all(
        torch.equal(tensor, before[name]) for name, tensor in ours.model.language.lora_state().items()
    )


def test_dropout_and_the_text_side_may_differ(values: dict[str, Any], tmp_path: Path) -> None:
    values["bridge"]["text_pooling"] = "mean"
    trained_as(values, tmp_path / "adapter")
    assert has_lora(tmp_path / "adapter")
    values["bridge"] |= {"dropout": 0.3, "patch_dropout": 0.5, "text_branch": False, "text_pooling": "first"}
    values["language"]["lora"] |= {"dropout": 0.2}
    ours = begun(values)
    assert start_from_artefact(ours, str(tmp_path / "adapter")).changes == ()
    rates = {m.p for n, m in ours.model.language.named_modules() if "lora_dropout" in n and hasattr(m, "p")}
    assert rates == {0.2}


@pytest.mark.parametrize(
    ("section", "change", "message"),
    [
        ("vision", {"towers": "layer"}, "'vision' differs from the recipe's; make the two sections equal$"),
        ("vision", {"towers": "two"}, "'vision' differs"),
        ("bridge", {"num_queries": 4}, "'bridge' differs from the recipe's; .* equal, dropout apart$"),
        ("bridge", {"text_pooling": "mean"}, "'bridge' differs"),
        ("language", {"lora": {"rank": 2, "alpha": 8}}, r"'language\.lora' differs from .*, dropout apart$"),
        ("language", {"lora": None}, r"'language\.lora' differs"),
        ("language", {"source": "qwen2"}, "it was trained with other language weights than the recipe names"),
    ],
)
def test_what_must_be_equal_is_named(
    values: dict[str, Any],
    language_folders: dict[str, Path],
    tmp_path: Path,
    section: str,
    change: dict[str, Any],
    message: str,
) -> None:
    trained_as(values, tmp_path / "adapter")
    tower = values["vision"]["towers"][0]
    if section == "vision":
        change = {"towers": [tower | {"layer": -1}] if change["towers"] == "layer" else [tower, tower]}
    if "source" in change:
        change = {"source": str(language_folders[change["source"]])}
    run = begun(values | {section: values[section] | change})
    before = weights(run, "bridge")
    with pytest.raises(UserError, match=message) as raised:
        start_from_artefact(run, str(tmp_path / "adapter"))
    assert str(raised.value).startswith(f"--start-from {tmp_path / 'adapter'}: ")
    assert same(weights(run, "bridge"), before)  # nothing was put in by halves


@pytest.mark.parametrize(
    ("theirs", "ours"), [(None, "text_branch"), (None, "instruction_aware"), ("instruction_aware", "text_branch")]
)
def test_a_text_side_does_not_come_fresh(values: dict[str, Any], tmp_path: Path, theirs: str | None, ours: str) -> None:
    values["bridge"]["text_branch"] = False
    reads = {} if theirs is None else {theirs: True}
    trained_as(values | {"bridge": values["bridge"] | reads}, tmp_path / "adapter")
    values["bridge"][ours] = True
    with pytest.raises(UserError, match="'bridge' differs"):
        start_from_artefact(begun(values), str(tmp_path / "adapter"))


def test_a_name_that_is_nothing_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="no_such_run: no such folder"):
        start_from_artefact(load_vision_side(parse_recipe(values, "test")), "no_such_run")
    with pytest.raises(UserError, match="no_such_run: no such folder"):
        sections_of("no_such_run")


def test_a_recipe_with_the_sections_can_start(values: dict[str, Any], tmp_path: Path) -> None:
    values["bridge"]["patch_dropout"] = 0.5
    trained_as(values, tmp_path / "adapter")
    found = sections_of(str(tmp_path / "adapter"))
    assert set(found) == {"vision", "bridge", "language", "prompt"}
    assert found["bridge"]["num_queries"] == 3 and found["language"]["lora"]["rank"] == 4
    assert (found["bridge"]["text_branch"], found["bridge"]["patch_dropout"]) == (False, 0.0)
    assert start_from_artefact(begun(found), str(tmp_path / "adapter")).changes == ()
