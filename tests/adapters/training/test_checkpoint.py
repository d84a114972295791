"""A run's state on disk: written whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
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


CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree", "open")


def save_and_die(folder: Path, step: int, moment: int) -> bool:
    """Save a state in a process that is killed before its so many-th change of the disk; whether it came to that."""
    if (child := os.fork()) == 0:
        left = moment

        def count(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal left
            if event in CHANGES and str(folder.parent) in str(arguments[0]):
                left -= 1
                if left < 0:
                    os.kill(os.getpid(), signal.SIGKILL)

        model = nn.Linear(3, 2)
        with torch.no_grad():
            model.weight.fill_(step)
        sys.addaudithook(count)
        try:
            save_state(folder, model, torch.optim.AdamW(model.parameters()), RunState(step=step), {"0.cpu": RNG})
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


RNG = torch.get_rng_state()


def standing(folder: Path) -> int:
    """The step of the state that a resumed run takes, which must be whole."""
    found = find_state(folder)
    assert found is not None
    model = nn.Linear(3, 2)
    step = load_state(found, model, torch.optim.AdamW(model.parameters())).step
    assert bool((model.weight == step).all())
    return step


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_kill_at_any_moment_never_costs_the_last_state(tmp_path: Path) -> None:
    """Nor does a second kill, at any moment of the first saving after it."""
    outcomes = set()
    for first in range(60):
        once = tmp_path / "once"
        shutil.rmtree(once, ignore_errors=True)
        assert not save_and_die(once / "state", 1, 10**6)
        died = save_and_die(once / "state", 2, first)
        stands = standing(once / "state")
        outcomes.add((died, stands))
        if not (once / "state").exists():  # killed between two renames
            for second in range(60):
                twice = tmp_path / "twice"
                shutil.rmtree(twice, ignore_errors=True)
                shutil.copytree(once, twice)
                died_again = save_and_die(twice / "state", 3, second)
                assert standing(twice / "state") in (stands, 3)
                if not died_again:
                    break
            else:
                pytest.fail("never saved")
        if not died:
            break
    assert outcomes == {(True, 1), (True, 2), (False, 2)}
