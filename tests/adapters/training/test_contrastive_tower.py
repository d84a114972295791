"""Training a tower's last blocks contrastively: it learns, and what it writes is the tower that it trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from data_rows import write_jsonl
from tiny import draw_captions, save_tiny_bert, save_tiny_efficientnet

from adapters.data.image_ref import ImageRef
from adapters.data.reading import read_data
from adapters.features.cache import FeatureCache
from adapters.loading.weight_deltas import read_weight_delta
from adapters.recipe import TowerSection
from adapters.training.contrastive_tower import AttentionPool, SentenceEncoder, train_tower
from qformer.errors import UserError
from qformer.vision_loading import load_image_encoder

pytestmark = pytest.mark.usefixtures("cache_here")


def test_it_learns_and_leaves_a_difference(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tower, bert = save_tiny_efficientnet(tmp_path / "tower"), save_tiny_bert(tmp_path / "bert")
    data = draw_captions(tmp_path / "data")
    out = tmp_path / "made"
    best = train_tower(
        data, data, out, source=str(tower), text_source=str(bert), start=5, epochs=30, batch_size=12, learning_rate=1e-2
    )
    lines = capsys.readouterr().err.splitlines()
    losses = [float(line.split("loss ")[1].split()[0]) for line in lines if line.startswith("epoch")]
    assert len(losses) == 30 and losses[-1] < 0.8 * losses[0]
    facts = json.loads((out / "difference.json").read_text())
    assert facts["metrics"] == best and 1 <= best["epoch"] <= 30
    plain, made = load_image_encoder(str(tower), layer=-1), load_image_encoder(str(tower), layer=-1, weight_delta=out)
    assert facts["base"] == plain.weights
    for name, tensor in made.model.state_dict().items():
        start = name.startswith(("parts.6.", "parts.7.", "parts.8."))
        moved = not torch.equal(tensor, plain.model.state_dict()[name])
        assert moved == start or (start and "depthwise" in name), name  # a channel that never fires learns nothing
    section = TowerSection(source=str(tower), layer=-1, difference=str(out))
    assert read_weight_delta(section.difference or "").folder == out


def test_it_learns_from_views(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tower, bert = save_tiny_efficientnet(tmp_path / "tower"), save_tiny_bert(tmp_path / "bert")
    data = draw_captions(tmp_path / "data")
    seen: list[int] = []
    load = FeatureCache.load

    def noted(cache: FeatureCache, refs: Sequence[ImageRef]) -> torch.Tensor:
        seen.extend(ref.view for ref in refs)
        return load(cache, refs)

    monkeypatch.setattr(FeatureCache, "load", noted)
    train: dict[str, Any] = {
        "source": str(tower),
        "text_source": str(bert),
        "epochs": 3,
        "batch_size": 12,
        "quiet": True,
    }
    train_tower(data, data, tmp_path / "made", views=3, **train)
    pictures = len(read_data(data).examples)
    assert set(seen) == {0, 1, 2} and seen.count(0) > 3 * pictures  # held-out pictures are shown whole, each epoch
    with pytest.raises(UserError, match="views 0"):
        train_tower(data, data, tmp_path / "none", views=0, **train)


def test_the_trunk_and_the_tail_are_the_tower(tmp_path: Path) -> None:
    tower = save_tiny_efficientnet(tmp_path / "tower")
    trunk, whole = (load_image_encoder(str(tower), layer=layer) for layer in (5, -1))
    image = read_data(draw_captions(tmp_path / "data")).examples[0].images[0]
    from adapters.data.images import open_image

    pixels = whole.preprocess([open_image(image)])
    rows = trunk.output_shape()[0]
    maps = trunk(pixels).transpose(1, 2).unflatten(2, (rows, rows))
    assert torch.allclose(whole.tail(5)(maps).flatten(2).transpose(1, 2), whole(pixels), atol=1e-5)  # type: ignore[operator]


def test_pool_and_sentences(tmp_path: Path) -> None:
    pool = AttentionPool(16, heads=2)
    places = torch.randn(3, 9, 16)
    assert torch.allclose(pool(places).norm(dim=-1), torch.ones(3))
    lower = AttentionPool(16, heads=2, compute_dtype=torch.bfloat16)
    lower.load_state_dict(pool.state_dict())
    found = lower(places)
    assert found.dtype == torch.float32 and torch.allclose(found.norm(dim=-1), torch.ones(3))
    assert torch.allclose(found, pool(places), atol=0.02) and not torch.equal(found, pool(places))
    found.sum().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in lower.parameters())
    sentences = SentenceEncoder(str(save_tiny_bert(tmp_path / "bert")))
    texts = ["a red square", "the colour of the square is blue", "a square"]
    together = sentences(texts, batch_size=2)
    for row, text in enumerate(texts):
        assert torch.allclose(together[row], sentences([text])[0], atol=1e-5)


def test_other_towers_are_refused(vision_folder: Path, tmp_path: Path) -> None:
    data = draw_captions(tmp_path / "data")
    with pytest.raises(UserError, match="EfficientNet-Lite"):
        train_tower(data, data, tmp_path / "made", source=str(vision_folder), start=1)
    with pytest.raises(UserError, match="none of that name ships"):
        read_weight_delta("nothing")


def test_captions_in_other_languages_and_nothing_to_train_are_told_first(tmp_path: Path) -> None:
    tower, bert = save_tiny_efficientnet(tmp_path / "tower"), save_tiny_bert(tmp_path / "bert")
    english = draw_captions(tmp_path / "data")
    rows = [json.loads(line) | {"language": "zh"} for line in english.read_text(encoding="utf-8").splitlines()]
    chinese = write_jsonl(tmp_path / "data" / "zh.jsonl", rows)
    known: Any = {"source": str(tower), "text_source": str(bert)}
    for train, val in ((chinese, english), (english, chinese)):
        with pytest.raises(UserError, match=r"zh\.jsonl: 0 pictures with English captions"):
            train_tower(train, val, tmp_path / "made", start=5, **known)
    with pytest.raises(UserError, match=r"start is 8, and .* has the hidden states 0 to 8"):
        train_tower(english, english, tmp_path / "made", start=8, **known)
