"""The bridge against transformers' own classes: equal outputs, equal key sets, equal tensors.

Every parameter of the reference is drawn anew (transformers starts `query_tokens` at zero, norms at one and
biases at zero), so that a tensor left out or put in the wrong place shows.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers as tf
from references import TOLERANCE, close, padded_text, randomise
from torch import Tensor, nn

from qformer.bridge import QFormer
from qformer.config import BridgeConfig
from qformer.errors import UserError
from qformer.interchange import (
    IMAGE_NORM,
    LANGUAGE_PROJECTION,
    RETRIEVAL_HEADS,
    Kind,
    bridge_config_from_transformers,
    bridge_from_transformers,
    bridge_part,
    bridge_to_transformers,
    module_part,
)

Q = 4
TINY_QFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 61,
    "max_position_embeddings": 16,
}
TINY_VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": 16,
    "patch_size": 8,
}
FULL_QFORMER = {"vocab_size": 30523}
KINDS: tuple[Kind, ...] = ("blip2", "blip2-retrieval", "instructblip")


def tiny_model(kind: Kind) -> Any:
    text = tf.OPTConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=1,
        ffn_dim=16,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=16,
    )
    if kind == "instructblip":
        instruct = tf.InstructBlipConfig(
            vision_config=tf.InstructBlipVisionConfig(**TINY_VISION),
            qformer_config=tf.InstructBlipQFormerConfig(**TINY_QFORMER),
            text_config=text,
            num_query_tokens=Q,
        )
        return randomise(tf.InstructBlipForConditionalGeneration(instruct))
    retrieval = kind == "blip2-retrieval"
    config = tf.Blip2Config(
        vision_config=tf.Blip2VisionConfig(**TINY_VISION),
        qformer_config=tf.Blip2QFormerConfig(**TINY_QFORMER, use_qformer_text_input=retrieval),
        text_config=text,
        num_query_tokens=Q,
        image_text_hidden_size=8,
    )
    return randomise((tf.Blip2ForImageTextRetrieval if retrieval else tf.Blip2ForConditionalGeneration)(config))


def load(model: Any, kind: Kind) -> QFormer:
    config = bridge_config_from_transformers(model.config.qformer_config, model.config.num_query_tokens)
    return bridge_from_transformers(bridge_part(model.state_dict()), config, kind).eval()


@pytest.fixture
def text() -> tuple[Tensor, Tensor]:
    return padded_text()


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))


# --- equal outputs


@pytest.mark.parametrize("every", [1, 2, 3])
def test_queries_equal_blip2_qformer(every: int) -> None:
    config = tf.Blip2QFormerConfig(
        **TINY_QFORMER, encoder_hidden_size=20, cross_attention_frequency=every, layer_norm_eps=1e-3
    )
    theirs = randomise(tf.Blip2QFormerModel(config))
    tokens = torch.randn(1, Q, 32)
    state = {"query_tokens": tokens} | {f"qformer.{k}": v for k, v in theirs.state_dict().items()}
    ours = bridge_from_transformers(state, bridge_config_from_transformers(config, Q), "blip2").eval()
    image, image_mask = torch.randn(2, 5, 20), torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    for mask in (None, image_mask):
        expected = theirs(
            query_embeds=tokens.expand(2, -1, -1), encoder_hidden_states=image, encoder_attention_mask=mask
        )
        close(ours(image, image_mask=mask).queries, expected.last_hidden_state)


def test_cross_attention_weights_equal_blip2_qformer(pixels: Tensor) -> None:
    model = tiny_model("blip2")
    model.qformer.set_attn_implementation("eager")
    image = model.vision_model(pixels).last_hidden_state
    tokens = model.query_tokens.expand(2, -1, -1)
    expected = model.qformer(query_embeds=tokens, encoder_hidden_states=image, output_attentions=True)
    got = load(model, "blip2")(image, return_attentions=True)
    close(got.queries, expected.last_hidden_state)
    weights = [layer for layer in expected.cross_attentions if layer is not None]
    assert len(got.cross_attentions) == len(weights) == 2  # layers 0 and 2
    for mine, reference in zip(got.cross_attentions, weights, strict=True):
        close(mine, reference)


def test_projected_queries_equal_blip2_s_prefix(pixels: Tensor) -> None:
    model = tiny_model("blip2")
    state = model.state_dict()
    projection = nn.Linear(32, 16)
    projection.load_state_dict(module_part(state, LANGUAGE_PROJECTION))
    features = model.get_image_features(pixels)
    queries = load(model, "blip2")(features.last_hidden_state).queries
    close(projection(queries), features.pooler_output)


def test_matching_pass_equals_retrieval_class(pixels: Tensor, text: tuple[Tensor, Tensor]) -> None:
    model = tiny_model("blip2-retrieval")
    ids, mask = text
    expected = model(pixels, input_ids=ids, attention_mask=mask, use_image_text_matching_head=True)
    image = expected.vision_model_output.last_hidden_state
    got = load(model, "blip2-retrieval")(image, text_ids=ids, text_mask=mask)
    close(torch.cat([got.queries, got.text], dim=1), expected.text_model_output.last_hidden_state)
    head = nn.Linear(32, 2)
    head.load_state_dict(module_part(model.state_dict(), "itm_head"))
    close(head(got.queries).mean(dim=1), expected.logits_per_image)


def test_contrastive_passes_equal_retrieval_class(pixels: Tensor, text: tuple[Tensor, Tensor]) -> None:
    model = tiny_model("blip2-retrieval")
    ids, mask = text
    expected = model(pixels, input_ids=ids, attention_mask=mask)
    bridge = load(model, "blip2-retrieval")
    words = bridge(None, text_ids=ids, text_mask=mask).text
    close(words, expected.text_model_output.last_hidden_state)
    queries = bridge(expected.vision_model_output.last_hidden_state).queries
    close(nn.functional.normalize(model.vision_projection(queries), dim=-1), expected.image_embeds)


def test_instruction_pass_equals_instructblip(pixels: Tensor, text: tuple[Tensor, Tensor]) -> None:
    model = tiny_model("instructblip")
    ids, mask = text
    image = model.vision_model(pixels).last_hidden_state
    image_mask = torch.tensor([[1] * 5, [1, 1, 1, 0, 0]])
    expected = model.qformer(
        input_ids=ids,
        attention_mask=torch.cat([torch.ones(2, Q, dtype=torch.long), mask], dim=1),
        query_embeds=model.query_tokens.expand(2, -1, -1),
        encoder_hidden_states=image,
        encoder_attention_mask=image_mask,
    ).last_hidden_state
    bridge = load(model, "instructblip")
    got = bridge(image, image_mask=image_mask, text_ids=ids, text_mask=mask)
    close(torch.cat([got.queries, got.text], dim=1), expected)
    assert (bridge(image, image_mask=image_mask).queries - got.queries).abs().max() > 1e-2  # the text matters


@torch.no_grad()
def full_size_difference(kind: Kind) -> list[float]:
    """Largest difference from transformers' full-size Q-Former, one number a pass."""
    generator = torch.Generator().manual_seed(4)
    tokens, image = torch.randn(1, 32, 768), torch.randn(2, 40, 1408, generator=generator)
    ids, mask = torch.randint(1, 30523, (2, 8), generator=generator), torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    joint = torch.cat([torch.ones(2, 32, dtype=torch.long), mask], dim=1)
    queries = tokens.expand(2, -1, -1)
    with torch.device("meta"):  # transformers' own draw of 186 M numbers would only be thrown away
        if kind == "instructblip":
            config = tf.InstructBlipQFormerConfig(**FULL_QFORMER)
            theirs = tf.InstructBlipQFormerModel(config)
        else:
            config = tf.Blip2QFormerConfig(**FULL_QFORMER, use_qformer_text_input=True)
            theirs = nn.ModuleDict({"qformer": tf.Blip2QFormerModel(config)})
            theirs["embeddings"] = tf.models.blip_2.modeling_blip_2.Blip2TextEmbeddings(config)
    randomise(theirs.to_empty(device="cpu"))
    for module in theirs.modules():  # a table of 0, 1, 2, … that is not in the state
        if hasattr(module, "position_ids"):
            module.position_ids.copy_(torch.arange(512)[None])
    prefix = "qformer." if kind == "instructblip" else ""
    state = {"query_tokens": tokens} | {f"{prefix}{k}": v for k, v in theirs.state_dict().items()}
    ours = bridge_from_transformers(state, bridge_config_from_transformers(config, 32), kind).eval()
    assert sum(parameter.numel() for parameter in ours.parameters()) == sum(map(Tensor.numel, state.values()))

    both = ours(image, text_ids=ids, text_mask=mask)
    got = [torch.cat([both.queries, both.text], dim=1), ours(image).queries]
    seen = {"encoder_hidden_states": image}
    if kind == "instructblip":
        passes = [
            theirs(input_ids=ids, attention_mask=joint, query_embeds=queries, **seen),
            theirs(input_ids=None, query_embeds=queries, **seen),
        ]
    else:
        embed, qformer = theirs["embeddings"], theirs["qformer"]
        got.append(ours(None, text_ids=ids, text_mask=mask).text)
        beside = embed(input_ids=ids, query_embeds=queries)
        passes = [
            qformer(query_embeds=beside, query_length=32, attention_mask=joint, **seen),
            qformer(query_embeds=queries, **seen),
            qformer(query_embeds=embed(input_ids=ids), query_length=0, attention_mask=mask),
        ]
    return [
        (mine - reference.last_hidden_state).abs().max().item() for mine, reference in zip(got, passes, strict=True)
    ]


