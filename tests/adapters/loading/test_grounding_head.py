"""A grounding head's file: what is read is what was saved, and other frozen parts are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_efficientnet
from tiny_grounding import LAYERS, save_tiny_head, tiny_config, tiny_parts

from adapters.loading.grounding_head import (
    TowerMaps,
    load_grounding_head,
    load_tower,
    read_grounding_facts,
    save_grounding_head,
)
from qformer.errors import UserError
from qformer.grounding import GroundingHead


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parts")


@pytest.fixture
def file(parts: Path, tmp_path: Path) -> Path:
    return save_tiny_head(parts, tmp_path)


def test_what_is_read_is_what_was_saved(file: Path, parts: Path) -> None:
    loaded = load_grounding_head(file, offline=True)
    config = tiny_config(*tiny_parts(parts))
    torch.manual_seed(3)
    fresh = GroundingHead(config)

    assert loaded.facts.layers == LAYERS and loaded.facts.terms == ("made up - for tests",)
    assert not loaded.head.training and not any(one.requires_grad for one in loaded.head.parameters())
    for name, tensor in fresh.state_dict().items():
        assert torch.equal(loaded.head.state_dict()[name], tensor.to(torch.bfloat16).float()), name


def test_maps_are_the_tower_s_hidden_states(parts: Path) -> None:
    maps, _ = tiny_parts(parts)
    pixels = torch.randn(2, 3, 33, 33)
    states = list(maps.encoder.model.hidden_states(pixels))

    for found, layer in zip(maps(pixels), LAYERS, strict=True):
        torch.testing.assert_close(found, states[layer])


def test_phrases_are_read_alike_whatever_their_case_and_company(parts: Path) -> None:
    _, phrases = tiny_parts(parts)
    together, mask = phrases(["The  RED square", "a square of plain colour here"])
    alone, own = phrases(["the red square"])

    assert own.sum() == mask[0].sum() < mask[1].sum()
    torch.testing.assert_close(together[0, : int(own.sum())], alone[0], atol=1e-5, rtol=1e-5)


def test_another_tower_is_refused(file: Path, tmp_path: Path) -> None:
    facts = read_grounding_facts(file)
    other = save_tiny_efficientnet(tmp_path / "other", seed=1)
    head = GroundingHead(facts.config)
    save_grounding_head(file, head, replace(facts, tower=str(other)))

    with pytest.raises(UserError, match="trained on tower weights"):
        load_grounding_head(file, offline=True)


def test_weights_of_other_sizes_are_refused(file: Path) -> None:
    facts = read_grounding_facts(file)
    save_grounding_head(file, GroundingHead(replace(facts.config, mixing=0)), facts)

    with pytest.raises(UserError, match="do not fit its sizes"):
        load_grounding_head(file, offline=True)


def test_a_damaged_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "head.safetensors").write_bytes(b"no head")

    with pytest.raises(UserError, match="damaged, or no grounding head"):
        read_grounding_facts(tmp_path / "head.safetensors")


@pytest.mark.parametrize("layers", [(), (8, 5), (5, 5), (3, 12)])
def test_layers_that_there_are_not(parts: Path, layers: tuple[int, ...]) -> None:
    maps, _ = tiny_parts(parts)
    with pytest.raises(UserError, match="in rising order"):
        TowerMaps(maps.encoder, layers)


def test_a_transformer_s_tokens_are_refused(vision_folder: Path) -> None:
    with pytest.raises(UserError, match="not clip's tokens"):
        load_tower(str(vision_folder), None, 32, (0, 1), offline=True)
