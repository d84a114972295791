"""The losses of the first stage against values worked out with plain loops."""

from __future__ import annotations

import math

import pytest
import torch

from qformer.config import BridgeConfig
from qformer.objectives import (
    TEMPERATURE_RANGE,
    Heads,
    contrastive_loss,
    generation_loss,
    hard_negatives,
    matching_loss,
    similarity,
    soft_targets,
)

SMOOTHING = 0.1


def log_softmax(row: list[float]) -> list[float]:
    top = max(row)
    total = math.log(sum(math.exp(value - top) for value in row)) + top
    return [value - total for value in row]


def smoothed(row: list[float], target: list[float]) -> float:
    """Cross-entropy with a tenth of the mass spread evenly over all classes."""
    logs = log_softmax(row)
    return -sum(((1 - SMOOTHING) * t + SMOOTHING / len(row)) * log for t, log in zip(target, logs, strict=True))


def test_similarity_is_that_of_the_nearest_query() -> None:
    images = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.6, 0.8], [-1.0, 0.0]]])
    texts = torch.tensor([[0.0, 1.0], [1.0, 0.0], [-0.6, -0.8]])
    expected = torch.tensor([[1.0, 1.0, -0.6], [0.8, 0.6, 0.6]])
    assert torch.allclose(similarity(images, texts), expected)


def test_contrastive_loss_by_hand_with_several_captions_of_a_picture() -> None:
    torch.manual_seed(0)
    scores = torch.randn(3, 5) * 3
    images, texts = [7, 8, 7], [7, 7, 8, 8, 8]  # the first and the last row show the same picture
    rows = scores.tolist()
    to_text = [
        smoothed(row, [float(image == text) / texts.count(image) for text in texts])
        for row, image in zip(rows, images, strict=True)
    ]
    columns = [[row[t] for row in rows] for t in range(5)]
    to_image = [
        smoothed(column, [float(image == text) / images.count(text) for image in images])
        for column, text in zip(columns, texts, strict=True)
    ]
    expected = (sum(to_text) / 3 + sum(to_image) / 5) / 2
    found = contrastive_loss(scores, torch.tensor(images), torch.tensor(texts))
    assert found.item() == pytest.approx(expected, abs=1e-5)


def test_soft_targets_of_single_captions_are_the_identity() -> None:
    assert torch.equal(soft_targets(torch.tensor([4, 2, 9]), torch.tensor([4, 2, 9])), torch.eye(3))


def test_hard_negatives_are_of_other_pictures_and_drawn_by_similarity() -> None:
    scores = torch.tensor([[9.0, 2.0, 0.0, 2.0], [0.0, 9.0, 5.0, 9.0]])
    ids, others = torch.tensor([0, 1]), torch.tensor([0, 1, 2, 1])
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([hard_negatives(scores, ids, others, generator) for _ in range(4000)])
    assert set(drawn[:, 0].tolist()) <= {1, 2, 3}
    assert set(drawn[:, 1].tolist()) <= {0, 2}
    weights = [math.exp(2 - 9), math.exp(0 - 9), math.exp(2 - 9)]
    whole = sum(weights) + 1
    shares = [weight / whole + 1e-4 for weight in weights]
    for column, share in zip((1, 2, 3), shares, strict=True):
        assert (drawn[:, 0] == column).float().mean().item() == pytest.approx(share / sum(shares), abs=0.03)


def test_a_row_without_negatives_is_told_apart() -> None:
    drawn = hard_negatives(torch.zeros(2, 2), torch.tensor([3, 4]), torch.tensor([3, 3]))
    assert drawn[0] == -1
    assert drawn[1] in (0, 1)


def test_matching_and_generation_losses_by_hand() -> None:
    logits = torch.tensor([[0.2, 1.5], [2.0, -1.0]])
    expected = -(log_softmax([0.2, 1.5])[1] + log_softmax([2.0, -1.0])[0]) / 2
    assert matching_loss(logits, torch.tensor([1, 0])).item() == pytest.approx(expected, abs=1e-6)
    words = torch.tensor([[0.1, 0.9, -0.4], [1.0, 0.0, 0.3]])
    expected = (smoothed([0.1, 0.9, -0.4], [0, 1, 0]) + smoothed([1.0, 0.0, 0.3], [0, 0, 1])) / 2
    assert generation_loss(words, torch.tensor([1, 2])).item() == pytest.approx(expected, abs=1e-6)


def test_heads_give_unit_vectors_means_over_queries_and_words() -> None:
    torch.manual_seed(0)
    heads = Heads(BridgeConfig.preset("tiny"), 8)
    queries, text = torch.randn(2, 4, 32), torch.randn(3, 6, 32)
    assert torch.allclose(heads.image_embeddings(queries).norm(dim=-1), torch.ones(2, 4))
    moved, mask = text.clone(), torch.ones(3, 6, dtype=torch.bool)
    moved[:, 1:] += 1  # only the first token speaks for a text
    assert torch.equal(heads.text_embeddings(text, mask), heads.text_embeddings(moved, mask))
    each = torch.stack([heads.matching(queries[:, q]) for q in range(4)])
    assert torch.allclose(heads.matching_logits(queries), each.mean(dim=0), atol=1e-6)
    words = torch.randn(61, 32)
    hidden = torch.nn.functional.gelu(heads.word_map(text[0]))
    expected = heads.word_norm(hidden) @ words.T + heads.word_bias
    assert torch.allclose(heads.word_logits(text[0], words), expected, atol=1e-5)


def test_a_text_can_be_the_mean_of_its_tokens_padding_left_out() -> None:
    torch.manual_seed(0)
    heads = Heads(BridgeConfig.preset("tiny", text_pooling="mean"), 8)
    text = torch.randn(1, 6, 32)
    mask = torch.tensor([[True, True, True, True, False, False]])
    expected = torch.nn.functional.normalize(heads.text_projection(text[0, :4].mean(dim=0)), dim=-1)
    assert torch.allclose(heads.text_embeddings(text, mask)[0], expected, atol=1e-6)


def test_the_temperature_stays_in_its_range() -> None:
    heads = Heads(BridgeConfig.preset("tiny"))
    for value in (-1.0, 3.0):
        heads.temperature.data.fill_(value)
        heads.clamp_temperature()
        assert TEMPERATURE_RANGE[0] <= heads.temperature.item() <= TEMPERATURE_RANGE[1] + 1e-6
