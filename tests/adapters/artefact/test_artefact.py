"""The artefact: all that was trained, nothing else, read strictly, and readable by PEFT."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from tiny import draw_data, save_tiny_efficientnet, tiny_values
from tiny_grounding import save_tiny_head
from transformers import AutoModelForCausalLM, BertConfig, BertModel

from adapters.artefact.artefact import (
    adapter_fingerprint,
    answering_dtype,
    find_artefact,
    load_artefact,
    save_artefact,
    trained_state,
)
from adapters.artefact.facts import Facts, read_facts
from adapters.artefact.publishing import publish
from adapters.loading.assembly import Assembly, assemble
from adapters.loading.vision_side import FrozenModels, load_vision_side
from adapters.recipe import parse_recipe
from adapters.training.start import sections_of, start_from_artefact
from qformer.config import BridgeConfig
from qformer.errors import UserError
from qformer.vision_loading import load_image_encoder
from qformer.weight_delta import save_weight_delta

pytestmark = pytest.mark.usefixtures("cache_here")


@pytest.fixture
def assembly(vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path) -> Assembly:
    values: Any = tiny_values(vision_folder, language_folders["llama"], draw_data(tmp_path / "data"))
    made = assemble(parse_recipe(values, "test"), dtype="float32")
    torch.manual_seed(1)
    for name, parameter in made.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return made


@pytest.fixture
def artefact(assembly: Assembly, tmp_path: Path) -> Path:
    facts = Facts(assembly.fingerprints, data={"train": "squares"}, metrics={"val_exact_match": 0.5}, terms=("CC0",))
    save_artefact(tmp_path / "artefact", assembly, facts)
    return tmp_path / "artefact"


def test_a_full_disk_leaves_the_artefact_that_stands_there(
    assembly: Assembly, artefact: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in artefact.rglob("*") if path.is_file()}

    def half(tensors: object, path: Path, **_: object) -> None:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("adapters.artefact.artefact.save_file", half)
    with pytest.raises(UserError, match=r"No space left on device.*free space"):
        save_artefact(artefact, assembly, Facts(assembly.fingerprints))
    assert {path: path.read_bytes() for path in artefact.rglob("*") if path.is_file()} == before
    assert not list(artefact.parent.glob("*.partial*"))


def test_the_folder_holds_what_was_trained_in_bfloat16_and_nothing_else(assembly: Assembly, artefact: Path) -> None:
    files = {path.relative_to(artefact).as_posix() for path in artefact.rglob("*") if path.is_file()}
    assert files == {
        "bridge.safetensors", "lora/adapter_model.safetensors", "lora/adapter_config.json",
        "recipe.yaml", "artefact.json", "README.md",
    }  # fmt: skip
    bridge = load_file(artefact / "bridge.safetensors")
    lora = load_file(artefact / "lora" / "adapter_model.safetensors")
    assert {t.dtype for t in (*bridge.values(), *lora.values())} == {torch.bfloat16}
    held = sum(t.numel() for t in (*bridge.values(), *lora.values()))
    assert held == sum(p.numel() for p in assembly.model.parameters() if p.requires_grad)


def test_a_round_trip_gives_the_same_model(assembly: Assembly, artefact: Path) -> None:
    again, facts = load_artefact(artefact, dtype="float32")
    for (name, ours), (other, theirs) in zip(
        assembly.model.named_parameters(), again.model.named_parameters(), strict=True
    ):
        assert name == other
        assert torch.equal(ours.to(torch.bfloat16), theirs.to(torch.bfloat16)), name
    assert facts.metrics == {"val_exact_match": 0.5} and facts.terms == ("CC0",)
    assert set(facts.versions) == {"torch", "transformers", "peft", "bitsandbytes", "accelerate"}


@pytest.mark.parametrize(("trained", "instructions", "answers"), [
    ("bfloat16", True, "bfloat16"), ("bfloat16", False, "float32"), ("float32", True, "float32"),
])  # fmt: skip
def test_a_processor_without_bfloat16_answers_in_float32(
    trained: str, instructions: bool, answers: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adapters.artefact.artefact.has_bfloat16", lambda device: instructions)
    assert answering_dtype(Facts({}, compute_dtype=trained), "cpu") == answers


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_adapter_computes_as_it_was_trained_unless_it_is_told_otherwise(
    assembly: Assembly, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    other = {"float32": "bfloat16", "bfloat16": "float32"}[dtype]
    monkeypatch.setattr(
        "adapters.artefact.artefact.default_compute_dtype", lambda *_, **__: getattr(torch, other)
    )  # what a stopwatch would say here
    monkeypatch.setattr("adapters.artefact.artefact.has_bfloat16", lambda device: True)
    trained = assemble(assembly.recipe, dtype=dtype)
    save_artefact(tmp_path / "artefact", trained, Facts(trained.fingerprints, compute_dtype="of another run"))
    again, facts = load_artefact(tmp_path / "artefact")
    assert facts.compute_dtype == dtype
    assert again.model.language.compute_dtype == getattr(torch, dtype)
    assert load_artefact(tmp_path / "artefact", dtype=other)[0].model.language.compute_dtype == getattr(torch, other)

    file = tmp_path / "artefact" / "artefact.json"
    old = json.loads(file.read_text()) | {"format_version": 3}
    del old["compute_dtype"]
    file.write_text(json.dumps(old))
    before, facts = load_artefact(tmp_path / "artefact")
    assert facts.compute_dtype is None
    assert before.model.language.compute_dtype == getattr(torch, other)


def test_the_first_stage_keeps_the_compute_dtype_that_its_run_names(
    vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path
) -> None:
    values: Any = tiny_values(vision_folder, language_folders["llama"], draw_data(tmp_path / "data"))
    vision_side = load_vision_side(parse_recipe(values, "test"))
    save_artefact(tmp_path / "artefact", vision_side, Facts(vision_side.fingerprints, compute_dtype="bfloat16"))
    assert read_facts(tmp_path / "artefact").compute_dtype == "bfloat16"


def test_peft_reads_the_lora(assembly: Assembly, artefact: Path, language_folders: dict[str, Path]) -> None:
    """PEFT alone, on the base model alone, computes what we compute."""
    base = AutoModelForCausalLM.from_pretrained(language_folders["llama"])
    theirs = PeftModel.from_pretrained(base, str(artefact / "lora")).eval()
    ours, _ = load_artefact(artefact, dtype="float32")
    ids = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        expected = theirs(input_ids=ids).logits
        found = ours.model.language.model(inputs_embeds=ours.model.language.embed(ids)).logits
        plain = AutoModelForCausalLM.from_pretrained(language_folders["llama"])(input_ids=ids).logits
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("projection.weight"), r"1 missing \(projection.weight\)"),
        (lambda s: s.update(extra=torch.zeros(1)), r"1 unexpected \(extra\)"),
        (lambda s: s.update({"projection.bias": torch.zeros(3)}), r"projection.bias is \[3\], not \[64\]"),
    ],
)
def test_a_tensor_that_differs_is_named(artefact: Path, change: Any, message: str) -> None:
    file = artefact / "bridge.safetensors"
    state = load_file(file)
    change(state)
    save_file(state, file)
    with pytest.raises(UserError, match=message):
        load_artefact(artefact)


def test_another_base_model_is_refused(artefact: Path, language_folders: dict[str, Path]) -> None:
    recipe = artefact / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace(str(language_folders["llama"]), str(language_folders["qwen2"])))
    with pytest.raises(UserError, match=r"trained on language weights sha256:.*use the base model it was trained on"):
        load_artefact(artefact)


def test_damage_is_one_line(artefact: Path) -> None:
    shutil.copytree(artefact, artefact.with_name("copy"))
    (artefact / "bridge.safetensors").write_bytes(b"\x00" * 10)
    with pytest.raises(UserError, match="cannot be read"):
        load_artefact(artefact)
    facts = artefact.with_name("copy") / "artefact.json"
    newer = json.loads(facts.read_text()) | {"format_version": 99}
    facts.write_text(json.dumps(newer))
    with pytest.raises(UserError, match="format 99 is newer"):
        read_facts(facts.parent)
    facts.write_text("{")
    with pytest.raises(UserError, match="damaged or not ours"):
        read_facts(facts.parent)


def test_names_that_lead_to_an_artefact(artefact: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with pytest.raises(UserError, match="holds no artefact"):
        find_artefact(run)
    shutil.copytree(artefact, run / "last")
    assert find_artefact(run) == run / "last"
    shutil.copytree(artefact, run / "best.old")  # stopped between the two renames
    assert find_artefact(run) == run / "best.old"
    shutil.copytree(artefact, run / "best")
    assert find_artefact(run) == run / "best"
    with pytest.raises(UserError, match="--adapter nowhere"):
        find_artefact("nowhere")


def test_word_embeddings_are_named_not_copied(
    vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path
) -> None:
    """An instruction-aware bridge keeps its word embeddings by fingerprint, and gets them back on loading."""
    from tiny import make_tokenizer

    torch.manual_seed(0)
    bert = tmp_path / "bert"
    tiny = BridgeConfig.preset("tiny", encoder_width=24)
    config = BertConfig(
        vocab_size=tiny.vocab_size - 1,
        hidden_size=tiny.hidden_size,
        num_hidden_layers=tiny.num_layers,
        num_attention_heads=tiny.num_heads,
        intermediate_size=tiny.intermediate_size,
        max_position_embeddings=tiny.max_text_positions,
    )
    BertModel(config).save_pretrained(bert)
    make_tokenizer(chat=False).save_pretrained(bert)
    values: Any = tiny_values(vision_folder, language_folders["llama"], draw_data(tmp_path / "data"))
    values["bridge"] = {"preset": "tiny", "start": str(bert), "instruction_aware": True}
    made = assemble(parse_recipe(values, "test"), dtype="float32")
    save_artefact(tmp_path / "artefact", made, Facts(made.fingerprints))
    names = set(load_file(tmp_path / "artefact" / "bridge.safetensors"))
    assert not any("embeddings.words" in name for name in names)
    assert any("text_feed_forward" in name for name in names)
    again, _ = load_artefact(tmp_path / "artefact", dtype="float32")
    assert again.vision_side.tokenizer is not None
    assert torch.equal(again.model.bridge.embeddings.words.weight, made.model.bridge.embeddings.words.weight)


def test_what_ships_has_its_figures_and_no_folders_of_the_machine(assembly: Assembly, tmp_path: Path) -> None:
    source = tmp_path / "run" / "best"
    source.parent.mkdir()
    save_artefact(source, assembly, Facts(assembly.fingerprints, metrics={"val_loss": 2.0}, terms=("CC0",)))
    facts = publish(source, tmp_path / "shipped" / "squares", {"captions en, CIDEr": 0.5})
    assert facts == read_facts(tmp_path / "shipped" / "squares")
    assert facts.metrics == {"captions en, CIDEr": 0.5} and facts.terms == ("CC0",)
    folder = tmp_path / "shipped" / "squares"
    card = (folder / "README.md").read_text()
    assert card.startswith("# squares\n") and "CIDEr | 0.5" in card
    for file in ("recipe.yaml", "artefact.json", "README.md"):
        assert str(tmp_path) not in (folder / file).read_text()
    loaded, _ = load_artefact(folder, dtype="float32")
    for name, tensor in trained_state(loaded.parts()).items():
        assert torch.equal(tensor, trained_state(assembly.parts())[name].bfloat16().float()), name


def test_a_head_for_phrases_outlives_a_new_bridge(assembly: Assembly, tmp_path: Path) -> None:
    source, shipped = tmp_path / "run" / "best", tmp_path / "shipped" / "squares"
    source.parent.mkdir()
    save_artefact(source, assembly, Facts(assembly.fingerprints))
    publish(source, shipped, {})
    head = save_tiny_head(tmp_path / "parts", shipped)
    before = head.read_bytes()
    publish(source, shipped, {})
    assert head.read_bytes() == before
    assert "| head for phrases, trained apart | its terms: made up - for tests |" in (shipped / "README.md").read_text()


def test_a_run_starts_with_another_difference_to_the_same_tower(
    language_folders: dict[str, Path], tmp_path: Path
) -> None:
    towers = [save_tiny_efficientnet(tmp_path / f"tower{seed}", seed) for seed in (0, 1)]
    for number, source in ((0, 0), (1, 0), (2, 1)):  # two of the first tower, one of the second
        plain, changed = (load_image_encoder(str(towers[source]), layer=-1) for _ in range(2))
        with torch.no_grad():
            next(changed.model.parameters()).add_(0.1 * (number + 1))
        save_weight_delta(tmp_path / f"difference{number}", changed.model, plain.model, {"base": plain.weights})
    data = draw_data(tmp_path / "data")

    def made(source: int, difference: int | None, image_size: int | None = None) -> Assembly:
        values: Any = tiny_values(towers[source], language_folders["llama"], data)
        tower = {"source": str(towers[source]), "layer": -1, "image_size": image_size}
        tower |= {} if difference is None else {"difference": str(tmp_path / f"difference{difference}")}
        return assemble(parse_recipe(values | {"vision": {"towers": [tower]}}, "test"), dtype="float32")

    @torch.no_grad()
    def start(begun: Assembly, run: Assembly) -> str:
        for parameter in begun.model.bridge.parameters():
            parameter.add_(0.1)
        save_artefact(tmp_path / "artefact", begun, Facts(begun.fingerprints, terms=("CC BY",)))
        line = str(start_from_artefact(run, str(tmp_path / "artefact")))
        assert "terms: CC BY" in line
        taken = run.model.bridge.state_dict()
        assert all(
            torch.equal(t.bfloat16(), taken[name].bfloat16()) for name, t in begun.model.bridge.named_parameters()
        )
        return line

    notice = "; new to its bridge: the difference of vision.0"
    for begun, run in ((0, 1), (None, 1), (0, None)):
        assert notice in start(made(0, begun), made(0, run))
    assert start(made(0, 0), made(0, 0)).endswith("terms: CC BY")
    assert start(made(0, 0), made(0, 0, 65)).endswith("; new to its bridge: vision.0 sees 65 px")
    larger = made(0, 0, 65)
    save_artefact(tmp_path / "artefact", larger, Facts(larger.fingerprints))
    with pytest.raises(UserError, match=r"'vision' differs"):  # left out is not another size
        start_from_artefact(made(0, 0), str(tmp_path / "artefact"))
    save_artefact(tmp_path / "artefact", made(1, 2), Facts(made(1, 2).fingerprints))
    with pytest.raises(UserError, match=r"'vision' differs"):
        start_from_artefact(made(0, 1), str(tmp_path / "artefact"))
    shutil.rmtree(towers[1])
    shutil.copytree(towers[0], towers[1])  # the same name, other weights
    changed = made(1, None)
    with pytest.raises(UserError, match=r"other vision\.0 weights"):
        start_from_artefact(changed, str(tmp_path / "artefact"))


def test_a_tower_of_one_s_own_goes_with_the_artefact(
    language_folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is trained with a relative name, from one folder, and read from another, where that name is nothing."""
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    tower = save_tiny_efficientnet(tmp_path / "tower")
    plain, changed = (load_image_encoder(str(tower), layer=-1) for _ in range(2))
    with torch.no_grad():
        next(changed.model.parameters()).add_(0.5)
    save_weight_delta(
        tmp_path / "here" / "my_tower", changed.model, plain.model, {"base": plain.weights, "terms": "CC BY"}
    )
    values: Any = tiny_values(tower, language_folders["llama"], draw_data(tmp_path / "data"))
    values["vision"] = {"towers": [{"source": str(tower), "layer": -1, "difference": "my_tower"}]}
    monkeypatch.chdir(tmp_path / "here")
    made = assemble(parse_recipe(values, "test"), dtype="float32")
    save_artefact(tmp_path / "here" / "artefact", made, Facts(made.fingerprints))
    shutil.move(tmp_path / "here" / "artefact", tmp_path / "there" / "artefact")
    shutil.rmtree(tmp_path / "here" / "my_tower")
    monkeypatch.chdir(tmp_path / "there")
    frozen = FrozenModels()
    again, _ = load_artefact("artefact", dtype="float32", frozen=frozen)
    assert again.fingerprints == made.fingerprints and again.recipe.vision.towers[0].difference == "towers/0"
    assert again.vision_side.terms == ["CC BY"]
    save_artefact(tmp_path / "there" / "artefact", again, Facts(again.fingerprints))  # over what it was read from
    shutil.copytree("artefact", tmp_path / "copy")
    third, _ = load_artefact(tmp_path / "copy", dtype="float32", frozen=frozen)
    assert adapter_fingerprint(third) == adapter_fingerprint(again) and len(frozen.towers) == 1
    assert not start_from_artefact(made, "artefact").changes  # the same tower under another name
    assert sections_of("artefact")["vision"]["towers"][0]["difference"] == str(Path("artefact/towers/0").resolve())
    publish(tmp_path / "there" / "artefact", tmp_path / "published", {})
    assert str(tmp_path) not in (tmp_path / "published" / "recipe.yaml").read_text().replace(str(tower), "")
