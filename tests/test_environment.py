"""The shell script that makes the environment: which Python it takes, what it calls ready, what it says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BASH = shutil.which("bash")
pytestmark = pytest.mark.skipif(BASH is None, reason="bash is not installed")


@pytest.fixture
def house(tmp_path: Path) -> Path:
    """A folder with the script, the two files that an install hangs on, and a folder `bin` for the PATH."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/environment.sh", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "bin").mkdir()
    for tool in ("dirname", "cksum", "cat", "sed", "mkdir", "find", "rm", "mv", "uname"):
        (tmp_path / "bin" / tool).symlink_to(shutil.which(tool) or pytest.skip(f"{tool} is not installed"))
    return tmp_path


def shell(house: Path, commands: str) -> subprocess.CompletedProcess[str]:
    assert BASH is not None
    script = f"set -eu; source scripts/environment.sh; {commands}"
    return subprocess.run(
        [BASH, "-c", script], cwd=house, env={"PATH": str(house / "bin")}, capture_output=True, text=True, timeout=120
    )


def fake(house: Path, name: str, script: str) -> None:
    path = house / "bin" / name
    path.write_text(f"#!{BASH}\n{script}\n")
    path.chmod(0o755)


def pretend(version: str, *, has_venv: bool = True) -> str:
    """A Python that answers the script's three questions: does it fit, has it venv, which version is it."""
    fits = (3, 11) <= tuple(map(int, version.split(".")[:2])) <= (3, 14)
    return (
        f'case "$*" in *ensurepip*) exit {int(not has_venv)};; *"<="*) exit {int(not fits)};;'
        f" *) printf {version};; esac"
    )


def test_no_python_is_told(house: Path) -> None:
    done = shell(house, "find_python")
    assert done.returncode == 2 and "no Python at all" in done.stderr


def test_an_old_python_is_named(house: Path) -> None:
    fake(house, "python3", pretend("3.8.10"))
    done = shell(house, "find_python")
    assert done.returncode == 2 and "python3 is 3.8.10" in done.stderr and "3.11" in done.stderr


def test_a_python_without_venv_is_told_what_to_install(house: Path) -> None:
    fake(house, "python3", pretend("3.12.3", has_venv=False))
    done = shell(house, "find_python")
    assert done.returncode == 2 and "apt install python3.12-venv" in done.stderr


def test_the_first_python_that_fits_is_taken(house: Path) -> None:
    fake(house, "python3", pretend("3.9.1"))
    fake(house, "python3.11", pretend("3.11.2", has_venv=False))
    fake(house, "python3.13", pretend("3.13.0"))
    assert shell(house, 'find_python; printf "%s" "$QB_PYTHON"').stdout == "python3.13"


def test_an_install_is_out_of_date_when_its_files_change_or_the_folder_moves(house: Path) -> None:
    (house / ".venv" / "bin").mkdir(parents=True)
    (house / ".venv" / "bin" / "python").symlink_to(sys.executable)
    command = house / ".venv" / "bin" / "querybridge"
    command.write_text("")
    command.chmod(0o755)
    ready = "venv_works() { true; }; environment_ready run && printf yes || printf no"
    assert shell(house, ready).stdout == "no"
    assert shell(house, 'stamp_text >"$QB_VENV/.querybridge-run"').returncode == 0
    assert shell(house, ready).stdout == "yes"
    assert shell(house, f"QUERYBRIDGE_TORCH_INDEX=https://example.org; {ready}").stdout == "no"
    moved = house.with_name(house.name + "-moved")
    os.rename(house, moved)
    assert shell(moved, ready).stdout == "no"
    os.rename(moved, house)
    with (house / "pyproject.toml").open("a") as file:
        file.write("\n")
    assert shell(house, ready).stdout == "no"


@pytest.mark.parametrize(
    ("pip", "said"),
    [
        ("ERROR: Could not install: [Errno 28] No space left on device", "no space left on the disk"),
        ("WARNING: Retrying after NewConnectionError('...')", "pip can't reach its package index"),
        ("ERROR: No matching distribution found for torch==2.13.0", "QUERYBRIDGE_TORCH_INDEX can name one"),
        ("ERROR: Could not find a version (from versions: none)", "pip gets nothing from its package index"),
    ],
)
def test_what_pip_fails_of_is_one_line(house: Path, pip: str, said: str) -> None:
    done = shell(house, f"explain '{pip.replace(chr(39), '')}'")
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


def test_a_folder_that_is_no_environment_is_left_alone(house: Path) -> None:
    fake(house, "python3", pretend("3.12.3"))
    (house / ".venv").mkdir()
    (house / ".venv" / "mine.txt").write_text("keep me")
    done = shell(house, "repair_venv")
    assert done.returncode == 2 and "is no virtual environment and is left alone" in done.stderr
    assert (house / ".venv" / "mine.txt").read_text() == "keep me"
