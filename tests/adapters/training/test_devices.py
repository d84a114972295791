"""A GPU that is named by its number: random state, memory and timing are that one's. No GPU is needed to see it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapters.loading.vision_side import load_vision_side
from adapters.recipe import parse_recipe
from adapters.training.reporting import MemoryWatch
from adapters.training.setup import use_device
from adapters.training.timing import measure_step
from qformer.errors import UserError


def test_the_named_gpu_becomes_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    for device in ("cpu", "cuda"):
        use_device(device, 1)
    assert chosen == []
    use_device("cuda:1", 1)
    assert chosen == [torch.device("cuda:1")]
    with pytest.raises(UserError, match="--device cuda:1: 2 processes would share one GPU; write --device cuda"):
        use_device("cuda:1", 2)
    assert len(chosen) == 1


def test_the_memory_is_that_of_the_named_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []

    def peak(device: torch.device) -> int:
        asked.append(device)
        return 3 * 2**30

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", peak)
    assert MemoryWatch(torch.device("cuda:1")).peak_gib == 3
    assert asked == [torch.device("cuda:1")]


def test_a_step_on_the_cpu_leaves_gpus_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise AssertionError("a GPU was asked")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name in ("get_rng_state", "set_rng_state", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, fail)

    class Model(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return super().forward(x).sum(), 1

    assert measure_step(Model(2, 1), [[]], lambda rows: (torch.ones(1, 2),)) >= 0


@pytest.mark.parametrize(("dtype", "expected"), [(None, "float32"), ("bfloat16", "bfloat16")])
def test_a_towers_dtype_is_a_key(vision_folder: Path, cache_here: Path, dtype: str | None, expected: str) -> None:
    values = {"vision": {"towers": [{"source": str(vision_folder), "dtype": dtype}]}, "bridge": {"preset": "tiny"},
              "language": {"source": "x"}}  # fmt: skip
    side = load_vision_side(parse_recipe(values, "test"))
    assert side.caches[0].identity["dtype"] == expected  # so features of two dtypes are never confused
    pixels = torch.zeros(1, 3, 32, 32)
    assert side.encoders[0](pixels).isfinite().all()
    assert {p.dtype for p in side.encoders[0].parameters()} == {getattr(torch, expected)}
