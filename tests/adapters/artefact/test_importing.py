"""A published BLIP-2 or InstructBLIP as an adapter: the very tokens of transformers, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from PIL import Image
from published import KINDS, QUERIES, answers_of, draw_pictures, save_published
from safetensors.torch import load_file

from adapters.artefact.artefact import find_artefact, load_artefact, load_vision_side_artefact, read_recipe
from adapters.artefact.facts import read_facts
from adapters.artefact.importing import import_published
from adapters.data.image_ref import ImageRef
from adapters.inference.generator import Generator
from adapters.inference.request import Request
from adapters.inference.retrieval import Retriever
from qformer.decoding import Decoding
from qformer.errors import UserError
from qformer.published import LANGUAGE, open_published
from qformer.published_bridge import read_bridge
from qformer.vision_loading import load_image_encoder

pytestmark = pytest.mark.usefixtures("cache_here")
TEXTS = ("what is the picture of?", "is it red?", "a")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """A checkpoint of a kind with the model it was saved from; made once."""
    known: dict[str, tuple[Path, Any]] = {}

    def make(kind: str) -> tuple[Path, Any]:
        if kind not in known:
            folder = tmp_path_factory.mktemp("published") / kind
            known[kind] = (folder, save_published(folder, kind))
        return known[kind]

    return make


def tokens(adapter: Any, pictures: list[Path], texts: tuple[str, ...], *, beams: int, alone: bool) -> list[list[int]]:
    """What an adapter writes, up to and with the end token."""
    adapter.prompts.style = type(adapter.prompts.style)(question="{question}")  # transformers adds no words either
    asked = [
        Request(adapter.prompts.vqa(text), (ImageRef(str(path), path=path),))
        for path, text in zip(pictures, texts, strict=True)
    ]
    generator, decoding = Generator(adapter), Decoding(max_new_tokens=8, num_beams=beams)
    batches = [[one] for one in asked] if alone else [asked]
    return [list(row) for batch in batches for row in generator.write(batch, decoding)]


@pytest.mark.parametrize("kind", KINDS)
def test_an_import_writes_the_tokens_of_transformers(
    made: Callable[[str], tuple[Path, Any]], kind: str, tmp_path: Path
) -> None:
    folder, model = made(kind)
    assert len(list(folder.glob("*.safetensors"))) > 2  # in shards
    pictures = draw_pictures(tmp_path / "pictures")
    import_published(str(folder), tmp_path / "run")
    adapter, facts = load_artefact(tmp_path / "run", dtype="float32")
    assert facts.imported == str(folder) and adapter.model.num_queries == QUERIES
    processor = tf.AutoProcessor.from_pretrained(folder, backend="pil")
    seen = set()
    for beams in (1, 5):
        expected = answers_of(model, processor, pictures, TEXTS, beams=beams)
        assert tokens(adapter, pictures, TEXTS, beams=beams, alone=False) == expected
        assert tokens(adapter, pictures, TEXTS, beams=beams, alone=True) == expected
        seen |= {tuple(row) for row in expected}
    assert len(seen) > 3  # pictures and questions matter


@pytest.mark.parametrize("kind", ["blip2-opt", "instructblip-t5"])
def test_an_old_configuration_says_less_and_answers_alike(
    made: Callable[[str], tuple[Path, Any]], kind: str, tmp_path: Path
) -> None:
    folder, model = made(kind)
    old = tmp_path / "old"
    save_published(old, kind, old=True)
    values = json.loads((old / "config.json").read_text())
    assert not {"num_query_tokens", "image_token_index"} & set(values)
    pictures = draw_pictures(tmp_path / "pictures")
    import_published(str(old), tmp_path / "run")
    adapter, _ = load_artefact(tmp_path / "run", dtype="float32")
    processor = tf.AutoProcessor.from_pretrained(folder, backend="pil")
    expected = answers_of(model, processor, pictures, TEXTS, beams=5)  # transformers itself refuses such an old one
    assert tokens(adapter, pictures, TEXTS, beams=5, alone=False) == expected


def test_an_answer_ends_where_transformers_ends_it(tmp_path: Path) -> None:
    """BLIP-2 with OPT ends answers at a line's end, not at its tokenizer's end token."""
    folder = tmp_path / "opt"
    model = save_published(folder, "blip2-opt")
    pictures = draw_pictures(tmp_path / "pictures", 1)
    processor = tf.AutoProcessor.from_pretrained(folder, backend="pil")
    first = answers_of(model, processor, pictures, TEXTS[:1], beams=1)[0]
    values = json.loads((folder / "config.json").read_text())
    values["text_config"]["eos_token_id"] = end = first[1]
    (folder / "config.json").write_text(json.dumps(values))
    again = tf.Blip2ForConditionalGeneration.from_pretrained(folder)
    expected = answers_of(again, processor, pictures, TEXTS[:1], beams=1)
    assert expected[0][-1] == end and len(expected[0]) <= 2
    import_published(str(folder), tmp_path / "run")
    adapter, _ = load_artefact(tmp_path / "run", dtype="float32")
    assert tokens(adapter, pictures, TEXTS[:1], beams=1, alone=True) == expected
    assert adapter.prompts.answer_ids("a")[-1] == end  # what is taught ends where answers end


def test_the_weights_are_the_checkpoint_s_bit_by_bit_in_its_own_type(tmp_path: Path) -> None:
    folder = tmp_path / "half"
    model = save_published(folder, "blip2-opt")
    model.half().save_pretrained(folder, max_shard_size="20KB")
    found = import_published(str(folder), tmp_path / "run")
    kept = load_file(tmp_path / "run" / "bridge.safetensors")
    state = model.state_dict()
    assert torch.equal(kept["bridge.query_tokens"], state["query_tokens"])
    assert kept["projection.weight"].dtype == torch.half
    assert torch.equal(kept["feature_norm.norms.0.bias"], state["vision_model.post_layernorm.bias"])
    assert torch.equal(kept["projection.weight"], state["language_projection.weight"])
    ours = ("qformer", "query", "language_projection", "vision_model.post")
    theirs = sum(tensor.nbytes for name, tensor in state.items() if name.startswith(ours))
    assert found["bridge_bytes"] == theirs == sum(tensor.nbytes for tensor in kept.values())
    files = {path.name for path in (tmp_path / "run").iterdir()}
    assert files == {"bridge.safetensors", "recipe.yaml", "artefact.json", "README.md"}
    facts, recipe = read_facts(tmp_path / "run"), read_recipe(tmp_path / "run")
    assert set(facts.fingerprints) == {"vision.0", "language", "bridge.start"} and facts.steps == 0
    assert recipe.language.lora is None and recipe.language.quantize == "none"
    assert "as it was published" in (tmp_path / "run" / "README.md").read_text()


def test_a_checkpoint_for_retrieval_searches_as_transformers_does(
    made: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    folder, model = made("blip2-retrieval")
    import_published(str(folder), tmp_path / "run")
    side, facts = load_vision_side_artefact(tmp_path / "run")
    assert facts.kind == "representation"
    retriever = Retriever(side)
    pictures = draw_pictures(tmp_path / "pictures")
    refs = [ImageRef(str(path), path=path) for path in pictures]
    texts = ["a red square", "the picture", "green"]
    processor = tf.AutoProcessor.from_pretrained(folder, backend="pil")
    images = [Image.open(path).convert("RGB") for path in pictures]
    inputs = processor(images=images, text=texts, padding=True, return_tensors="pt")
    with torch.no_grad():
        contrasted = model(**inputs).logits_per_image
        matched = model(**inputs, use_image_text_matching_head=True).logits_per_image
    scores = retriever.scores(retriever.embed_images(refs), retriever.embed_texts(texts))
    torch.testing.assert_close(scores, contrasted, atol=1e-5, rtol=0)
    pairs = torch.arange(3)[:, None].expand(-1, 2)
    torch.testing.assert_close(retriever.match(refs, texts, pairs), matched[:, 1] - matched[:, 0], atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="this is the first stage"):
        load_artefact(tmp_path / "run")


def spoil(folder: Path, fault: str) -> None:
    """Make a checkpoint one that cannot be imported."""
    config = folder / "config.json"
    values = json.loads(config.read_text())
    if fault == "architecture":
        config.write_text(json.dumps(values | {"model_type": "git"}))
    elif fault == "shard":
        sorted(folder.glob("*.safetensors"))[1].unlink()
    elif fault == "cut":
        shard = sorted(folder.glob("*.safetensors"))[1]
        shard.write_bytes(shard.read_bytes()[:-8])
    elif fault == "sizes":
        values["qformer_config"]["intermediate_size"] = 48
        config.write_text(json.dumps(values))
    elif fault == "activation":
        values["qformer_config"]["hidden_act"] = "relu"
        config.write_text(json.dumps(values))
    elif fault == "tensor":
        index = folder / "model.safetensors.index.json"
        named = json.loads(index.read_text())
        del named["weight_map"]["query_tokens"]
        index.write_text(json.dumps(named))
    elif fault == "json":
        config.write_text("{")


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("architecture", r"model_type 'git'; take a BLIP-2"),
        ("shard", r"names model-00002-of-\d+.safetensors, which .* lacks"),
        ("cut", r"model-00002-of-\d+.safetensors.*(damaged|cannot be read)"),
        ("sizes", r"its Q-Former is not the one of its config.json: .*of another shape"),
        ("activation", r"hidden_act is 'relu'"),
        ("tensor", r"its weights hold no query_tokens"),
        ("json", r"model_type None"),
    ],
)
def test_what_is_no_whole_checkpoint_is_one_line_and_leaves_nothing(
    made: Callable[[str], tuple[Path, Any]], tmp_path: Path, fault: str, says: str
) -> None:
    folder = tmp_path / "spoiled"
    shutil.copytree(made("blip2-opt")[0], folder)
    spoil(folder, fault)
    with pytest.raises(UserError, match=says) as error:
        import_published(str(folder), tmp_path / "run")
    assert "\n" not in str(error.value)
    assert not list(tmp_path.glob("run*"))


def test_what_stands_in_the_folder_is_left_alone(made: Callable[[str], tuple[Path, Any]], tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="there is something already"):
        import_published(str(made("blip2-opt")[0]), tmp_path / "run")
    assert (tmp_path / "run" / "mine.txt").read_text() == "keep me"


def test_other_weights_under_the_same_name_are_noticed(tmp_path: Path) -> None:
    folder = tmp_path / "opt"
    model = save_published(folder, "blip2-opt")
    import_published(str(folder), tmp_path / "run")
    with torch.no_grad():
        model.language_model.lm_head.weight[0, 0] += 1
    model.save_pretrained(folder, max_shard_size="20KB")
    with pytest.raises(UserError, match="it was trained on language weights"):
        load_artefact(tmp_path / "run", dtype="float32")
    assert find_artefact(tmp_path / "run") == tmp_path / "run"


def test_the_bridge_is_read_with_no_shard_of_the_llm_at_hand(
    made: Callable[[str], tuple[Path, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "part"
    shutil.copytree(made("blip2-t5")[0], folder)
    opened = open_published(folder)
    others = {file for name, file in opened.files.items() if not name.startswith(LANGUAGE)}
    only_llm = {opened.files[name] for name in opened.names(LANGUAGE)} - others
    assert only_llm
    for file in only_llm:
        (folder / file).unlink()
    assert read_bridge(open_published(folder)).projection is not None
    assert load_image_encoder(str(folder)).width == 24
    with pytest.raises(UserError, match=f"which {re.escape(str(folder))} lacks"):
        import_published(str(folder), tmp_path / "run")
