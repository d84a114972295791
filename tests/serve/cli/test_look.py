"""`querybridge look`: what it draws, tells and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import Call
from PIL import Image

from serve.looking.attention import CAVEAT


def test_it_draws_where_the_bridge_looks(call: Call, run_folder: Path, data_file: Path, tmp_path: Path) -> None:
    picture, out = data_file.parent / "3.png", tmp_path / "look.png"
    values = call("look", picture, "--out", out, "--adapter", run_folder, "--device", "cpu", "--json").values

    assert Image.open(out).size == (512, 512)
    assert values["queries"] >= 1 and values["layers"]
    assert values["strongest"] > 1
    assert sum(values["shares"].values()) == pytest.approx(1, abs=1e-4)


def test_one_query_is_another_picture_and_the_caveat_is_told(
    call: Call, run_folder: Path, data_file: Path, tmp_path: Path
) -> None:
    picture = data_file.parent / "3.png"
    told = call("look", picture, "--out", tmp_path / "a.png", "--adapter", run_folder, "--device", "cpu")
    call("look", picture, "--out", tmp_path / "b.png", "--query", 1, "--adapter", run_folder, "--device", "cpu")

    assert told.code == 0 and told.out.strip().endswith(CAVEAT)
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--out", "look.gif"], "--out look.gif: name a .png or .jpg file"),
        (["--out", "look.png", "--query", "999"], "--query 999: take 1 to"),
        (["--out", "look.png", "--layer", "99"], "--layer 99: it does not look"),
        (["--out", "none/look.png"], "--out none/look.png: cannot be written"),
    ],
)
def test_mistakes_are_one_line(
    call: Call, run_folder: Path, data_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], says: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    outcome = call("look", data_file.parent / "3.png", *arguments, "--adapter", run_folder, "--device", "cpu")

    assert says in outcome.mistake()


def test_a_file_that_is_no_picture_is_told_first(call: Call, data_file: Path) -> None:
    outcome = call("look", data_file, "--out", "look.png", "--adapter", "there-is-none")

    assert "is not a picture" in outcome.mistake()
