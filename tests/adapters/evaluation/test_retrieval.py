"""Recalls against brute force, and against values counted by hand."""

from __future__ import annotations

import pytest
import torch

from adapters.evaluation.retrieval import recalls
from qformer.errors import UserError

KEYS = ["i2t_R@1", "i2t_R@5", "i2t_R@10", "t2i_R@1", "t2i_R@5", "t2i_R@10"]


def by_sorting(scores: list[list[float]], owner: list[int]) -> dict[str, float]:
    """The same by sorting each row and column, the wrong ones first among equals."""
    images, texts = len(scores), len(owner)
    found = {}
    for cut in (1, 5, 10):
        hits = 0
        for image in range(images):
            order = sorted(range(texts), key=lambda text: (-scores[image][text], owner[text] == image))
            hits += any(owner[text] == image for text in order[:cut])
        found[f"i2t_R@{cut}"] = hits / images
    for cut in (1, 5, 10):
        hits = 0
        for text in range(texts):
            order = sorted(range(images), key=lambda image: (-scores[image][text], owner[text] == image))
            hits += owner[text] in order[:cut]
        found[f"t2i_R@{cut}"] = hits / texts
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("levels", [2, 20, 10_000])  # few levels make many ties
def test_recalls_by_brute_force(seed: int, levels: int) -> None:
    torch.manual_seed(seed)
    owner = torch.cat([torch.arange(30), torch.randint(30, (45,))])[torch.randperm(75)].tolist()
    scores = torch.randint(levels, (30, 75)).double()
    scores[owner, torch.arange(75)] += levels // 4
    expected = by_sorting(scores.tolist(), owner)
    assert recalls(scores, owner) == pytest.approx(expected)
    assert recalls(scores.float(), owner) == pytest.approx(expected)
    assert levels == 2 or 0 < expected["t2i_R@10"] < 1


def test_recalls_by_hand() -> None:
    # picture 0 has texts 0 and 1, picture 1 has text 2
    scores = torch.tensor([[0.1, 0.9, 0.5], [0.2, 0.3, 0.4]])
    found = recalls(scores, [0, 0, 1])
    assert list(found) == KEYS
    assert found["i2t_R@1"] == 1.0  # text 1 for picture 0, text 2 for picture 1
    assert found["t2i_R@1"] == pytest.approx(1 / 3)  # text 1 only: 0.2 beats 0.1, 0.5 beats 0.4
    assert found["i2t_R@5"] == found["t2i_R@5"] == 1.0


def test_one_score_for_all_finds_nothing() -> None:
    owner = [image for image in range(20) for _ in range(5)]
    for value in (0.5, float("nan")):
        found = recalls(torch.full((20, 100), value), owner)
        assert found == dict.fromkeys(KEYS, 0.0)


def test_equal_scores_of_the_pictures_own_texts_are_no_tie() -> None:
    scores = torch.eye(12).repeat_interleave(2, dim=1)
    assert recalls(scores, [image for image in range(12) for _ in range(2)]) == dict.fromkeys(KEYS, 1.0)


def test_mistakes_are_named() -> None:
    with pytest.raises(UserError, match="picture 2 of 3 has no caption"):
        recalls(torch.rand(3, 2), [0, 2])
    with pytest.raises(ValueError, match="2 columns, image_of_text 3 entries"):
        recalls(torch.rand(3, 2), [0, 1, 2])
    with pytest.raises(ValueError, match="outside of 0 to 1"):
        recalls(torch.rand(2, 2), [0, 2])
