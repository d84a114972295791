"""The Train tab in a real browser over a run of tiny models: checked, started, followed, stopped and resumed."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fake_engine import FakeEngine
from page_server import served
from page_view import View

from serve.page.training import TrainingRuns


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    return tmp_path / "runs"


@pytest.fixture
def address(
    engine: FakeEngine,
    runs: Path,
    clip_folder: Path,
    language_folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[str]:
    small = {
        "vision.towers": json.dumps([{"source": str(clip_folder)}]), "language.source": str(language_folders["llama"]),
        "bridge.preset": "tiny", "bridge.reader": "null", "bridge.start": "null", "bridge.hide_queries": "0",
        "train.max_steps": "100000", "train.batch_size": "8", "train.warmup_steps": "0", "train.align_steps": "0",
        "train.patience": "1000", "train.validate_every": "10", "train.log_every": "1",
    }  # fmt: skip
    options = [word for key, value in small.items() for word in ("--set", f"{key}={value}")]
    training = TrainingRuns(runs, options)
    monkeypatch.setattr("serve.page.app.TrainingRuns", lambda _: training)
    monkeypatch.setattr("serve.page.tabs.train._EVERY", 0.5)
    with served(engine, tmp_path / "uploads", allow_training=True) as url:
        yield url
        training.close()


@pytest.mark.slow
@pytest.mark.skipif("QUERYBRIDGE_SLOW_TESTS" not in os.environ, reason="takes a minute: set QUERYBRIDGE_SLOW_TESTS=1")
def test_a_run_is_checked_started_followed_stopped_and_resumed(
    open_view: Callable[..., View], data_file: Path, runs: Path
) -> None:
    view = open_view()
    page = view.page
    page.set_default_timeout(240_000)  # each start takes as long as the command does
    view.tab("Train")
    page.fill("#train-data textarea, #train-data input", str(data_file))
    page.click("#train-check")
    page.wait_for_function("document.querySelector('#train-found').innerText.includes('24')")
    page.wait_for_selector("#train-sheet img")
    page.fill("#train-name textarea, #train-name input", "mine")
    page.click("#train-start")
    view.says("mine is being trained")
    page.wait_for_selector("#train-curve svg")
    page.wait_for_selector("#train-validation td.answer")  # sample predictions
    page.click("#train-stop")
    view.says("mine was stopped, and can be resumed")
    steps = newest_step(page.inner_text("#train-curve"))
    assert (runs / "mine" / "state").exists() and steps >= 10
    page.click("#train-resume")
    view.says("mine is being trained")
    page.wait_for_function(
        f"Number(/at step (\\d+)/.exec(document.querySelector('#train-curve').innerText)[1]) > {steps + 10}"
    )
    page.click("#train-stop")
    view.says("mine was stopped, and can be resumed")
    losses = [json.loads(line) for line in (runs / "mine" / "metrics.jsonl").read_text().splitlines()]
    written = [row["step"] for row in losses if "loss" in row]
    assert written == sorted(set(written))  # it went on where it had stopped


def newest_step(caption: str) -> int:
    found = re.search(r"at step (\d+)", caption)
    assert found, caption
    return int(found[1])
