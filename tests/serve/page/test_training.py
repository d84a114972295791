"""Runs that the page starts, stops and reads, and the files that its Batch tab lays out."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeAdapter, FakeEngine, make_recipe
from page_server import draw_data
from PIL import Image

from adapters.data.check import check_data
from qformer.errors import UserError
from serve.page.app import launch
from serve.page.batch_job import answer_files
from serve.page.tabs.train import as_findings, as_state
from serve.page.training import TrainingRuns, draw_curve, draw_validation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "data").mkdir()
    return draw_data(tmp_path / "data")


@pytest.fixture
def engine(folder: Path) -> FakeEngine:
    return FakeEngine(FakeAdapter(make_recipe(folder), "quickstart"))


class FakeProcess:
    """A training that does what it is told to."""

    def __init__(self, words: list[str], **_: Any) -> None:
        self.words = words
        self.returncode: int | None = None

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        self.returncode = 130 if number == signal.SIGINT else 1

    def wait(self) -> int | None:
        return self.returncode


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingRuns:
    monkeypatch.setattr("serve.page.training.subprocess.Popen", FakeProcess)
    return TrainingRuns(tmp_path / "runs")


def write_run(folder: Path, *, state: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text("task: vqa")
    if state:
        (folder / "state").mkdir(exist_ok=True)
    lines = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0}, {"step": 2, "val_loss": 1.5, "val_exact_match": 0.5}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    said = {"images": ["a.png"], "question": "<b>?", "answers": ["red"]}
    samples = [
        {"step": 1, "prediction": "old", "right": False, **said},
        {"step": 2, "prediction": "x", "right": False, **said},
    ]
    (folder / "samples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in samples))


def test_a_run_is_started_stopped_and_resumed(runs: TrainingRuns, folder: Path) -> None:
    data = str(folder / "shapes.jsonl")
    runs.start(data, "mine", 3)
    process: Any = runs._process
    expected = ["finetune", data, "--out", str(runs.folder / "mine"), "--set", "train.epochs=3"]
    assert process.words[3:] == expected
    assert runs.running == "mine" and runs.names() == ["mine"] and runs.show("mine").state == "running"
    with pytest.raises(UserError, match="'mine' is being trained"):
        runs.start(data, "other")
    write_run(runs.folder / "mine", state=True)
    runs.stop()
    assert runs.running == "" and runs.show("mine").state == "stopped"
    runs.resume("mine")
    again: Any = runs._process
    assert again.words[3:] == [*expected, "--resume"]
    again.returncode = 1
    assert runs.show("mine").state == "failed"


def test_a_finished_run_is_shown_and_nothing_more(runs: TrainingRuns) -> None:
    write_run(runs.folder / "theirs", state=False)
    shown = runs.show("theirs")

    assert runs.names() == ["theirs"] and shown.state == "finished"
    assert shown.losses == [(1, 2.0), (2, 1.0)]  # a line that is half written waits
    assert [one["prediction"] for one in shown.samples] == ["x"]
    assert "Loss 1.000 at step 2, at most 2.000" in draw_curve(shown)
    assert "points='320.0,0.0 640.0,100.0'" in draw_curve(shown)
    assert "val_exact_match 0.500" in draw_validation(shown) and "wrong: red" in draw_validation(shown)
    assert "&lt;b&gt;?" in draw_validation(shown) and "is finished" in as_state("theirs", shown)
    with pytest.raises(UserError, match="nothing to resume"):
        runs.resume("theirs")


@pytest.mark.parametrize("name", ["", "..", "../up", ".page", "a/b", "a b", "--out"])
def test_a_name_is_no_way_out_of_the_folder(runs: TrainingRuns, folder: Path, name: str) -> None:
    for act in (lambda: runs.start(str(folder / "shapes.jsonl"), name), lambda: runs.show(name)):
        with pytest.raises(UserError, match="cannot be a run's name"):
            act()


def test_what_cannot_be_trained_is_told(runs: TrainingRuns, folder: Path) -> None:
    with pytest.raises(UserError, match="There is no file"):
        runs.start(str(folder / "none.jsonl"), "mine")
    write_run(runs.folder / "mine", state=False)
    with pytest.raises(UserError, match="There is a run 'mine' already"):
        runs.start(str(folder / "shapes.jsonl"), "mine")


def test_training_is_for_this_machine_alone(engine: Any) -> None:
    with pytest.raises(UserError, match="--allow-training and --auth"):
        launch(engine, port=0, block=False, auth="ada:lovelace", allow_training=True)


def test_what_data_check_says_is_shown(folder: Path) -> None:
    with (folder / "shapes.jsonl").open("a") as file:
        file.write('\n{"image": "none.png", "question": "what?", "answer": "<b>"}\n')
    said = as_findings(check_data(folder / "shapes.jsonl", need_answers=False))

    assert "<dt>Rows</dt><dd>7</dd>" in said and "<dt>Bad rows</dt><dd>1</dd>" in said and "none.png" in said


def files(folder: Path, *names: str) -> list[tuple[str, Path]]:
    return [(name, folder / name) for name in names]


def test_pictures_alone_are_asked_each_question(engine: Any, folder: Path) -> None:
    (*_, last) = answer_files(engine, files(folder, "red.png", "blue.png"), ["what?", "why?"], "quickstart")

    assert last.finished and last.done == last.total == 4
    assert [(line["image"], line["question"]) for line in last.lines] == [
        ("blue.png", "what?"), ("blue.png", "why?"), ("red.png", "what?"), ("red.png", "why?"),
    ]  # fmt: skip
    assert last.csv.startswith("row,") and len(last.csv.splitlines()) == 5
    assert last.jsonl().count("\n") == 4


def test_a_data_file_finds_its_pictures_in_folders(engine: Any, folder: Path, tmp_path: Path) -> None:
    rows = [{"image": "pictures/red.png", "question": "what?"}, {"image": "pictures/none.png", "question": "what?"}]
    (folder / "mine.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (*_, last) = answer_files(engine, files(folder, "mine.jsonl", "red.png"), [], "quickstart")

    assert last.lines[0]["answer"] == "a ball" and "none.png" in last.lines[1]["error"]
    both = [{"image": f"{name}/red.png", "question": "what?"} for name in "ab"]
    (folder / "both.jsonl").write_text("\n".join(map(json.dumps, both)))
    with pytest.raises(UserError, match=r"names both a/red\.png and b/red\.png"):
        list(answer_files(engine, files(folder, "both.jsonl", "red.png"), [], "quickstart"))


def test_a_row_reads_no_file_that_was_not_uploaded(engine: Any, folder: Path, tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "private.png")
    for name in (str(tmp_path / "private.png"), f"../../{tmp_path.name}/private.png"):
        (folder / "bad.jsonl").write_text(json.dumps({"image": name, "question": "what?"}))
        found: list[Any] = []
        with pytest.raises(UserError, match=r"private\.png|not uploaded|good"):
            found += answer_files(engine, files(folder, "bad.jsonl"), [], "quickstart")
        assert not any("answer" in line for shown in found for line in shown.lines)


def test_a_job_that_nobody_waits_for_ends(engine: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "pause", 0.2)
    job = answer_files(engine, files(folder, "red.png"), ["what?"], "quickstart")
    next(job)
    began = time.monotonic()
    job.close()

    assert time.monotonic() - began < 5
    assert all(pending.stopped for pending in engine.pending)
    with pytest.raises(UserError, match="nothing to answer yet"):
        list(answer_files(engine, [], [], "quickstart"))
    with pytest.raises(UserError, match="2 data files"):
        (folder / "two.csv").write_text("image,question\n")
        list(answer_files(engine, files(folder, "shapes.jsonl", "two.csv"), [], "quickstart"))