@pytest.mark.parametrize("kind", ["blip2-retrieval", "instructblip"])
def test_full_size_equals_transformers(kind: Kind) -> None:
    differences = full_size_difference(kind)
    assert max(differences) <= TOLERANCE, differences


# --- equal keys and tensors


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_of_a_whole_model_s_bridge(kind: Kind) -> None:
    state = tiny_model(kind).state_dict()
    others = {LANGUAGE_PROJECTION} if kind != "blip2-retrieval" else set(RETRIEVAL_HEADS)
    part = {
        name: tensor
        for name, tensor in state.items()
        if name.split(".")[0] not in {"vision_model", "language_model"} | others
    }
    assert bridge_part(state).keys() == part.keys()
    assert module_part(state, IMAGE_NORM).keys() == {"weight", "bias"}
    back = bridge_to_transformers(load(tiny_model(kind), kind), kind)
    assert back.keys() == part.keys()
    for name, tensor in part.items():
        assert torch.equal(back[name], tensor), name


def test_loaded_weights_are_the_bridge_s_own_and_fp32() -> None:
    model = tiny_model("blip2")
    half = {name: tensor.half() for name, tensor in bridge_part(model.state_dict()).items()}
    config = bridge_config_from_transformers(model.config.qformer_config, Q)
    bridge = bridge_from_transformers(half, config, "blip2")
    assert all(p.dtype == torch.float32 and p.requires_grad for p in bridge.parameters())
    bridge = load(model, "blip2")
    with torch.no_grad():
        bridge.query_tokens.zero_()
    assert model.query_tokens.abs().max() > 0


