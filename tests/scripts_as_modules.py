"""Scripts imported as modules, whose functions are tested one by one."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest


def load_script(name: str, patch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/NAME.py as a module; `patch` forgets it again."""
    folder = Path(__file__).parents[1] / "scripts"
    patch.syspath_prepend(str(folder))  # a script may import one beside it
    spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    patch.setitem(sys.modules, name, module)  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module
