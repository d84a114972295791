"""Everything up to the bridge: loaded as the recipe says it, shared if it may be, and refused in one line."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import WORDS, save_tiny_bert, save_tiny_efficientnet
from transformers import CLIPVisionModel

from adapters.data.image_ref import image_ref
from adapters.loading.vision_side import (
    BridgeTokenizer,
    FrozenModels,
    bridge_config,
    build_bridge,
    check_device,
    load_vision_side,
)
from adapters.recipe import BridgeSection, Recipe, parse_recipe
from qformer.bridge import QFormer
from qformer.errors import UserError
from qformer.feature_norm import FeatureNorm
from qformer.image_encoders import ImageEncoder
from qformer.representation import RepresentationModel
from qformer.simple_bridges import SimpleBridge
from qformer.vision_loading import load_image_encoder
from qformer.weight_delta import save_weight_delta

pytestmark = pytest.mark.usefixtures("cache_here")


def recipe_of(*towers: Path | dict[str, Any], seed: int = 0, **bridge: object) -> Recipe:
    """A recipe whose language model is never loaded."""
    values: Any = {
        "vision": {"towers": [tower if isinstance(tower, dict) else {"source": str(tower)} for tower in towers]},
        "bridge": {"preset": "tiny", "num_queries": 3, **bridge},
        "language": {"source": "not loaded"},
        "train": {"seed": seed},
    }
    return parse_recipe(values, "test")


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_bert(tmp_path_factory.mktemp("bert") / "bert")


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    Image.new("RGB", (32, 32), (200, 40, 10)).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_features_are_those_of_the_tower_s_hidden_state(vision_folder: Path, picture: Path) -> None:
    """Transformers' own tower gives the reference: layer -2, class token in front, pictures as CLIP normalises them."""
    side = load_vision_side(recipe_of(vision_folder))
    theirs = CLIPVisionModel.from_pretrained(vision_folder).eval()
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(1, 3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(1, 3, 1, 1)
    pixels = (torch.tensor([200, 40, 10]).view(1, 3, 1, 1).expand(1, 3, 32, 32) / 255 - mean) / std
    with torch.no_grad():
        expected = theirs(pixel_values=pixels, output_hidden_states=True).hidden_states[-2]  # [1, 1 + 4, 24]
    (found,) = side.features([image_ref(str(picture))])
    assert found.shape == (1, 5, 24)
    torch.testing.assert_close(found.float(), expected, atol=5e-3, rtol=5e-3)  # the cache keeps half precision


def test_fresh_weights_follow_the_seed_and_nothing_before(vision_folder: Path) -> None:
    torch.manual_seed(123)
    first = load_vision_side(recipe_of(vision_folder))
    torch.manual_seed(456)
    again = load_vision_side(recipe_of(vision_folder))
    other = load_vision_side(recipe_of(vision_folder, seed=1))
    weights = [side.bridge.state_dict() for side in (first, again, other)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())
    assert not torch.equal(weights[0]["query_tokens"], weights[2]["query_tokens"])


def test_two_towers_stand_side_by_side_as_tokens(vision_folder: Path, tmp_path: Path, picture: Path) -> None:
    second = save_tiny_efficientnet(tmp_path / "tower")
    side = load_vision_side(recipe_of(vision_folder, {"source": str(second), "layer": -1}))
    features = side.features([image_ref(str(picture))] * 2)
    assert [len(tensor) for tensor in features] == [2, 2] and features[0].shape[1:] == (5, 24)
    assert list(side.fingerprints) == ["vision.0", "vision.1"] and len(set(side.fingerprints.values())) == 2
    joined = side.feature_norm(features)
    assert joined.shape[:2] == (2, sum(tensor.shape[1] for tensor in features))
    assert set(side.parts()) == {"feature_norm", "bridge"}


def test_a_tower_that_is_loaded_already_is_shared(vision_folder: Path) -> None:
    frozen = FrozenModels()
    one = load_vision_side(recipe_of(vision_folder), frozen=frozen)
    other = load_vision_side(recipe_of(vision_folder, seed=5), frozen=frozen)
    assert other.encoders[0] is one.encoders[0] and other.caches[0] is one.caches[0]
    assert other.bridge is not one.bridge
    elsewhere = load_vision_side(recipe_of({"source": str(vision_folder), "layer": -1}), frozen=frozen)
    assert elsewhere.encoders[0] is not one.encoders[0] and len(frozen.towers) == 2


def test_a_difference_is_added_and_its_terms_are_inherited(tmp_path: Path) -> None:
    folder = save_tiny_efficientnet(tmp_path / "tower")
    plain, changed = (load_image_encoder(str(folder), layer=-1) for _ in range(2))
    with torch.no_grad():
        next(changed.model.parameters()).add_(0.25)
    save_weight_delta(tmp_path / "delta", changed.model, plain.model, {"base": plain.weights, "terms": "CC BY"})
    tower = {"source": str(folder), "layer": -1}
    frozen = FrozenModels()
    without = load_vision_side(recipe_of(tower), frozen=frozen)
    with_it = load_vision_side(recipe_of(tower | {"difference": str(tmp_path / "delta")}), frozen=frozen)
    assert without.terms == [] and with_it.terms == ["CC BY"]
    assert without.fingerprints["vision.0"] != with_it.fingerprints["vision.0"] and len(frozen.towers) == 2
    got, expected = (next(encoder.model.parameters()) for encoder in (with_it.encoders[0], changed))
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def test_a_bridge_that_reads_text_starts_from_bert(vision_folder: Path, bert: Path) -> None:
    side = load_vision_side(recipe_of(vision_folder, text_branch=True, start=str(bert)))
    words = load_file(bert / "model.safetensors")["embeddings.word_embeddings.weight"]
    assert isinstance(side.bridge, QFormer) and side.bridge.embeddings is not None and side.tokenizer is not None
    table = side.bridge.embeddings.words.weight
    assert torch.equal(table[: len(words)], words) and not table.requires_grad
    assert "bridge.start" in side.fingerprints and set(side.parts()) == {"feature_norm", "bridge", "heads"}
    ids, mask = side.tokenizer(["a red square", "red"], longest=4)
    start, end, pad = 3, 4, 0  # [CLS], [SEP], [PAD] in the tiny vocabulary
    a, red = (6 + WORDS.index(word) for word in ("a", "red"))
    assert ids.tolist() == [[start, a, red, end], [start, red, end, pad]]  # "square" is beyond the fourth token
    assert mask.tolist() == [[True] * 4, [True] * 3 + [False]]
    assert side.tokenizer.decode_id == 1  # [unused0], since there is no [DEC]
    model = side.representation()
    assert isinstance(model, RepresentationModel) and model.bridge is side.bridge and model.heads is side.heads


class Words:
    """A vocabulary, as a tokenizer tells it."""

    def __init__(self, **vocabulary: int) -> None:
        self.vocabulary = vocabulary

    def get_vocab(self) -> dict[str, int]:
        return self.vocabulary


def test_the_token_that_writing_starts_from() -> None:
    assert BridgeTokenizer(Words(**{"[MASK]": 4, "[DEC]": 9, "[unused0]": 2})).decode_id == 9
    assert BridgeTokenizer(Words(**{"[MASK]": 4})).decode_id == 4
    with pytest.raises(UserError, match=r"bridge\.start: its tokenizer has none of \[DEC\].*name a BERT"):
        _ = BridgeTokenizer(Words(a=0)).decode_id


def test_what_is_left_out_of_a_bridge_is_the_preset_s() -> None:
    config = bridge_config(BridgeSection(preset="tiny", num_queries=5), encoder_width=24)
    plain = bridge_config(BridgeSection(preset="tiny"), encoder_width=24)
    assert (config.num_queries, config.encoder_width) == (5, 24)
    assert (config.num_layers, config.hidden_size) == (plain.num_layers, plain.hidden_size) == (2, 32)


@pytest.fixture
def tower(vision_folder: Path) -> ImageEncoder:
    return load_image_encoder(str(vision_folder))


@pytest.mark.parametrize(("kind", "queries"), [("mean", 1), ("patches", 5), ("gated", 5)])
def test_a_simpler_bridge_has_as_many_vectors_as_it_passes_on(tower: ImageEncoder, kind: Any, queries: int) -> None:
    bridge = build_bridge(BridgeSection(preset="tiny", kind=kind), FeatureNorm([tower]))
    assert isinstance(bridge, SimpleBridge) and bridge.config.num_queries == queries


@pytest.mark.parametrize(
    "setting",
    [{"num_queries": 4}, {"num_layers": 1}, {"start": "x"}, {"text_branch": True}, {"patch_dropout": 0.5}],
)
def test_a_simpler_bridge_refuses_what_only_the_qformer_has(tower: ImageEncoder, setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises(UserError, match=rf"bridge\.{name}: only the Q-Former has it; .* bridge\.kind=qformer"):
        build_bridge(BridgeSection(preset="tiny", kind="mean", **setting), FeatureNorm([tower]))


@pytest.mark.parametrize("key", ["text_branch", "instruction_aware"])
def test_a_bridge_reads_text_with_a_tokenizer_only(vision_folder: Path, key: str) -> None:
    with pytest.raises(UserError, match=rf"bridge\.{key}: needs bridge\.start, whose tokenizer reads the text"):
        load_vision_side(recipe_of(vision_folder, **{key: True}))


def test_a_bert_that_is_not_in_one_file_is_named(vision_folder: Path, bert: Path, tmp_path: Path) -> None:
    parts = tmp_path / "parts"
    shutil.copytree(bert, parts)
    (parts / "model.safetensors").rename(parts / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=rf"bridge\.start: {parts} has no model\.safetensors; name a BERT saved in one"):
        load_vision_side(recipe_of(vision_folder, start=str(parts)))


def test_pictures_and_texts_cannot_be_compared_without_a_text_branch(vision_folder: Path) -> None:
    with pytest.raises(UserError, match=r"bridge\.text_branch: it is off"):
        load_vision_side(recipe_of(vision_folder)).representation()


def test_a_device_that_torch_lacks_is_named() -> None:
    check_device("cpu")
    for device in ("vulkan", "no such thing"):
        with pytest.raises(UserError, match=rf"--device {device}: torch cannot use it here"):
            check_device(device)
