"""`import querybridge`: every documented name is there, is loaded late, and is the one that its file defines."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import querybridge

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("name", querybridge.__all__)
def test_every_name_is_there_and_says_what_it_is(name: str) -> None:
    found = getattr(querybridge, name)
    assert name in dir(querybridge)
    if name == "__version__":
        assert found.count(".") == 2
    else:
        assert inspect.getdoc(found)


@pytest.mark.parametrize(("name", "module"), querybridge._MODULES.items())
def test_a_name_is_the_one_of_its_file(name: str, module: str) -> None:
    found = getattr(querybridge, name)
    assert found is getattr(import_module(module), name)
    assert found.__module__ == module, "it is defined elsewhere"


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((ROOT / "querybridge.py").read_text(encoding="utf-8"))
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: node.module for node in imports for alias in node.names} == querybridge._MODULES
    assert {*querybridge._MODULES, "__version__"} == set(querybridge.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'querybridge' has no attribute 'load_adaptor'"):
        _ = querybridge.load_adaptor


def test_a_star_import_gives_the_names() -> None:
    names: dict[str, object] = {}
    exec("from querybridge import *", names)
    assert set(querybridge.__all__) <= set(names)


def test_dir_loads_nothing() -> None:
    code = (
        "import sys, querybridge; dir(querybridge); print('load_adapter' in dir(querybridge), 'torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.stdout.split() == ["True", "False"], run.stderr


def test_every_name_has_an_example_in_the_docs() -> None:
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    assert [name for name in querybridge.__all__ if f"`{name}`" not in text] == []
