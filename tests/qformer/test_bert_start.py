"""The bridge started from a BERT: what is copied, what stays fresh, and what does not fit."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
import transformers as tf
from references import close, padded_text, randomise
from torch import Tensor

from qformer.bridge import QFormer
from qformer.config import BridgeConfig
from qformer.errors import UserError
from qformer.interchange import start_from_bert

Q = 4


@pytest.fixture
def text() -> tuple[Tensor, Tensor]:
    return padded_text()


def tiny_bert(layers: int = 3, **sizes: int) -> Any:
    defaults = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 60, "max_position_embeddings": 16}
    config = tf.BertConfig(num_hidden_layers=layers, num_attention_heads=4, **{**defaults, **sizes})
    return randomise(tf.BertModel(config), seed=5)


def fresh_bridge(**overrides: Any) -> QFormer:
    settings = {"num_layers": 3, "text_branch": True, **overrides}
    return QFormer(BridgeConfig.preset("tiny", **settings), generator=torch.Generator().manual_seed(6)).eval()


def as_bert_model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return state


def as_masked_lm(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"bert.{name}": tensor for name, tensor in state.items()} | {"cls.predictions.bias": torch.zeros(60)}


def as_google_s_file(state: dict[str, Tensor]) -> dict[str, Tensor]:
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    named = {re.sub(r"LayerNorm\.\w+", lambda m: old[m[0]], name): tensor for name, tensor in state.items()}
    return as_masked_lm(named)


@pytest.mark.parametrize("spell", [as_bert_model, as_masked_lm, as_google_s_file])
def test_text_alone_equals_the_bert_it_started_from(spell: Any, text: tuple[Tensor, Tensor]) -> None:
    bert, bridge = tiny_bert(), fresh_bridge()
    start_from_bert(bridge, spell(bert.state_dict()))
    ids, mask = text[0] % 60, text[1]
    expected = bert(input_ids=ids, attention_mask=mask).last_hidden_state
    close(bridge(None, text_ids=ids, text_mask=mask).text, expected)


def test_what_is_copied_and_what_stays_fresh() -> None:
    bert, bridge, untouched = tiny_bert(), fresh_bridge(), fresh_bridge()
    report = start_from_bert(bridge, bert.state_dict())
    for layer in bridge.layers:
        for name, parameter in layer.query_feed_forward.named_parameters():
            assert torch.equal(parameter, layer.text_feed_forward.get_parameter(name))
            assert parameter.data_ptr() != layer.text_feed_forward.get_parameter(name).data_ptr()
    same = {n for n, p in bridge.named_parameters() if torch.equal(p, untouched.get_parameter(n))}
    assert same == {n for n, _ in bridge.named_parameters() if n == "query_tokens" or "cross_attention" in n}
    assert torch.equal(bridge.embeddings.words.weight[60], untouched.embeddings.words.weight[60])  # [DEC]

    attention = 4 * (32 * 32 + 32) + 2 * 32
    feed_forward = 2 * 32 * 64 + 64 + 32 + 2 * 32
    assert report.parameters_copied == 3 * (attention + 2 * feed_forward) + 2 * 32 + (60 + 16) * 32
    cross_attention = 2 * (32 * 32 + 32) + 2 * (24 * 32 + 32) + 2 * 32
    assert report.parameters_fresh == 2 * cross_attention + Q * 32 + 32
    assert (report.layers_copied, report.layers_fresh) == (3, 0)
    assert (report.words_copied, report.words_fresh) == (60, 1)
    assert (report.positions_copied, report.positions_fresh) == (16, 0)
    assert "3 of 3 layers, 60 of 61 words" in str(report)


def test_first_layers_of_a_deeper_bert(text: tuple[Tensor, Tensor]) -> None:
    bert, bridge = tiny_bert(layers=5), fresh_bridge()
    report = start_from_bert(bridge, bert.state_dict())
    bert.encoder.layer = bert.encoder.layer[:3]
    ids = text[0] % 60
    close(bridge(None, text_ids=ids).text, bert(input_ids=ids).last_hidden_state)
    assert (report.layers_copied, report.layers_fresh) == (3, 0)


def test_a_shallower_bert_and_fewer_positions_leave_the_rest_fresh() -> None:
    bridge, untouched = fresh_bridge(), fresh_bridge()
    report = start_from_bert(bridge, tiny_bert(layers=1, max_position_embeddings=10).state_dict())
    assert (report.layers_copied, report.layers_fresh) == (1, 2)
    assert (report.positions_copied, report.positions_fresh) == (10, 6)
    assert torch.equal(bridge.embeddings.positions.weight[10:], untouched.embeddings.positions.weight[10:])
    for name, parameter in bridge.layers[1].named_parameters():
        assert torch.equal(parameter, untouched.layers[1].get_parameter(name))
    total = sum(parameter.numel() for parameter in bridge.parameters())
    assert report.parameters_copied + report.parameters_fresh == total


def test_without_a_text_branch_the_queries_start_from_bert() -> None:
    bert, bridge, texted = tiny_bert(), fresh_bridge(text_branch=False), fresh_bridge()
    report = start_from_bert(bridge, bert.state_dict())
    start_from_bert(texted, bert.state_dict())
    assert (report.words_copied, report.words_fresh, report.positions_copied) == (0, 0, 0)
    own = dict(bridge.named_parameters())
    for name in own:
        if "cross_attention" not in name and name != "query_tokens":
            assert torch.equal(own[name], texted.get_parameter(name)), name


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"hidden_size": 16}, "16 wide, the bridge 32: set hidden_size to 16"),
        ({"vocab_size": 62}, "62 words, vocab_size is 61"),
        ({"intermediate_size": 48}, r"of another shape \(encoder.layer.0.intermediate.dense.weight is \[48, 32\]"),
    ],
)
def test_a_bert_that_does_not_fit_changes_nothing(sizes: dict[str, int], message: str) -> None:
    bridge, untouched = fresh_bridge(), fresh_bridge()
    with pytest.raises(UserError, match=message):
        start_from_bert(bridge, tiny_bert(**sizes).state_dict())
    for name, parameter in bridge.named_parameters():
        assert torch.equal(parameter, untouched.get_parameter(name)), name


def test_what_is_not_a_whole_bert_is_refused() -> None:
    with pytest.raises(UserError, match="not a BERT's"):
        start_from_bert(fresh_bridge(), {"model.layers.0.mlp.weight": torch.zeros(1)})
    state = tiny_bert().state_dict()
    del state["embeddings.token_type_embeddings.weight"]
    with pytest.raises(UserError, match=r"1 missing \(embeddings.token_type_embeddings.weight\)"):
        start_from_bert(fresh_bridge(), state)
