"""What a Q-Former pass must and must not do; equality with transformers is in test_interchange."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qformer.attention import contrastive_mask, generation_mask, matching_mask
from qformer.bridge import QFormer
from qformer.config import BridgeConfig

Q, T, P = 4, 6, 5


@pytest.fixture
def bridge() -> QFormer:
    """Three layers, so that the second does not look at the image; large weights, so that effects show."""
    config = BridgeConfig.preset("tiny", num_layers=3, text_branch=True)
    bridge = QFormer(config, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for name, parameter in bridge.named_parameters():
            if "norm" not in name:  # norms keep outputs near 1, where 1e-5 means something in fp32
                parameter.mul_(6.0)
    return bridge


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, P, 24, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def text() -> Tensor:
    return torch.randint(0, 61, (2, T), generator=torch.Generator().manual_seed(2))


@pytest.fixture
def text_mask() -> Tensor:
    mask = torch.ones(2, T, dtype=torch.bool)
    mask[1, 4:] = False
    return mask


def close(got: Tensor | None, expected: Tensor | None) -> None:
    assert got is not None and expected is not None
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


# --- configuration and fresh weights


def test_presets_and_overrides() -> None:
    assert BridgeConfig.preset("blip2") == BridgeConfig()
    small = BridgeConfig.preset("small", encoder_width=120)
    assert (small.num_queries, small.num_layers, small.hidden_size, small.encoder_width) == (16, 4, 384, 120)
    assert small.num_heads == 12 and small.intermediate_size == 1536
    assert BridgeConfig(instruction_aware=True).has_text and not BridgeConfig().has_text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("num_layers", 0),
        ("num_queries", 2.0),
        ("vocab_size", True),
        ("num_heads", 5),
        ("dropout", 1.0),
        ("layer_norm_eps", 0.0),
    ],
)
def test_a_field_out_of_range_is_named(field: str, value: object) -> None:
    with pytest.raises(ValueError, match=field):
        BridgeConfig.preset("tiny", **{field: value})


def test_unknown_preset_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'huge'.*blip2, small, tiny"):
        BridgeConfig.preset("huge")


def test_fresh_weights_are_reproducible_and_of_the_paper_s_spread() -> None:
    config = BridgeConfig.preset("tiny", num_queries=64, hidden_size=64, text_branch=True)
    first, second = (QFormer(config, generator=torch.Generator().manual_seed(7)) for _ in range(2))
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, second.get_parameter(name)), name
        if name.endswith("norm.weight"):
            assert (parameter == 1).all()
        elif name.endswith("bias"):
            assert (parameter == 0).all()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.15), name
    assert not torch.equal(first.query_tokens[0, 0], first.query_tokens[0, 1])
    torch.manual_seed(3)
    third = QFormer(config)
    torch.manual_seed(3)
    assert torch.equal(third.query_tokens, QFormer(config).query_tokens)


def test_every_nth_layer_looks_at_the_image() -> None:
    bridge = QFormer(BridgeConfig.preset("tiny", num_layers=5, cross_attention_every=2))
    looks = [layer.cross_attention is not None for layer in bridge.layers]
    assert looks == [True, False, True, False, True]


def test_text_parts_exist_only_where_they_are_used() -> None:
    plain, aware = (
        {name for name, _ in QFormer(BridgeConfig.preset("tiny", instruction_aware=on)).named_parameters()}
        for on in (False, True)
    )
    assert plain < aware
    assert {name.split(".")[0] for name in aware - plain} == {"embeddings", "layers"}
    assert all("text_feed_forward" in name for name in aware - plain if name.startswith("layers"))


# --- passes


def test_shapes_of_the_three_kinds_of_pass(bridge: QFormer, image: Tensor, text: Tensor) -> None:
    alone = bridge(image)
    assert alone.queries.shape == (2, Q, 32) and alone.text is None
    assert alone.cross_attentions is None and alone.keys_values is None
    both = bridge(image, text_ids=text)
    assert both.queries.shape == (2, Q, 32) and both.text.shape == (2, T, 32)
    words = bridge(None, text_ids=text)
    assert words.queries is None and words.text.shape == (2, T, 32)


def test_queries_read_the_image_and_differ(bridge: QFormer, image: Tensor) -> None:
    queries = bridge(image).queries
    assert (bridge(image + 1.0).queries - queries).abs().max() > 1e-3
    assert (queries[:, 0] - queries[:, 1]).abs().max() > 1e-3


def test_a_padded_row_equals_the_row_alone(bridge: QFormer, image: Tensor, text: Tensor, text_mask: Tensor) -> None:
    both = bridge(image, text_ids=text, text_mask=text_mask)
    alone = bridge(image[1:], text_ids=text[1:, :4])
    close(both.queries[1], alone.queries[0])
    close(both.text[1, :4], alone.text[0])
    words = bridge(None, text_ids=text, text_mask=text_mask.long()).text  # a tokenizer's 0s and 1s will do
    close(words[1, :4], bridge(None, text_ids=text[1:, :4]).text[0])


def test_image_mask_equals_fewer_patches(bridge: QFormer, image: Tensor) -> None:
    mask = torch.ones(2, P, dtype=torch.bool)
    mask[1, 3:] = False
    masked = bridge(image, image_mask=mask).queries
    close(masked[0], bridge(image[:1]).queries[0])
    close(masked[1], bridge(image[1:, :3]).queries[0])


def test_patch_dropout_shows_other_patches_each_time_in_training_alone(image: Tensor) -> None:
    bridge = QFormer(BridgeConfig.preset("tiny", dropout=0.0, patch_dropout=0.4)).eval()
    whole = bridge.image_keys_values(image)[0].keys  # [B, H, P, D/H]
    assert whole.shape[2] == P
    bridge.train()
    kept = round(0.6 * P)
    draws = [bridge.image_keys_values(image)[0].keys for _ in range(20)]
    places = [
        torch.stack([torch.cdist(of_whole[0], of_draw[0]).min(dim=1).values < 1e-6 for of_whole, of_draw in pairs])
        for pairs in (list(zip(whole, draw, strict=True)) for draw in draws)
    ]  # [B, P] of each draw
    assert all(draw.shape[2] == kept for draw in draws)
    assert all((place.sum(dim=1) == kept).all() for place in places)  # whole patches, each once
    shown = torch.stack(places)
    assert shown.any(dim=0).all() and not shown.all(dim=0).any()  # none is always shown, or never
    assert (shown[:, 0] != shown[:, 1]).any()  # each picture has its own draw
    with pytest.raises(ValueError, match="patch_dropout"):
        bridge(image, image_mask=torch.ones(2, P, dtype=torch.bool))


def test_rows_with_nothing_to_see_leave_the_others_alone(
    bridge: QFormer, image: Tensor, text: Tensor, text_mask: Tensor
) -> None:
    no_image = torch.tensor([[True] * P, [False] * P])
    text_mask[1] = False
    mask = contrastive_mask(Q, text_mask)
    got = bridge(image, image_mask=no_image, text_ids=text, self_mask=mask)
    assert got.queries.isfinite().all() and got.text.isfinite().all()
    close(got.queries[0], bridge(image).queries[0])
    close(got.text[0], bridge(None, text_ids=text).text[0])
    other = bridge(image + 1.0, image_mask=no_image, text_ids=text, self_mask=mask)
    close(other.queries[1], got.queries[1])  # what is masked is not even averaged


@pytest.mark.parametrize("masked", [False, True])
def test_attention_weights_come_with_the_same_outputs(
    bridge: QFormer, image: Tensor, text: Tensor, masked: bool
) -> None:
    mask = torch.ones(2, P, dtype=torch.bool)
    mask[1, 3:] = not masked
    plain = bridge(image, image_mask=mask, text_ids=text)
    shown = bridge(image, image_mask=mask, text_ids=text, return_attentions=True)
    close(shown.queries, plain.queries)
    close(shown.text, plain.text)
    assert [tuple(weights.shape) for weights in shown.cross_attentions] == [(2, 4, Q, P)] * 2  # layers 0 and 2
    for weights in shown.cross_attentions:
        close(weights.sum(dim=-1), torch.ones(2, 4, Q))
        assert bool(weights[1, :, :, 3:].any()) is not masked


# --- stage 1's masks through the whole depth

Changed = tuple[list[bool], list[bool]]  # which queries, which tokens


@pytest.mark.parametrize(
    ("make_mask", "expected"),
    [
        (matching_mask, ([True] * Q, [True] * T)),
        (contrastive_mask, ([False] * Q, [True] * T)),
        (generation_mask, ([False] * Q, [False, False, True, True, True, True])),
    ],
)
def test_changing_a_token_changes_those_that_may_see_it(
    bridge: QFormer,
    image: Tensor,
    text: Tensor,
    make_mask: Callable[[int, Tensor], Tensor],
    expected: Changed,
) -> None:
    mask = make_mask(Q, torch.ones(2, T, dtype=torch.bool))
    changed_text = text.clone()
    changed_text[:, 2] = (text[:, 2] + 1) % 61
    before = bridge(image, text_ids=text, self_mask=mask)
    after = bridge(image, text_ids=changed_text, self_mask=mask)
    for part, rows in zip(("queries", "text"), expected, strict=True):
        difference = (getattr(after, part) - getattr(before, part)).abs().amax(dim=(0, 2))
        assert (difference > 1e-4).tolist() == rows
        assert (difference[~torch.tensor(rows)] <= 1e-6).all()


@pytest.mark.parametrize(
    ("make_mask", "text_sees_image"),
    [(matching_mask, True), (contrastive_mask, False), (generation_mask, True)],
)
def test_text_sees_the_image_only_through_the_queries(
    bridge: QFormer,
    image: Tensor,
    text: Tensor,
    make_mask: Callable[[int, Tensor], Tensor],
    text_sees_image: bool,
) -> None:
    mask = make_mask(Q, torch.ones(2, T, dtype=torch.bool))
    before, after = (bridge(pixels, text_ids=text, self_mask=mask).text for pixels in (image, image + 1.0))
    assert ((after - before).abs().amax() > 1e-3).item() is text_sees_image


@pytest.mark.parametrize("make_mask", [matching_mask, contrastive_mask, generation_mask])
def test_padding_is_never_seen(
    bridge: QFormer,
    image: Tensor,
    text: Tensor,
    text_mask: Tensor,
    make_mask: Callable[[int, Tensor], Tensor],
) -> None:
    mask = make_mask(Q, text_mask)
    other = torch.where(text_mask, text, (text + 1) % 61)
    before, after = (bridge(image, text_ids=ids, self_mask=mask) for ids in (text, other))
    close(after.queries, before.queries)
    close(after.text[text_mask], before.text[text_mask])


def test_contrastive_mask_equals_two_passes(bridge: QFormer, image: Tensor, text: Tensor, text_mask: Tensor) -> None:
    both = bridge(image, text_ids=text, self_mask=contrastive_mask(Q, text_mask))
    close(both.queries, bridge(image).queries)
    close(both.text, bridge(None, text_ids=text, text_mask=text_mask).text)


def test_matching_mask_is_the_default_with_padding(
    bridge: QFormer, image: Tensor, text: Tensor, text_mask: Tensor
) -> None:
    masked = bridge(image, text_ids=text, self_mask=matching_mask(Q, text_mask))
    default = bridge(image, text_ids=text, text_mask=text_mask)
    close(masked.queries, default.queries)
    close(masked.text, default.text)


def test_text_over_the_queries_keys_equals_the_joint_pass(
    bridge: QFormer, image: Tensor, text: Tensor, text_mask: Tensor
) -> None:
    mask = generation_mask(Q, text_mask)
    joint = bridge(image, text_ids=text, self_mask=mask)
    queries = bridge(image, return_keys_values=True)
    assert len(queries.keys_values) == 3 and queries.keys_values[0].keys.shape == (2, 4, Q, 8)
    caption = bridge(None, text_ids=text, self_mask=mask[:, :, Q:], past=queries.keys_values)
    close(queries.queries, joint.queries)
    close(caption.text, joint.text)
    caption.text.sum().backward()  # the caption loss trains the queries through the reused keys
    assert bridge.query_tokens.grad.abs().max() > 0


def test_past_without_a_mask_sees_all_but_padding(
    bridge: QFormer, image: Tensor, text: Tensor, text_mask: Tensor
) -> None:
    past = bridge(image, return_keys_values=True).keys_values
    seen = torch.cat([torch.ones(2, Q, dtype=torch.bool), text_mask], dim=1)[:, None, None]
    masked = bridge(None, text_ids=text, past=past, self_mask=seen)
    close(bridge(None, text_ids=text, past=past, text_mask=text_mask).text, masked.text)


# --- training and types


def test_every_parameter_is_trained(image: Tensor, text: Tensor) -> None:
    bridge = QFormer(BridgeConfig.preset("tiny", num_layers=3, instruction_aware=True))
    output = bridge(image, text_ids=text)
    (output.queries.square().sum() + output.text.square().sum()).backward()
    without = [name for name, parameter in bridge.named_parameters() if parameter.grad is None]
    assert without == []


def test_dropout_acts_in_training_only(bridge: QFormer, image: Tensor) -> None:
    assert torch.equal(bridge(image).queries, bridge(image).queries)
    bridge.train()
    assert not torch.equal(bridge(image).queries, bridge(image).queries)
    off = QFormer(dataclasses.replace(bridge.config, dropout=0.0)).train()
    assert torch.equal(off(image).queries, off(image).queries)


def test_half_precision_features_and_autocast(bridge: QFormer, image: Tensor, text: Tensor) -> None:
    close(bridge(image.half()).queries, bridge(image.half().float()).queries)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough = bridge(image, text_ids=text).queries.float()
    assert rough.isfinite().all()
    assert bridge.to(torch.bfloat16)(image, text_ids=text).queries.dtype == torch.bfloat16


def test_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        bridge = QFormer(BridgeConfig())
        queries = bridge(torch.empty(2, 257, 1408)).queries
    assert queries.shape == (2, 32, 768)


def test_arguments_that_do_not_go_together(bridge: QFormer, image: Tensor, text: Tensor) -> None:
    past = bridge(image, return_keys_values=True).keys_values
    wordless = QFormer(BridgeConfig.preset("tiny"))
    for message, call in {
        "image_features, text_ids or both": lambda: bridge(None),
        "23 wide; encoder_width is 24": lambda: bridge(image[..., :23]),
        "text_branch or instruction_aware": lambda: wordless(image, text_ids=text),
        "leave image_features out": lambda: bridge(image, text_ids=text, past=past),
        "past has 2 layers; the bridge has 3": lambda: bridge(None, text_ids=text, past=past[:2]),
        "18 tokens is longer than": lambda: bridge(None, text_ids=text.repeat(1, 3)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
