"""What a start remembers is what it would work out, and nothing of other rows, pictures or words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import draw_data, tiny_values

from adapters.data.reading import read_data
from adapters.loading.assembly import Assembly, assemble
from adapters.recipe import parse_recipe
from adapters.training import start_memory
from adapters.training.start_memory import StartMemory

HOW: Any = {"max_tokens": 320, "stages": ("answer",)}


@pytest.fixture(autouse=True)
def even_few_rows(monkeypatch: pytest.MonkeyPatch, cache_here: Path) -> None:
    monkeypatch.setattr(start_memory, "FEWEST_ROWS", 1)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return draw_data(tmp_path / "data")


@pytest.fixture
def made(vision_folder: Path, language_folders: dict[str, Path], file: Path, cache_here: Path) -> Assembly:
    return assemble(parse_recipe(tiny_values(vision_folder, language_folders["llama"], file), "test"))


def forbid(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("it was tokenised again")

    monkeypatch.setattr(start_memory, "tokenise", fail)


def test_a_second_start_has_the_very_questions(
    made: Assembly, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = StartMemory(made, folder=tmp_path / "starts", **HOW).tokenise(read_data(file))
    forbid(monkeypatch)
    again = StartMemory(made, folder=tmp_path / "starts", **HOW).tokenise(read_data(file))
    assert again == first and len(again) == 12
    for known, other in zip(first, again, strict=True):
        assert list(known.questions) == list(other.questions) and len(known.questions) == 2
        assert [image.path for image in known.images] == [image.path for image in other.images]


@pytest.mark.parametrize("changed", ["picture", "question", "answer", "words", "longest", "code", "damaged"])
def test_what_is_not_the_same_is_worked_out_again(
    made: Assembly, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changed: str
) -> None:
    folder = tmp_path / "starts"
    StartMemory(made, folder=folder, **HOW).tokenise(read_data(file))
    how = dict(HOW)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    if changed == "picture":
        (file.parent / "red0.png").write_bytes((file.parent / "blue0.png").read_bytes())
    elif changed == "question":
        rows[0]["question"] = "is it red?"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif changed == "answer":
        rows[0]["answer"] += "s"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif changed == "words":
        made.prompts.style = type(made.prompts.style)(system="Be brief.")
    elif changed == "longest":
        how["max_tokens"] = 319
    elif changed == "code":
        monkeypatch.setattr(start_memory, "_code", lambda: "other")
    else:
        (kept,) = folder.iterdir()
        kept.write_bytes(kept.read_bytes()[:-1])
    forbid(monkeypatch)
    with pytest.raises(AssertionError, match="again"):
        StartMemory(made, folder=folder, **how).tokenise(read_data(file))


def test_scores_of_what_does_not_change_are_remembered_for_both_sets(
    made: Assembly, file: Path, tmp_path: Path
) -> None:
    asked = []

    def compute() -> dict[str, float]:
        asked.append(1)
        return {"val_linear_probe": 1 / 3}

    def controls(*names: str, sets: bool = False) -> dict[str, float]:
        memory = StartMemory(made, folder=tmp_path / "starts", **HOW)
        for name in names:
            memory.tokenise(read_data(draw_data(tmp_path / name, questions=("is it red?",))))
        return memory.controls(compute, sets=sets)

    assert [controls("a", "b") for _ in range(2)] == [{"val_linear_probe": 1 / 3}] * 2 and len(asked) == 1
    controls("a", "b", sets=True)
    assert len(asked) == 2
    controls("a", "a")  # the same rows and pictures under another name
    assert len(asked) == 2
    controls("a")  # no validation data: nothing to remember
    assert len(asked) == 3


def test_few_files_are_kept(made: Assembly, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(start_memory, "_MOST_FILES", 2)
    for longest in (310, 311, 312):
        StartMemory(made, folder=tmp_path / "starts", max_tokens=longest, stages=("answer",)).tokenise(read_data(file))
    assert len(list((tmp_path / "starts").iterdir())) == 2
