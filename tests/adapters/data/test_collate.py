"""Packed sequences equal separate ones; the mask is checked by hand and by the loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from references import stir_lora

from adapters.data.collate import (
    PackedAnswer,
    PackedSequence,
    collate_encoder_decoder,
    collate_packed,
    collate_prompts,
    packed_mask,
    row_length,
    rows_of,
)
from adapters.data.image_ref import blank_image
from adapters.data.prompts import IMAGE_SLOT, Prompt
from qformer.language import IGNORED
from qformer.language_loading import load_language_model
from qformer.lora import LoraSettings
from qformer.model import TokenBatch

SHARED = (3, 7, IMAGE_SLOT, IMAGE_SLOT, 9)
BRANCHES = (PackedAnswer((11, 12), (13, 1)), PackedAnswer((21,), (22, 23, 1)), PackedAnswer((31, 32, 33), (34,)))


def row(*packed_answers: PackedAnswer) -> PackedSequence:
    return PackedSequence((blank_image(),), SHARED, packed_answers)


def test_mask_of_two_branches_by_hand() -> None:
    mask = packed_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]), torch.tensor([[1, 1, 1, 1, 1, -1]]))[0, 0].int().tolist()
    assert mask == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [0, 0, 0, 0, 0, 1],
    ]


def test_mask_of_two_pictures_behind_one_opening_by_hand() -> None:
    """One token of opening, then two sequences: the first with two answers, the second with one."""
    branches, sequences = [[0, 0, 1, 2, 0, 1]], [[0, 1, 1, 1, 2, 2]]
    assert packed_mask(torch.tensor(branches), torch.tensor(sequences))[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 0, 1, 0, 0],
        [1, 0, 0, 0, 1, 0],
        [1, 0, 0, 0, 1, 1],
    ]


def test_pictures_that_open_alike_share_a_row() -> None:
    first, second, third = (row(*branches) for branches in (BRANCHES[:2], BRANCHES[1:2], BRANCHES[2:]))
    other = replace(third, shared=(4, *third.shared))
    assert rows_of([first, second, third], 0) == [(first,), (second,), (third,)]
    assert rows_of([first, second, other, third], 20) == [(first, second), (other,), (third,)]
    assert [row_length(one) for one in rows_of([first, second, third], 27)] == [13 + 7 + 7]
    batch = collate_packed([first, second], pad_id=0, row_tokens=20)
    assert batch.labels is not None and batch.position_ids is not None
    assert batch.ids[0, :20].tolist() == [3, 7, 0, 0, 9, 11, 12, 13, 1, 21, 22, 23, 1, 0, 0, 9, 21, 22, 23, 1]
    assert batch.image_slots[0].nonzero().flatten().tolist() == [2, 3, 13, 14]
    assert batch.labels[0, 13:20].tolist() == [IGNORED] * 4 + [22, 23, 1]
    assert batch.position_ids[0, 13:20].tolist() == [2, 3, 4, 5, 6, 7, 8]


def test_rows_carry_labels_positions_and_slots() -> None:
    batch = collate_packed([row(*BRANCHES[:2]), row(BRANCHES[2])], pad_id=0)
    assert batch.labels is not None and batch.position_ids is not None
    assert batch.ids.shape == (2, 16)  # 13 tokens, rounded up
    assert batch.ids[0].tolist() == [3, 7, 0, 0, 9, 11, 12, 13, 1, 21, 22, 23, 1, 0, 0, 0]
    assert batch.image_slots[0].nonzero().flatten().tolist() == [2, 3]
    assert batch.labels[0].tolist() == [IGNORED] * 7 + [13, 1, IGNORED, 22, 23, 1] + [IGNORED] * 3
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 5, 6, 7, 8, 0, 0, 0]
    assert batch.ids[1, 9:].tolist() == [0] * 7  # padding
    assert batch.attention_mask.shape == (2, 1, 16, 16)
    assert collate_packed([row(BRANCHES[2])], pad_id=0).attention_mask.shape == (1, 16)


def test_what_prompts_begin_with_stands_once() -> None:
    """Captions are asked for in the same words; the prompt's last token stays with each answer."""
    asked = row(PackedAnswer((11, 12, 13), (14, 1)), PackedAnswer((11, 12, 13), (15, 16, 1)))
    assert (asked.common, len(asked)) == (2, 5 + 2 + 3 + 4)
    batch = collate_packed([asked], pad_id=0)
    assert batch.labels is not None and batch.position_ids is not None
    assert batch.ids[0].tolist() == [3, 7, 0, 0, 9, 11, 12, 13, 14, 1, 13, 15, 16, 1, 0, 0]
    assert batch.labels[0].tolist() == [IGNORED] * 8 + [14, 1, IGNORED, 15, 16, 1] + [IGNORED] * 2
    assert batch.position_ids[0].tolist() == [*range(10), 7, 8, 9, 10, 0, 0]
    assert row(BRANCHES[0]).common == 0  # nobody to share with
    assert row(PackedAnswer((11,), (2,)), PackedAnswer((11, 12), (2,))).common == 0


