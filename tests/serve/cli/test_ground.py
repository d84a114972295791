"""`querybridge ground`, `ask --show` and `evaluate --task grounding`: what they find, write and refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import Call
from PIL import Image
from tiny_grounding import save_tiny_head


@pytest.fixture(scope="module")
def with_head(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the run's artefact with a grounding head in it."""
    folder = tmp_path_factory.mktemp("grounding") / "artefact"
    shutil.copytree(run_folder / "best", folder)
    save_tiny_head(tmp_path_factory.mktemp("parts"), folder)
    return folder


@pytest.fixture
def picture(data_file: Path) -> Path:
    return data_file.parent / "3.png"


@pytest.fixture(scope="module")
def phrases(data_file: Path) -> Path:
    rows = [
        {"image": f"{n}.png", "phrase": phrase, "boxes": [[0.1, 0.2, 0.6, 0.7]], "kind": kind}
        for n, (phrase, kind) in enumerate([("a square", "shape"), ("the picture", "scene")] * 2)
    ]
    file = data_file.parent / "phrases.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def test_it_finds_a_box_and_draws_it(call: Call, with_head: Path, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "boxes.png"
    values = call(
        "ground", picture, "the red square", "--out", out, "--adapter", with_head, "--device", "cpu", "--json"
    ).values

    left, top, right, bottom = values["box"]
    assert 0 <= left <= right <= 1 and 0 <= top <= bottom <= 1
    assert values["pixels"] == [round(40 * edge) for edge in values["box"]]
    assert sum(map(sum, values["heat"])) == pytest.approx(1, abs=0.01)
    assert values["phrase"] == "the red square" and Image.open(out).size == (512, 512)


def test_words_say_where(call: Call, with_head: Path, picture: Path) -> None:
    told = call("ground", picture, "the red square", "--adapter", with_head, "--device", "cpu")

    assert told.code == 0 and told.out.startswith("the red square: ") and "from the left" in told.out


def test_what_an_answer_names_is_shown(call: Call, with_head: Path, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "shown.png"
    values = call(
        "ask", picture, "what is it?", "--choices", "a red square,a dog", "--show", out, "--adapter", with_head,
        "--device", "cpu", "--json",
    ).values  # fmt: skip

    assert [one["phrase"] for one in values["shown"]] == [values["answer"]]
    assert values["show"] == str(out) and out.exists()


def test_an_answer_that_names_nothing_is_not_shown(call: Call, with_head: Path, picture: Path, tmp_path: Path) -> None:
    out = tmp_path / "shown.png"
    told = call(
        "ask", picture, "is it red?", "--choices", "yes,no", "--show", out, "--adapter", with_head, "--device", "cpu"
    )

    assert "names nothing that could be shown" in told.out and not out.exists()


def test_an_adapter_is_scored_with_its_controls(call: Call, with_head: Path, phrases: Path) -> None:
    scores = call(
        "evaluate", phrases, "--task", "grounding", "--controls", "--adapter", with_head, "--device", "cpu", "--json",
        "--quiet",
    ).values  # fmt: skip

    assert scores["n"] == 4 and set(scores["by_kind"]) == {"shape", "scene"}
    for name in ("", "blank_", "other_phrase_", "centre_"):
        assert 0 <= scores[f"{name}pointing"] <= 1 and 0 <= scores[f"{name}iou_0.5"] <= 1
    assert scores["centre_pointing"] == 1.0  # the middle is in all of these boxes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["the dog", "--out", "box.gif"], "--out box.gif: name a .png or .jpg file"),
        (["the dog", "--out", "none/box.png"], "--out none/box.png: cannot be written"),
        ([" "], "PHRASE: it is empty"),
    ],
)
def test_mistakes_are_one_line(
    call: Call, with_head: Path, picture: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str],
    says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    outcome = call("ground", picture, *arguments, "--adapter", with_head, "--device", "cpu")

    assert says in outcome.mistake()


def test_an_adapter_that_cannot_look_is_told(call: Call, run_folder: Path, picture: Path) -> None:
    outcome = call("ground", picture, "the dog", "--adapter", run_folder, "--device", "cpu")

    assert "neither a grounding head nor a text side" in outcome.mistake()


def test_show_takes_one_picture(call: Call, with_head: Path, picture: Path) -> None:
    outcome = call("ask", picture, picture, "what?", "--show", "a.png", "--adapter", with_head, "--device", "cpu")

    assert "it goes with one picture" in outcome.mistake()
