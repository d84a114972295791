"""Attention against torch's own module, and the three masks against tables written by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qformer.attention import (
    KeysValues,
    MultiHeadAttention,
    contrastive_mask,
    generation_mask,
    matching_mask,
)

# Two queries and three tokens, of which the last is padding in the second row of the batch.
TEXT_MASK = torch.tensor([[1, 1, 1], [1, 1, 0]])
# Rows look at columns: x = sees; p = sees where it is not padding.
TABLES: dict[Callable[[int, Tensor], Tensor], list[str]] = {
    matching_mask: ["xxxxp", "xxxxp", "xxxxp", "xxxxp", "xxxxp"],
    contrastive_mask: ["xx...", "xx...", "..xxp", "..xxp", "..xxp"],
    generation_mask: ["xx...", "xx...", "xxx..", "xxxx.", "xxxxp"],
}


def expected_table(table: list[str]) -> Tensor:
    """[2, 5, 5], of the two rows of the batch."""
    seen = torch.tensor([[[cell in "xp" for cell in row] for row in table]] * 2)
    seen[1, :, -1] = False
    return seen


@pytest.mark.parametrize("make_mask", TABLES, ids=lambda mask: mask.__name__)
@pytest.mark.parametrize("dtype", [torch.bool, torch.long])
def test_mask_equals_its_table(make_mask: Callable[[int, Tensor], Tensor], dtype: torch.dtype) -> None:
    mask = make_mask(2, TEXT_MASK.to(dtype))
    assert mask.dtype == torch.bool
    assert torch.equal(mask.expand(2, 1, 5, 5)[:, 0], expected_table(TABLES[make_mask]))


@pytest.mark.parametrize("make_mask", TABLES, ids=lambda mask: mask.__name__)
def test_a_change_reaches_those_that_may_see_it_and_nobody_else(
    make_mask: Callable[[int, Tensor], Tensor],
) -> None:
    torch.manual_seed(0)
    attention = MultiHeadAttention(8, 2)
    mask, seen = make_mask(2, TEXT_MASK), expected_table(TABLES[make_mask])
    hidden = torch.randn(2, 5, 8)
    before = attention(hidden, mask=mask).hidden
    for column in range(5):
        source = hidden.clone()
        source[:, column] += 1.0
        after = attention(hidden, source, mask=mask).hidden
        changed = (after != before).any(dim=-1)  # [2, 5]
        assert torch.equal(changed, seen[:, :, column])


@pytest.mark.parametrize("kv_width", [None, 6])
@pytest.mark.parametrize("return_weights", [False, True])
def test_equals_torch_multihead_attention(kv_width: int | None, return_weights: bool) -> None:
    torch.manual_seed(0)
    ours = MultiHeadAttention(8, 2, kv_width=kv_width)
    theirs = nn.MultiheadAttention(8, 2, kdim=6, vdim=6, batch_first=True)
    if kv_width is None:
        theirs = nn.MultiheadAttention(8, 2, batch_first=True)
        theirs.in_proj_weight.data = torch.cat([ours.query.weight, ours.key.weight, ours.value.weight])
    else:
        theirs.q_proj_weight.data = ours.query.weight.data
        theirs.k_proj_weight.data = ours.key.weight.data
        theirs.v_proj_weight.data = ours.value.weight.data
    theirs.in_proj_bias.data = torch.cat([ours.query.bias, ours.key.bias, ours.value.bias])
    theirs.out_proj.load_state_dict(ours.output.state_dict())

    hidden = torch.randn(3, 4, 8)
    source = hidden if kv_width is None else torch.randn(3, 5, kv_width)
    padding = torch.zeros(3, source.shape[1], dtype=torch.bool)
    padding[1, -2:] = True
    expected, weights = theirs(hidden, source, source, key_padding_mask=padding, average_attn_weights=False)
    got = ours(hidden, source, mask=~padding[:, None, None, :], return_weights=return_weights)
    torch.testing.assert_close(got.hidden, expected, atol=1e-6, rtol=0)
    if return_weights:
        torch.testing.assert_close(got.weights, weights, atol=1e-6, rtol=0)
    else:
        assert got.weights is None


@pytest.mark.parametrize("return_weights", [False, True])
def test_a_row_that_sees_nothing_gets_no_source_and_no_nan(return_weights: bool) -> None:
    torch.manual_seed(0)
    attention = MultiHeadAttention(8, 2)
    hidden = torch.randn(2, 3, 8, requires_grad=True)
    mask = torch.ones(2, 1, 3, 3, dtype=torch.bool)
    mask[1, :, 1] = False
    got = attention(hidden, mask=mask, return_weights=return_weights)
    torch.testing.assert_close(got.hidden[1, 1], attention.output.bias)  # zeros went into the output map
    torch.testing.assert_close(got.hidden[0], attention(hidden[:1]).hidden[0])
    got.hidden.square().sum().backward()
    assert hidden.grad is not None and hidden.grad.isfinite().all()
    if return_weights:
        assert got.weights is not None and not got.weights[1, :, 1].any()


def test_past_equals_one_longer_source() -> None:
    torch.manual_seed(0)
    attention = MultiHeadAttention(8, 2)
    first, second = torch.randn(2, 3, 8), torch.randn(2, 4, 8)
    mask = torch.rand(2, 1, 4, 7) > 0.3
    past = attention(first).keys_values
    expected = attention(second, torch.cat([first, second], dim=1), mask=mask).hidden
    got = attention(second, mask=mask, past=past)
    torch.testing.assert_close(got.hidden, expected, atol=1e-6, rtol=0)
    assert isinstance(got.keys_values, KeysValues)
    assert got.keys_values.keys.shape == (2, 2, 4, 4)  # its own four rows, not the past's


def test_dropout_acts_in_training_only() -> None:
    torch.manual_seed(0)
    attention = MultiHeadAttention(8, 2, dropout=0.5)
    hidden = torch.randn(2, 3, 8)
    for return_weights in (False, True):
        first, second = (attention(hidden, return_weights=return_weights).hidden for _ in range(2))
        assert not torch.equal(first, second)
    attention.eval()
    torch.testing.assert_close(attention(hidden).hidden, attention(hidden, return_weights=True).hidden)


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(ValueError, match=r"num_heads \(3\) must divide width \(8\)"):
        MultiHeadAttention(8, 3)
    with pytest.raises(ValueError, match="must be bool"):
        MultiHeadAttention(8, 2)(torch.randn(1, 3, 8), mask=torch.ones(1, 1, 1, 3))