def test_a_text_branch_is_left_behind_for_stage_2() -> None:
    model = tiny_model("blip2-retrieval")
    bridge = load(model, "blip2-retrieval")
    state = bridge_to_transformers(bridge, "blip2")
    assert state.keys() == bridge_part(tiny_model("blip2").state_dict()).keys()
    plain = bridge_from_transformers(state, BridgeConfig(**{**vars(bridge.config), "text_branch": False}), "blip2")
    image = torch.randn(2, 5, 24)
    close(plain.eval()(image).queries, bridge(image).queries)


def test_instructblip_starts_from_stage_1() -> None:
    bridge = load(tiny_model("blip2-retrieval"), "blip2-retrieval")
    state = bridge_to_transformers(bridge, "instructblip")
    assert state.keys() == bridge_part(tiny_model("instructblip").state_dict()).keys()


def test_config_of_another_activation_is_refused() -> None:
    with pytest.raises(UserError, match=r"hidden_act is 'relu'"):
        bridge_config_from_transformers(tf.Blip2QFormerConfig(hidden_act="relu"), 32)
    assert bridge_config_from_transformers(tf.Blip2QFormerConfig(), 32) == BridgeConfig(vocab_size=30522)


def test_position_ids_of_older_checkpoints_are_passed_over() -> None:
    state = {"qformer.embeddings.position_ids": torch.arange(4)[None], "query_tokens": torch.zeros(1)}
    assert bridge_part(state).keys() == {"query_tokens"}


def test_what_differs_is_named_with_a_count() -> None:
    model = tiny_model("blip2")
    config = bridge_config_from_transformers(model.config.qformer_config, Q)
    state = bridge_part(model.state_dict())
    for part in ("query", "key"):
        for tensor in ("weight", "bias"):
            del state[f"qformer.encoder.layer.0.attention.attention.{part}.{tensor}"]
    state["language_projection.weight"] = torch.zeros(1)
    state["query_tokens"] = torch.zeros(1, 5, 32)
    with pytest.raises(UserError) as error:
        bridge_from_transformers(state, config, "blip2")
    message = str(error.value)
    first_three = re.search(r"4 missing \((.*?), …\)", message)
    assert first_three and len(first_three[1].split(", ")) == 3
    assert "1 unexpected (language_projection.weight)" in message
    assert "1 of another shape (query_tokens is [1, 5, 32], not [1, 4, 32])" in message
    assert "\n" not in message


def test_a_kind_that_does_not_go_with_the_bridge_is_refused() -> None:
    plain = QFormer(BridgeConfig.preset("tiny"))
    texted = BridgeConfig.preset("tiny", text_branch=True)
    aware = QFormer(BridgeConfig.preset("tiny", instruction_aware=True))
    for message, call in {
        "unknown kind 'blip'": lambda: bridge_to_transformers(plain, "blip"),  # type: ignore[arg-type]
        "holds a text branch and the bridge has none": lambda: bridge_to_transformers(plain, "blip2-retrieval"),
        "cannot hold an instruction-aware": lambda: bridge_to_transformers(aware, "blip2"),
        "holds no text branch": lambda: bridge_from_transformers({}, texted, "blip2"),
        "hold no language_projection": lambda: module_part({}, LANGUAGE_PROJECTION),
    }.items():
        with pytest.raises(UserError, match=message):
            call()
