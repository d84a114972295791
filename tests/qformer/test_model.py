"""The walk of a picture: vectors land in their slots, gradients reach what trains and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qformer.bridge import QFormer
from qformer.config import BridgeConfig
from qformer.feature_norm import FeatureNorm
from qformer.image_encoders import ImageEncoder
from qformer.language import IGNORED
from qformer.language_loading import load_language_model
from qformer.lora import LoraSettings
from qformer.model import TokenBatch, VisionLanguageModel
from qformer.vision_loading import load_image_encoder


@pytest.fixture
def model(vision_folder: Path, language_folders: dict[str, Path]) -> VisionLanguageModel:
    torch.manual_seed(0)
    encoder = load_image_encoder(str(vision_folder))
    language = load_language_model(language_folders["llama"], quantize="none", compute_dtype=torch.float32)
    language.add_lora(LoraSettings(rank=2, alpha=4))
    norm = FeatureNorm([encoder])
    bridge = QFormer(BridgeConfig.preset("tiny", encoder_width=norm.width, num_queries=2, dropout=0.0))
    projection = nn.Linear(bridge.config.hidden_size, language.width)
    return VisionLanguageModel([encoder], norm, bridge, projection, language)


def two_image_batch() -> TokenBatch:
    ids = torch.tensor([[9, 0, 0, 8, 0, 0, 7, 20, 1]])
    slots = torch.zeros_like(ids, dtype=torch.bool)
    slots[0, [1, 2, 4, 5]] = True
    labels = torch.full_like(ids, IGNORED)
    labels[0, 7:] = ids[0, 7:]
    return TokenBatch(ids, torch.ones_like(ids), slots, labels)


def test_vectors_of_several_images_land_in_reading_order(model: VisionLanguageModel) -> None:
    batch = two_image_batch()
    vectors = torch.arange(4.0).reshape(2, 2, 1).expand(2, 2, model.language.width)
    embeds = model.place(batch, vectors)
    assert embeds[0, [1, 2, 4, 5], 0].tolist() == [0.0, 1.0, 2.0, 3.0]
    words = model.language.embed(batch.ids)
    assert torch.equal(embeds[0, [0, 3, 6, 7, 8]], words[0, [0, 3, 6, 7, 8]])


def test_gradients_reach_what_trains_and_only_that(model: VisionLanguageModel) -> None:
    model.train()
    encoder = model.encoders[0]
    assert isinstance(encoder, ImageEncoder)
    features = encoder(torch.rand(2, 3, 32, 32))
    loss, count = model(two_image_batch(), [features])
    loss.backward()
    assert count == 2
    for name, parameter in model.named_parameters():
        frozen = name.startswith("encoders.") or (name.startswith("language.") and "lora_" not in name)
        assert parameter.requires_grad is not frozen, name
        if frozen:
            assert parameter.grad is None, name
        else:
            assert parameter.grad is not None and torch.isfinite(parameter.grad).all(), name
    assert model.bridge.query_tokens.grad is not None and model.bridge.query_tokens.grad.norm() > 0


def test_queries_do_not_stay_alike(model: VisionLanguageModel) -> None:
    """Queries that start alike stay alike for ever: ours start apart."""
    encoder = model.encoders[0]
    vectors = model.image_embeddings([encoder(torch.rand(1, 3, 32, 32))])
    assert vectors.shape == (1, 2, model.language.width)
    assert not torch.allclose(vectors[0, 0], vectors[0, 1], atol=1e-3)


def test_training_mode_leaves_towers_in_evaluation_mode(model: VisionLanguageModel) -> None:
    model.train()
    assert model.bridge.training and not any(module.training for module in model.encoders.modules())
    assert not model.language.base.training


def test_without_labels_there_is_nothing_to_learn(model: VisionLanguageModel) -> None:
    batch = two_image_batch()
    with pytest.raises(ValueError, match="labels"):
        model(TokenBatch(batch.ids, batch.attention_mask, batch.image_slots), [torch.rand(2, 5, 24)])
