"""The grounding head: boxes against values worked out by hand, and what must not depend on what."""

from __future__ import annotations

import math

import pytest
import torch

from qformer.grounding import (
    Found,
    GroundingConfig,
    GroundingHead,
    box_loss,
    grounding_loss,
    overlaps,
    place_centres,
    places_inside,
)

CONFIG = GroundingConfig(widths=(6, 10), text_width=12, rows=4, width=16, heads=2, layers=2, mixing=1)


@pytest.fixture
def head() -> GroundingHead:
    torch.manual_seed(0)
    return GroundingHead(CONFIG).eval()


@pytest.fixture
def maps() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, 6, 4, 4, generator=generator), torch.randn(2, 10, 2, 2, generator=generator)]


@pytest.mark.parametrize(
    ("first", "second", "iou", "giou"),
    [
        ([0, 0, 1, 1], [0.5, 0, 1.5, 1], 1 / 3, 1 / 3),  # half over half; the box around both is their union
        ([0, 0, 2, 2], [0, 0, 1, 1], 1 / 4, 1 / 4),
        ([0, 0, 1, 1], [2, 0, 3, 1], 0, -1 / 3),  # a gap as large as each
        ([0, 0, 1, 1], [1, 1, 2, 2], 0, -2 / 4),  # at a corner: two of the four quarters are neither's
        ([0.2, 0.2, 0.4, 0.6], [0.2, 0.2, 0.4, 0.6], 1, 1),
    ],
)
def test_overlaps_as_worked_out_by_hand(first: list[float], second: list[float], iou: float, giou: float) -> None:
    found = overlaps(torch.tensor(first, dtype=torch.float), torch.tensor(second, dtype=torch.float))

    assert [part.item() for part in found] == pytest.approx([iou, giou], abs=1e-6)


def test_the_box_s_loss_as_worked_out_by_hand() -> None:
    # edges differ by 0.5, 0, 0.5 and 0: L1 a quarter; GIoU a third
    loss = box_loss(torch.tensor([0.0, 0, 1, 1]), torch.tensor([0.5, 0, 1.5, 1]))

    assert loss.item() == pytest.approx(5 * 0.25 + 2 * (1 - 1 / 3), abs=1e-6)


def test_pointing_asks_for_the_share_inside_wherever_inside() -> None:
    heat = torch.tensor([[0.0, 0.0, 0.0, math.log(3.0)]])  # shares 1, 1, 1 and 3 of 6
    box = torch.tensor([[0.0, 0.0, 1.0, 1.0]])
    # the box is right: only pointing is left; a second phrase only fills a place
    found = Found(
        *(part.expand(1, 2, *part.shape[1:]) for part in (heat, box, box.expand(1, 4, 4), torch.ones(1, 4) / 4))
    )

    none = [False] * 4
    one = grounding_loss(found, box.expand(1, 2, 4), torch.tensor([[[False, False, False, True], none]]))
    two = grounding_loss(found, box.expand(1, 2, 4), torch.tensor([[[True, False, False, True], none]]))

    assert one.item() == pytest.approx(-math.log(3 / 6), abs=1e-5)
    assert two.item() == pytest.approx(-math.log(4 / 6), abs=1e-5)


def test_places_are_read_from_left_to_right() -> None:
    assert place_centres(2).tolist() == [[0.25, 0.25], [0.75, 0.25], [0.25, 0.75], [0.75, 0.75]]


def test_a_box_between_places_gets_the_nearest() -> None:
    boxes = torch.tensor([[0.0, 0.0, 0.5, 1.0], [0.9, 0.1, 0.95, 0.2], [0.5, 0.5, 1.0, 1.0]])

    inside = places_inside(boxes, torch.tensor([0, 1, 1]), 2, 2)

    assert inside.tolist() == [[True, False, True, False], [False, True, False, True]]


def test_boxes_are_the_weighted_mean_of_the_places(head: GroundingHead, maps: list[torch.Tensor]) -> None:
    found = head(head.see(maps), torch.randn(2, 1, 3, 12), torch.ones(2, 1, 3, dtype=torch.bool))

    assert found.heat.shape == (2, 1, 16) and found.place_boxes.shape == (2, 1, 16, 4)
    assert found.weights.sum(dim=-1).flatten().tolist() == pytest.approx([1, 1], abs=1e-5)
    torch.testing.assert_close(found.boxes, torch.einsum("ikp,ikpc->ikc", found.weights, found.place_boxes))
    middles = place_centres(4)
    assert bool((found.place_boxes[..., :2] <= middles).all() and (found.place_boxes[..., 2:] >= middles).all())


def test_a_phrase_does_not_depend_on_others_nor_on_padding(head: GroundingHead, maps: list[torch.Tensor]) -> None:
    text = torch.randn(2, 2, 5, 12)
    mask = torch.tensor([[[1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]]).bool()
    together = head(head.see(maps), text, mask)

    alone = head(head.see([part[:1] for part in maps]), text[:1, :1, :3], mask[:1, :1, :3])

    torch.testing.assert_close(together.heat[:1, :1], alone.heat, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(together.boxes[:1, :1], alone.boxes, atol=1e-5, rtol=1e-5)


def test_the_phrase_and_the_picture_both_matter(head: GroundingHead, maps: list[torch.Tensor]) -> None:
    text = torch.randn(1, 2, 3, 12).expand(2, 2, 3, 12)  # the same two phrases in two pictures
    found = head(head.see(maps), text, torch.ones(2, 2, 3, dtype=torch.bool)).heat

    assert not torch.allclose(found[0, 0], found[0, 1], atol=1e-4)
    assert not torch.allclose(found[0, 0], found[1, 0], atol=1e-4)


def test_it_learns_two_phrases_on_one_picture(maps: list[torch.Tensor]) -> None:
    torch.manual_seed(0)
    head = GroundingHead(GroundingConfig(widths=(6, 10), text_width=12, rows=4, width=16, heads=2, dropout=0.0))
    text, mask = torch.randn(1, 2, 2, 12), torch.ones(1, 2, 2, dtype=torch.bool)
    right = torch.tensor([[[0.0, 0.0, 0.5, 0.5], [0.5, 0.0, 1.0, 1.0]]])
    inside = places_inside(right[0], torch.tensor([0, 1]), 2, 4)[None]
    optimiser = torch.optim.AdamW(head.parameters(), lr=5e-3)
    for _ in range(80):
        optimiser.zero_grad()
        found = head(head.see([part[:1] for part in maps]), text, mask)
        grounding_loss(found, right, inside).backward()
        optimiser.step()

    assert bool((overlaps(found.boxes, right)[0] > 0.7).all())
    assert bool(inside.gather(2, found.heat.argmax(dim=2, keepdim=True)).all())


def test_maps_of_other_sizes_are_refused(head: GroundingHead, maps: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        head.see([maps[1], maps[0]])
