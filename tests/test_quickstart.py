"""The quick start around its training: what is done is skipped, and a half-written file is no result."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from scripts_as_modules import load_script
from tiny import draw_data

from adapters.data.examples import Example
from adapters.data.reading import read_data
from adapters.inference.request import Completion
from qformer.errors import UserError


@pytest.fixture
def quickstart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, with its run's folder here."""
    module = load_script("quickstart", monkeypatch)
    monkeypatch.setattr(module, "RUN", tmp_path / "run")
    (tmp_path / "run").mkdir()
    return module


@pytest.fixture
def own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawn squares in the place of easy-VQA's test set, which would have to be fetched."""
    file = draw_data(tmp_path / "data")

    def read(source: str, **options: Any) -> Any:
        assert source == "easy-vqa:test"
        return read_data(file, **options)

    monkeypatch.setattr("serve.evaluation.run.read_data", read)
    monkeypatch.setattr("adapters.data.reading.read_data", read)


class Knowing:
    """Answers rightly where it sees the picture."""

    name = "knowing"

    def __init__(self) -> None:
        self.calls = 0

    def answer(self, examples: tuple[Example, ...] | list[Example], *_: Any, **__: Any) -> list[str]:
        self.calls += 1
        return [
            example.answers[0] if example.images[0].label.endswith(".png") else "nothing to see" for example in examples
        ]

    def reply(self, examples: tuple[Example, ...] | list[Example], *_: Any, **__: Any) -> list[Completion]:
        return [Completion(said, tokens=1, ended=True, log_prob=0.0) for said in self.answer(examples)]


def test_a_stopped_training_goes_on_and_a_finished_one_is_left_alone(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []

    def train(finished: bool) -> Callable[..., Any]:
        def run(recipe: Any, out: Path, *, resume: bool, offline: bool) -> Any:
            calls.append(resume)
            assert recipe == load_recipe("quickstart") and out == quickstart.RUN
            (out / "recipe.yaml").write_text(recipe.dump())
            (out / "state").mkdir(exist_ok=True)
            (out / "state" / "position.json").write_text("{}")
            return SimpleNamespace(finished=finished)

        return run

    from adapters.recipe import load_recipe

    monkeypatch.setattr("adapters.finetune.finetune", train(False))
    with pytest.raises(KeyboardInterrupt):
        quickstart.train(offline=True)
    assert not (quickstart.RUN / "finished").exists()
    monkeypatch.setattr("adapters.finetune.finetune", train(True))
    quickstart.train(offline=True)
    quickstart.train(offline=True)
    assert calls == [False, True]
    older = load_recipe("quickstart", ["train.align_steps=250"])
    (quickstart.RUN / "recipe.yaml").write_text(older.dump())
    with pytest.raises(UserError, match=r"was trained with another train\.align_steps; move the folder away"):
        quickstart.train(offline=True)


@pytest.mark.usefixtures("own_data")
def test_the_scores_are_measured_once_beside_their_controls(
    quickstart: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Knowing()
    quickstart.show_scores(engine, offline=True)
    said = capsys.readouterr().out
    assert [line.split()[-1] for line in said.splitlines()[2:4]] == ["100.0%", "0.0%"]
    quickstart.show_scores(engine, offline=True)
    assert capsys.readouterr().out == said and engine.calls == 2
    (quickstart.RUN / "scores.json").write_text('{"n": ')  # what a stop in the middle of writing would leave
    quickstart.show_scores(engine, offline=True)
    assert capsys.readouterr().out == said and engine.calls == 4


@pytest.mark.usefixtures("own_data")
def test_pictures_and_questions_are_left_to_try_things_with(
    quickstart: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(quickstart, "SHOWN", (0, 2))
    for _ in range(2):  # twice, as a second run of the script does
        quickstart.show_answers(Knowing(), offline=True)
    asked = read_data(quickstart.RUN / "questions.jsonl").examples
    assert len(asked) == 2 and all(example.images[0].read() for example in asked)
    assert json.loads((quickstart.RUN / "questions.jsonl").read_text().splitlines()[0])["image"] == "pictures/1.png"
    assert capsys.readouterr().out.count("(right: ") == 4
