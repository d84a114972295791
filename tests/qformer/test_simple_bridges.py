"""The bridges that the Q-Former is measured against, by hand."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from qformer.config import BridgeConfig
from qformer.simple_bridges import SimpleBridge, vectors_of


@pytest.mark.parametrize("kind", ["mean", "patches", "gated"])
def test_outputs_by_hand(kind: str) -> None:
    torch.manual_seed(0)
    bridge = SimpleBridge(BridgeConfig.preset("tiny", num_queries=vectors_of(kind, 9)), kind)  # type: ignore[arg-type]
    features = torch.randn(2, 9, 24)
    out = bridge(features).queries
    seen = features.mean(dim=1, keepdim=True) if kind == "mean" else features
    mapped = seen @ bridge.linear.weight.T + bridge.linear.bias
    if kind == "gated":
        opened = seen @ bridge.gate.weight.T + bridge.gate.bias
        mapped = mapped * opened * torch.sigmoid(opened)
    assert torch.allclose(out, F.layer_norm(mapped, (32,), eps=1e-12), atol=1e-5)
    assert out.shape == (2, 1 if kind == "mean" else 9, 32)


def test_what_they_cannot_do_is_said() -> None:
    with pytest.raises(ValueError, match="one vector"):
        SimpleBridge(BridgeConfig.preset("tiny"), "mean")
    bridge = SimpleBridge(BridgeConfig.preset("tiny", num_queries=9), "patches")
    with pytest.raises(ValueError, match="8 features"):
        bridge(torch.randn(1, 8, 24))
    with pytest.raises(ValueError, match="no text"):
        bridge(torch.randn(1, 9, 24), text_ids=torch.ones(1, 2, dtype=torch.long))
