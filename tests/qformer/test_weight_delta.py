"""A small difference to published weights: what is written, what it makes of a tower, and whose it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import save_tiny_efficientnet

from qformer.errors import UserError
from qformer.sources import fingerprint
from qformer.vision_loading import load_image_encoder
from qformer.weight_delta import save_weight_delta

pytestmark = pytest.mark.usefixtures("cache_here")


@pytest.fixture
def tower(tmp_path: Path) -> Path:
    return save_tiny_efficientnet(tmp_path / "tower")


@pytest.fixture
def difference(tower: Path, tmp_path: Path) -> Path:
    """The head's weights moved by a known amount."""
    published, changed = (load_image_encoder(str(tower), layer=-1) for _ in range(2))
    with torch.no_grad():
        changed.model.parts[-1].conv.weight.add_(0.25)
    return save_weight_delta(tmp_path / "made", changed.model, published.model, {"base": published.weights})


def test_only_what_changed_is_kept_and_it_is_added_back(tower: Path, difference: Path) -> None:
    tensors = load_file(difference / "difference.safetensors")
    assert list(tensors) == ["parts.8.conv.weight"]
    assert tensors["parts.8.conv.weight"].dtype == torch.bfloat16
    plain = load_image_encoder(str(tower), layer=-1)
    moved = load_image_encoder(str(tower), layer=-1, weight_delta=difference)
    assert torch.allclose(moved.model.parts[-1].conv.weight, plain.model.parts[-1].conv.weight + 0.25, atol=1e-6)
    pixels = plain.preprocess([Image.new("RGB", (40, 40), (90, 20, 200))])
    assert not torch.allclose(plain(pixels), moved(pixels), atol=1e-3)


def test_it_has_a_fingerprint_of_its_own(tower: Path, difference: Path) -> None:
    moved = load_image_encoder(str(tower), layer=-1, weight_delta=difference)
    assert str(moved.weights).startswith("sha256:") and moved.weights != fingerprint(tower)
    assert moved.identity() != load_image_encoder(str(tower), layer=-1).identity()  # so features are never mixed up


def test_another_tower_and_damage_are_refused(tower: Path, difference: Path, tmp_path: Path) -> None:
    other = save_tiny_efficientnet(tmp_path / "other", seed=1)
    with pytest.raises(UserError, match="belongs to the weights"):
        load_image_encoder(str(other), layer=-1, weight_delta=difference)
    facts = json.loads((difference / "difference.json").read_text())
    (difference / "difference.json").write_text("{}")
    with pytest.raises(UserError, match="no difference"):
        load_image_encoder(str(tower), layer=-1, weight_delta=difference)
    (difference / "difference.json").write_text(json.dumps(facts))
    (difference / "difference.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="no difference"):
        load_image_encoder(str(tower), layer=-1, weight_delta=difference)
    with pytest.raises(UserError, match="no difference"):
        load_image_encoder(str(tower), layer=-1, weight_delta=tmp_path / "nowhere")