ALIKE = (
    PackedAnswer((11, 12, 13), (14, 1)),
    PackedAnswer((11, 12, 13), (15, 16, 1)),
    PackedAnswer((11, 12, 17, 18), (34,)),
)


@pytest.mark.parametrize("packed_answers", [BRANCHES, ALIKE])
@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt"])
def test_packed_equals_separate(
    language_folders: dict[str, Path], kind: str, packed_answers: tuple[PackedAnswer, ...]
) -> None:
    """Loss, and the gradient that reaches the image's vectors and LoRA: packed, a question a row, all in one row."""
    language = load_language_model(language_folders[kind], quantize="none", compute_dtype=torch.float32)
    language.add_lora(LoraSettings(rank=4, alpha=8))
    stir_lora(language, seed=5)
    vectors = torch.randn(1, 2, language.width)
    found = []
    each = [row(branch) for branch in packed_answers]
    for rows, row_tokens in (([row(*packed_answers)], 0), (each, 0), (each, 100)):
        batch = collate_packed(rows, pad_id=0, row_tokens=row_tokens)
        assert len(batch.ids) == (1 if row_tokens else len(rows))
        image = vectors.clone().requires_grad_()
        embeds = language.embed(batch.ids)
        sample_evenly = image.expand(len(rows), -1, -1).flatten(0, 1)
        embeds = embeds.masked_scatter(batch.image_slots.unsqueeze(-1), sample_evenly)
        language.zero_grad()
        loss, count = language.supervised_loss(
            embeds, batch.attention_mask, batch.labels, position_ids=batch.position_ids
        )
        loss.backward()
        lora = torch.cat([p.grad.flatten() for p in language.parameters() if p.grad is not None])
        found.append((loss.detach(), count, image.grad, lora))
    alone = found[1]
    for packed in (found[0], found[2]):
        (packed_loss, packed_count, packed_image, packed_lora), (loss, count, image, lora) = packed, alone
        assert packed_count == count == 6
        assert torch.allclose(packed_loss, loss, atol=1e-4)
        assert torch.allclose(packed_image, image, atol=1e-5)
        assert torch.allclose(packed_lora, lora, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "opt"])
def test_weighed_answers_count_by_their_weights(language_folders: dict[str, Path], kind: str) -> None:
    """A packed row's loss is the weighed sum of its answers' losses, each taken alone."""
    language = load_language_model(language_folders[kind], quantize="none", compute_dtype=torch.float32)
    weights = (0.5, -2.0, 1.0)
    weighed = [replace(branch, weight=weight) for branch, weight in zip(ALIKE, weights, strict=True)]

    def loss_of(*packed_answers: PackedAnswer) -> float:
        batch = collate_packed([row(*packed_answers)], pad_id=0)
        vectors = torch.linspace(-1, 1, 2 * language.width).view(2, -1)
        embeds = language.embed(batch.ids).masked_scatter(batch.image_slots.unsqueeze(-1), vectors)
        loss, count = language.supervised_loss(
            embeds, batch.attention_mask, batch.labels, position_ids=batch.position_ids, weights=batch.weights
        )
        assert count == sum(len(branch.answer) for branch in packed_answers)
        return loss.item()

    alone = [loss_of(branch) for branch in ALIKE]
    expected = sum(weight * loss for weight, loss in zip(weights, alone, strict=True))
    assert loss_of(*weighed) == pytest.approx(expected, abs=1e-4)
    assert loss_of(weighed[1]) == pytest.approx(-2 * alone[1], abs=1e-4)
    assert collate_packed([row(*ALIKE)], pad_id=0).weights is None


def test_prompts_are_padded_on_the_side_asked_for() -> None:
    prompts = [Prompt((3, IMAGE_SLOT), (5,), 1), Prompt((), (6,), 0)]
    left = collate_prompts(prompts, pad_id=0)
    assert left.ids.tolist() == [[3, 0, 5], [0, 0, 6]]
    assert left.attention_mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    assert left.image_slots.tolist() == [[False, True, False], [False] * 3]
    assert collate_prompts(prompts, pad_id=0, side="right").ids.tolist() == [[3, 0, 5], [6, 0, 0]]


def test_encoder_decoder_batch_puts_the_answer_in_the_labels() -> None:
    batch = collate_encoder_decoder([row(BRANCHES[0]), row(BRANCHES[1])], pad_id=0)
    assert isinstance(batch, TokenBatch) and batch.labels is not None
    assert batch.labels.tolist() == [[13, 1, IGNORED], [22, 23, 1]]
    assert batch.ids[0].tolist() == [3, 7, 0, 0, 9, 11, 12]
    assert batch.attention_mask.sum().item() == 13
