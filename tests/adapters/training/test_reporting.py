"""A run's log on a disk that is full, and the command's last word on one: one line, no traceback."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

from adapters.training.reporting import Reporter
from qformer.errors import UserError
from serve.cli import command as cli

CPU = torch.device("cpu")
FIGURES = {"loss": 1.0, "samples_per_second": 2.0}


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_steps_on_a_full_disk(tmp_path: Path) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")
    with Reporter(tmp_path, 2, device=CPU, quiet=True) as report:
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(UserError, match=r"log cannot be written \(.*No space left.*free space, then --resume"):
            report.step(1, FIGURES)


def test_the_curve_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Reporter(tmp_path, 2, device=CPU, quiet=True) as report:
        report.step(1, FIGURES)
        monkeypatch.setattr("adapters.training.reporting.draw_curve", full)
        with pytest.raises(UserError, match="No space left"):
            report.draw()


def test_an_error_on_the_way_out_hides_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="the first"), Reporter(tmp_path, 2, device=CPU, quiet=True) as report:
        monkeypatch.setattr(report._board, "close", full)
        raise ValueError("the first")
    with pytest.raises(UserError, match="No space left"), Reporter(tmp_path, 2, device=CPU, quiet=True) as report:
        monkeypatch.setattr(report._board, "close", full)


def test_the_command_tells_of_a_full_disk_in_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "app", full)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err == "querybridge: No space left on device; free space and run it again\n"
