"""What `pip install .` installs: the packages with their data, the module at the top, and the command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import yaml

pytest.importorskip("setuptools", minversion="77", reason="the build needs it")
ROOT = Path(__file__).parents[1]
BUILT_FROM = ("pyproject.toml", "README.md", "LICENSE", "querybridge.py", "qformer", "adapters", "serve")


def pip(*words: str) -> None:
    run = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built without the network from a copy, since a build leaves folders in its tree."""
    tree = tmp_path_factory.mktemp("tree")
    for name in BUILT_FROM:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    out = tmp_path_factory.mktemp("wheel")
    pip("wheel", str(tree), "--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir", str(out))
    (built,) = out.glob("querybridge-*-py3-none-any.whl")
    return built


@pytest.fixture(scope="module")
def environment(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel in it and nothing else."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=os.name != "nt")
    python = str(folder / "bin" / "python")
    pip("--python", python, "install", "--no-deps", "--no-index", "--quiet", str(wheel))
    return folder


def run_in(environment: Path, *words: str) -> str:
    """Run a program of the environment, far from the repository; the libraries are those that run the tests."""
    borrowed = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    run = subprocess.run(
        [environment / "bin" / words[0], *words[1:]], cwd=environment, env=borrowed,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_every_file_of_the_packages_is_in_the_wheel(wheel: Path) -> None:
    packed = set(zipfile.ZipFile(wheel).namelist())
    sources = [
        path.relative_to(ROOT).as_posix()
        for room in ("qformer", "adapters", "serve")
        for path in (ROOT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    ]
    assert [name for name in ["querybridge.py", *sources] if name not in packed] == []
    assert {"qformer/py.typed", "adapters/py.typed", "serve/py.typed"} <= packed
    assert any(name.startswith("adapters/shipped/photo/") for name in packed)


def test_nothing_else_is_in_the_wheel(wheel: Path) -> None:
    tops = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"querybridge.py", "qformer", "adapters", "serve"}


def test_an_environment_gets_the_modules_and_their_data(environment: Path) -> None:
    code = (
        "import querybridge, adapters.catalogue as c;"
        "print(querybridge.__file__); print(*c.shipped_recipes()); print(*c.shipped_adapters())"
    )
    where, recipes, shipped = run_in(environment, "python", "-c", code).splitlines()
    assert Path(where).is_relative_to(environment)
    assert {path.stem for path in (ROOT / "adapters" / "recipes").glob("*.yaml")} == set(recipes.split())
    assert "photo" in shipped.split()


def test_an_environment_gets_the_command(environment: Path) -> None:
    assert "finetune" in run_in(environment, "querybridge", "--help")


def test_the_citation_has_the_version_of_the_package() -> None:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
