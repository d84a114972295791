"""A run's state on disk: written whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adapters.training.checkpoint import RunState, find_state, generators_of_all, load_state, save_state
from qformer.errors import UserError


def test_a_full_disk_leaves_the_state_that_stands_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from safetensors.torch import save_file

    model = nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimiser.step()
    saved = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    save_state(tmp_path / "state", model, optimiser, RunState(step=1), generators_of_all())

    def fails_at_the_moments(tensors: Any, path: Path, **options: Any) -> None:
        if path.name == "optimiser.safetensors":
            path.write_bytes(b"half of it")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        save_file(tensors, path, **options)

    optimiser.step()
    monkeypatch.setattr("adapters.training.checkpoint.save_file", fails_at_the_moments)
    with pytest.raises(UserError, match=r"No space left on device.*free space, then --resume"):
        save_state(tmp_path / "state", model, optimiser, RunState(step=2), generators_of_all())
    assert [path.name for path in tmp_path.iterdir()] == ["state"]
    found = find_state(tmp_path / "state")
    assert found is not None
    assert load_state(found, model, optimiser).step == 1
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, saved[name])
