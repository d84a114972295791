"""Shards of safetensors: one at a time in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from qformer.shards import LazyTensor, write_shards


def test_one_shard_at_a_time_is_in_memory(tmp_path: Path) -> None:
    read: list[tuple[int, int]] = []  # which tensor, and how many shards were written before

    def reader(number: int) -> Callable[[], torch.Tensor]:
        def give() -> torch.Tensor:
            read.append((number, len(list(tmp_path.glob("*.safetensors")))))
            return torch.full((1000,), float(number))

        return give

    tensors = {f"t{number}": LazyTensor((1000,), torch.float32, reader(number)) for number in range(6)}
    files = write_shards(tmp_path, tensors, "8KB")
    assert len(files) == 3 and read == [(number, number // 2) for number in range(6)]
    assert float(load_file(tmp_path / files[2])["t5"][0]) == 5.0
