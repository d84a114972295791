"""What is written appears whole or not at all, and nothing half written is left."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qformer.atomic import earlier_folder, replace_folder, whole_file, whole_folder


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "notes.json"
    target.write_text("old")
    with whole_file(target) as partial:
        partial.write_text("new")
        assert target.read_text() == "old"
        assert partial.parent == tmp_path and partial.suffix == ".partial"
    assert target.read_text() == "new" and names(tmp_path) == ["notes.json"]


def test_two_writers_of_a_file_do_not_meet(tmp_path: Path) -> None:
    target = tmp_path / "notes.json"
    with whole_file(target) as first, whole_file(target) as second:
        assert first != second
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first" and names(tmp_path) == ["notes.json"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_the_file_that_was_there(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "notes.json"
    target.write_text("old")
    with pytest.raises(type(error)), whole_file(target) as partial:
        partial.write_text("half")
        raise error
    assert target.read_text() == "old" and names(tmp_path) == ["notes.json"]


def test_a_file_that_cannot_be_renamed_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="Permission denied"), whole_file(tmp_path / "notes.json") as partial:
        partial.write_text("new")
    assert names(tmp_path) == []


def test_a_folder_replaces_another_at_the_end(tmp_path: Path) -> None:
    target, abandoned = tmp_path / "deep" / "run", tmp_path / "deep" / "run.partial"
    abandoned.mkdir(parents=True)
    (abandoned / "half").touch()
    for text in ("old", "new"):
        with whole_folder(target) as building:
            assert building == abandoned and names(building) == []
            (building / "file").write_text(text)
    assert (target / "file").read_text() == "new" and names(target.parent) == ["run"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_error_leaves_the_folder_that_was_there(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "run"
    target.mkdir()
    (target / "file").write_text("old")
    with pytest.raises(type(error)), whole_folder(target) as building:
        (building / "file").write_text("half")
        raise error
    assert (target / "file").read_text() == "old" and names(tmp_path) == ["run"]


def test_replacing_a_folder_leaves_one_of_the_two_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    new, target = tmp_path / "new", tmp_path / "target"
    for folder, text in ((new, "new"), (target, "old")):
        folder.mkdir()
        (folder / "file").write_text(text)
    real = Path.rename

    def killed(self: Path, to: Path) -> Path:
        if self == new:
            raise KeyboardInterrupt
        return real(self, to)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Path, "rename", killed)
        replace_folder(new, target)
    assert (earlier_folder(target) / "file").read_text() == "old" and (new / "file").read_text() == "new"
    replace_folder(new, target)
    assert (target / "file").read_text() == "new" and names(tmp_path) == ["target"]
