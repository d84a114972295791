"""Attention of the bridge: weights against a softmax by hand, places against pictures with one bright spot, words."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_tiny_bert, save_tiny_efficientnet, tiny_values

from adapters.data.image_ref import ImageRef
from adapters.data.images import open_image
from adapters.loading.vision_side import VisionSide, load_vision_side
from adapters.recipe import parse_recipe
from qformer.bridge import QFormer
from qformer.errors import UserError
from serve.looking.attention import CAVEAT, CLASS_TOKEN, Attention, Places, describe, draw, look

MakeSight = Callable[..., VisionSide]
WHOLE = (0.0, 0.0, 90.0, 60.0)


@pytest.fixture
def picture(tmp_path: Path) -> ImageRef:
    noise = np.random.default_rng(0).integers(0, 255, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    return ImageRef("noise.png", path=tmp_path / "noise.png")


@pytest.fixture
def make_sight(vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path, cache_here: Path) -> MakeSight:
    def make(towers: list[dict[str, Any]] | None = None, **bridge: Any) -> VisionSide:
        values: Any = tiny_values(vision_folder, language_folders["llama"], tmp_path / "none.jsonl")
        values["bridge"] = bridge or values["bridge"]
        if towers is not None:
            values["vision"] = {"towers": towers}
        vision_side = load_vision_side(parse_recipe(values, "test"))
        for parameter in vision_side.bridge.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # fresh weights look at all places alike
        return vision_side

    return make


def one_tower(grid: np.ndarray, *, class_token: float | None = None, box: tuple[float, ...] = WHOLE) -> Attention:
    """One layer, one query, weights as given, on a picture of 90 × 60."""
    side = len(grid)
    rows = tuple((np.arange(side) + 0.5) / side)
    weights = np.concatenate([[] if class_token is None else [class_token], grid.flatten()])
    tower = Places("tower", rows, box, class_token is not None)  # type: ignore[arg-type]
    return Attention(torch.tensor(weights, dtype=torch.float32)[None, None], (1,), (tower,), (90, 60))


def test_weights_are_the_softmax_of_queries_and_keys(make_sight: MakeSight, picture: ImageRef) -> None:
    vision_side = make_sight()
    bridge = vision_side.bridge
    assert isinstance(bridge, QFormer)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for layer in bridge.layers:
        if layer.cross_attention is not None:
            attention: Any = layer.cross_attention.attention
            attention.query.register_forward_hook(lambda module, given, out: seen.append((out, torch.empty(0))))
    found = look(vision_side, picture)
    features = vision_side.feature_norm(vision_side.features([picture]))
    expected = []
    looking = [layer.cross_attention.attention for layer in bridge.layers if layer.cross_attention is not None]
    for (queries, _), attention in zip(seen, looking, strict=True):
        keys = attention.key(features)
        width = keys.shape[-1] // attention.num_heads
        heads = []
        for head in range(attention.num_heads):
            part = slice(head * width, (head + 1) * width)
            scores = queries[0, :, part] @ keys[0, :, part].T / width**0.5  # [Q, P]
            heads.append(scores.exp() / scores.exp().sum(dim=1, keepdim=True))
        expected.append(torch.stack(heads).mean(dim=0))

    assert torch.allclose(found.weights, torch.stack(expected), atol=1e-6)
    assert found.layers == tuple(n for n, layer in enumerate(bridge.layers, 1) if layer.cross_attention is not None)
    assert found.size == (90, 60)
    assert found.towers[0].class_token and found.towers[0].tokens == found.weights.shape[2] == 5
    assert torch.allclose(found.weights.sum(dim=2), torch.ones(len(found.layers), 3))


def test_looking_changes_no_answer(make_sight: MakeSight, picture: ImageRef) -> None:
    vision_side = make_sight()
    vision_side.bridge.eval()
    features = vision_side.feature_norm(vision_side.features([picture]))
    before = vision_side.bridge(features).queries
    look(vision_side, picture)

    assert torch.equal(vision_side.bridge(features).queries, before)


def test_all_together_is_the_mean() -> None:
    weights = torch.rand(2, 3, 4)
    found = Attention(weights, (1, 3), (Places("tower", (0.25, 0.75), WHOLE, False),), (90, 60))

    assert torch.equal(found.chosen(query=2, layer=3), weights[1, 1])
    assert torch.allclose(found.chosen(layer=1), weights[0].mean(dim=0))
    assert torch.allclose(found.chosen(query=1), weights[:, 0].mean(dim=0))
    assert torch.allclose(found.chosen(), weights.mean(dim=(0, 1)))


@pytest.mark.parametrize(("query", "layer", "says"), [(4, 0, "--query 4: take 1 to 3"), (0, 2, "one of 1, 3")])
def test_a_query_or_layer_that_is_none_is_told(query: int, layer: int, says: str) -> None:
    found = Attention(torch.rand(2, 3, 4), (1, 3), (Places("tower", (0.25, 0.75), WHOLE, False),), (90, 60))

    with pytest.raises(UserError, match=says):
        found.chosen(query, layer)


@pytest.mark.parametrize("place", [(0, 0), (0, 2), (1, 1), (2, 0)])
def test_a_place_is_drawn_where_it_lies(place: tuple[int, int]) -> None:
    grid = np.zeros((3, 3))
    grid[place] = 1.0
    heat = one_tower(grid).heat((90, 60))
    row, column = place

    assert heat.shape == (60, 90)
    assert heat[row * 20 + 10, column * 30 + 15] == pytest.approx(9, rel=0.1)
    hottest = np.argwhere(heat > heat.max() * 0.6).mean(axis=0)
    assert row * 20 <= hottest[0] < row * 20 + 20 and column * 30 <= hottest[1] < column * 30 + 30


def test_an_even_spread_is_one_everywhere_whatever_the_towers() -> None:
    towers = (
        Places("fine", tuple((np.arange(4) + 0.5) / 4), WHOLE, True),
        Places("coarse", (0.1, 0.9), WHOLE, False),
    )
    even = Attention(torch.full((1, 1, 21), 1 / 21), (1,), towers, (90, 60))

    assert np.allclose(even.heat((30, 20)), 1)
    assert even.strongest() == pytest.approx(1)
    assert even.shares() == pytest.approx({"fine": 16 / 21, "coarse": 4 / 21, CLASS_TOKEN: 1 / 21})


def test_what_a_crop_leaves_out_stays_cold() -> None:
    heat = one_tower(np.full((2, 2), 0.25), box=(15.0, 0.0, 75.0, 60.0)).heat((90, 60))

    assert np.allclose(heat[:, :15], 0) and np.allclose(heat[:, 75:], 0)
    assert np.allclose(heat[:, 15:75], 1)


def test_two_towers_and_places_of_a_convolution(make_sight: MakeSight, picture: ImageRef, tmp_path: Path) -> None:
    lite = str(save_tiny_efficientnet(tmp_path / "lite"))
    clip = make_sight().recipe.vision.towers[0].source
    vision_side = make_sight([{"source": lite, "layer": -1}, {"source": clip, "class_token": False}], preset="tiny")
    found = look(vision_side, picture)

    assert [tower.name for tower in found.towers] == [Path(lite).name, Path(clip).name]
    assert sum(tower.tokens for tower in found.towers) == found.weights.shape[2]
    assert found.towers[0].rows == pytest.approx(vision_side.encoders[0].centres().tolist())
    assert CLASS_TOKEN not in found.shares()


def test_a_bridge_that_reads_the_question_looks_elsewhere(
    make_sight: MakeSight, picture: ImageRef, tmp_path: Path
) -> None:
    vision_side = make_sight(preset="tiny", start=str(save_tiny_bert(tmp_path / "bert")), instruction_aware=True)

    assert not torch.equal(
        look(vision_side, picture, "a red square").weights, look(vision_side, picture, "plain").weights
    )


def test_a_simple_bridge_has_nothing_to_show(make_sight: MakeSight, picture: ImageRef) -> None:
    with pytest.raises(UserError, match=r"bridge \(mean\) has no queries"):
        look(make_sight(kind="mean", preset="tiny"), picture)


def test_the_drawing_is_warm_where_attention_is_and_dark_elsewhere(tmp_path: Path) -> None:
    grid = np.zeros((3, 3))
    grid[0, 2] = 1.0
    drawn = np.asarray(draw(Image.new("RGB", (900, 600), (90, 90, 90)), one_tower(grid))).astype(int)

    assert drawn.shape == (600, 900, 3)
    assert drawn[100, 750].sum() > 2 * drawn[500, 100].sum()
    assert drawn[100, 750, 0] > drawn[100, 750, 2] + 60
    assert len(set(drawn[500, 100])) == 1


def test_a_large_picture_is_drawn_smaller_and_a_small_one_larger(picture: ImageRef) -> None:
    found = one_tower(np.eye(3) / 3)

    assert draw(Image.new("RGB", (3000, 2000)), found).size == (1024, 683)
    assert draw(open_image(picture), found).size == (512, 341)


def test_the_words_say_how_uneven_it_is_and_what_it_does_not_mean() -> None:
    peaked = np.zeros((3, 3))
    peaked[0, 0] = 0.8

    assert describe(one_tower(peaked, class_token=0.2), query=1) == (
        "Query 1 of 1, all layers, mean over heads. The strongest of 3×3 places gets 8.0 times an even share."
        f" It rests 80% on the places, 20% on the class token, which is no place and is not drawn. {CAVEAT}"
    )
    assert "Spread almost evenly" in describe(one_tower(np.full((3, 3), 1 / 9)))
