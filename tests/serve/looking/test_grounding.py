"""Where a phrase is: what is found, drawn and told, with a grounding head and without one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import save_tiny_bert, tiny_values
from tiny_grounding import save_tiny_head

from adapters.data.image_ref import ImageRef
from adapters.loading.vision_side import VisionSide, load_vision_side
from adapters.recipe import parse_recipe
from qformer.attention import MultiHeadAttention, matching_mask
from qformer.errors import UserError
from qformer.grounding import Found
from serve.looking.attention import heat_over
from serve.looking.grounding import Grounder, Grounding, box_and_point, describe_found, draw_found, match_relevance
from serve.looking.named_things import things_named

HEAT = np.array([[0.0, 0.0], [0.0, 1.0]])
FOUND = Grounding("the mug", (0.5, 0.25, 1.0, 0.75), (0.75, 0.75), HEAT, (0.25, 0.75), (0.0, 0.0, 80.0, 40.0), (80, 40))


@pytest.fixture(scope="module")
def side(
    tmp_path_factory: pytest.TempPathFactory, vision_folder: Path, language_folders: dict[str, Path], data_file: Path
) -> VisionSide:
    """Towers and bridge with its text side, random but of a size that attention is not flat."""
    bert = save_tiny_bert(tmp_path_factory.mktemp("text") / "bert")
    values: Any = tiny_values(vision_folder, language_folders["llama"], data_file)
    values["bridge"] |= {"start": str(bert), "text_branch": True}
    side = load_vision_side(parse_recipe(values, "test"))
    torch.manual_seed(0)
    for parameter in side.bridge.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return side


@pytest.fixture
def with_head(side: VisionSide, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path) -> Grounder:
    return Grounder(replace(side, grounding=save_tiny_head(tmp_path_factory.mktemp("parts"), tmp_path)), offline=True)


@pytest.fixture
def picture(data_file: Path) -> Path:
    return data_file.parent / "3.png"


def test_a_head_gives_a_box_and_a_heat_map(with_head: Grounder, picture: Path) -> None:
    both = with_head.find(picture, ["the red square", "here"])
    (alone,) = with_head.find(picture, ["here"])

    for one in both:
        assert one.box is not None and all(0 <= edge <= 1 for edge in one.box)
        assert one.heat.sum() == pytest.approx(1, abs=1e-5)
        row, column = divmod(int(one.heat.argmax()), len(one.rows))
        assert one.point == pytest.approx((one.rows[column], one.rows[row]))
    assert both[1].box == pytest.approx(alone.box, abs=1e-5)  # whatever else is looked for


def test_without_a_head_there_is_heat_alone(side: VisionSide, picture: Path) -> None:
    grounder = Grounder(side)
    (found,) = grounder.find(picture, ["the red square"])

    assert not grounder.has_head and found.box is None and found.pixels() is None
    assert found.heat.shape == (2, 2) and found.heat.sum() == pytest.approx(1, abs=1e-6)
    assert "no grounding head" in describe_found(found)


def test_heat_is_gradcam_as_worked_out_with_a_nudge(side: VisionSide, picture: Path) -> None:
    """A slope of the log-odds, from one attention weight that is moved a little; then all add up."""
    features = side.features([ImageRef(picture.name, path=picture)])
    found = match_relevance(side, features, ["a red square"])[0]
    bridge: Any = side.bridge
    assert side.tokenizer is not None and side.heads is not None
    ids, mask = side.tokenizer(["a red square"], longest=32)
    normed = side.feature_norm([features[0].float()]).detach()
    seen_by = [layer.cross_attention.attention for layer in bridge.layers if layer.cross_attention is not None]
    nudge: dict[str, Any] = {}

    def forward(self: Any, hidden: Any, source: Any = None, *, projected: Any = None, **other: Any) -> Any:
        if self not in seen_by:
            return original(self, hidden, source, projected=projected, **other)
        query = self._split(self.query(hidden))
        weights = (query @ projected.keys.transpose(2, 3) * query.shape[-1] ** -0.5).softmax(dim=-1)
        nudge.setdefault("weights", {})[seen_by.index(self)] = weights
        if nudge.get("layer") == seen_by.index(self):
            weights = weights + nudge["step"]
        mixed = (weights @ projected.values).transpose(1, 2).flatten(2)
        return original(self, hidden, source, projected=projected, **other)._replace(hidden=self.output(mixed))

    original = MultiHeadAttention.forward

    def odds() -> torch.Tensor:
        mask_all = matching_mask(bridge.config.num_queries, mask)
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(MultiHeadAttention, "forward", forward)
            logits = side.heads.matching_logits(bridge(normed, text_ids=ids, self_mask=mask_all).queries)  # type: ignore[union-attr]
        return logits[0, 1].double() - logits[0, 0].double()

    plain = odds()
    expected = torch.zeros(found.shape, dtype=torch.double)
    layer, weights = max(nudge["weights"].items())  # the last that looks
    for place in np.ndindex(*weights.shape):
        step = torch.zeros_like(weights)
        step[place] = 1e-2
        nudge |= {"layer": layer, "step": step}
        expected[place[-1]] += max(0.0, float((odds() - plain) / 1e-2)) * float(weights[place])
        nudge.pop("layer")

    torch.testing.assert_close(found.double(), expected, atol=2e-3, rtol=0.1)


def test_neither_head_nor_text_side_is_told(side: VisionSide, picture: Path) -> None:
    with pytest.raises(UserError, match="neither a grounding head nor a text side"):
        Grounder(replace(side, heads=None)).find(picture, ["a square"])


def test_an_empty_phrase_is_told(side: VisionSide, picture: Path) -> None:
    with pytest.raises(UserError, match="PHRASE: it is empty"):
        Grounder(side).find(picture, [" "])


def test_a_box_in_pixels_and_words() -> None:
    assert FOUND.pixels() == (40, 10, 80, 30)
    assert describe_found(FOUND).startswith("the mug: 50% to 100% from the left, 25% to 75% from the top.")


def test_boxes_are_cut_at_the_borders() -> None:
    heat = torch.tensor([[0.0, 0.0, 5.0, 0.0]])
    boxes = torch.tensor([[-0.2, 0.1, 0.4, 1.3]])

    box, point = box_and_point(Found(heat, boxes, boxes[None], torch.ones(1, 1)))

    assert box == pytest.approx((0.0, 0.1, 0.4, 1.0)) and point == (0.25, 0.75)


def test_heat_lies_where_it_belongs() -> None:
    laid = heat_over(HEAT, (0.25, 0.75), (0.0, 0.0, 80.0, 40.0), (80, 40), (160, 80))

    assert laid.shape == (80, 160)
    assert laid[60:, 120:].min() == pytest.approx(1)  # beyond the last place it stays
    assert laid[:20].max() == laid[:, :40].max() == pytest.approx(0)


def test_the_box_is_drawn_where_it_is() -> None:
    plain = Image.new("RGB", (600, 300), "white")
    drawn = draw_found(plain, [replace(FOUND, size=(600, 300))], heat=False)
    changed = np.asarray(drawn.convert("RGB")).min(axis=2) < 200
    rows, columns = changed.nonzero()

    assert (columns.min(), columns.max()) == (300, 599) and (rows.min(), rows.max()) == (75, 224)
    heated = draw_found(plain, [replace(FOUND, box=None, size=(600, 300), seen=(0.0, 0.0, 600.0, 300.0))])
    assert np.asarray(heated)[290, 590].tolist() != np.asarray(heated)[10, 10].tolist()


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("A man with a camera on a tripod.", ["a man", "a camera", "a tripod"]),
        ("two dogs running through the grass", ["two dogs", "the grass"]),
        ("yes", []),
        ("red", []),
        ("a red ball", ["a red ball"]),
        ("3", []),
        ("a tall building and a building", ["a tall building", "a building"]),
        ("dog, dog", ["dog"]),
        ("", []),
    ],
)
def test_things_that_an_answer_names(text: str, named: list[str]) -> None:
    assert things_named(text) == named
