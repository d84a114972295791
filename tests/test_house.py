"""The rules of the house that no linter knows: who may import whom, what may not be loaded, read or opened."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("qformer", "adapters", "serve", "scripts")  # from the lowest to the highest
MAX_LINES = 400
HEAVY = ("torch", "transformers", "gradio", "peft", "accelerate", "bitsandbytes", "matplotlib", "pyarrow", "onnx")
IMPORTING = ("importlib.import_module", "import_module", "__import__")
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def python_files(*folders: str) -> list[Path]:
    """Return every Python file below `folders` of the repository."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported_modules(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Yield line and full name of all that is imported, at any depth; `package` resolves the relative ones."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".")
            above = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
            module = ".".join(part for part in (above, node.module) if part)
            yield node.lineno, module
            for alias in node.names:  # `from . import x` names a module too
                yield node.lineno, f"{module}.{alias.name}"
        elif isinstance(node, ast.Call) and called(node) in IMPORTING:
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def called(node: ast.Call) -> str:
    """Return the dotted name that is called, or "" where it is computed."""
    return ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""


def upward_imports(tree: ast.AST, room: str, package: str) -> list[str]:
    higher = ROOMS[ROOMS.index(room) + 1 :]
    return [
        f"line {line}: {room} imports {module}"
        for line, module in imported_modules(tree, package)
        if module.split(".")[0] in (*higher, "tests")
    ]


def is_true(node: ast.AST | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def unsafe_lines(tree: ast.AST) -> list[str]:
    """Name what could run code from a file or a hub, or open a port to the whole network."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            options = {keyword.arg: keyword.value for keyword in node.keywords}
            if called(node) == "torch.load" and not is_true(options.get("weights_only")):
                found.append(f"line {node.lineno}: torch.load without weights_only=True")
            for option in ("trust_remote_code", "allow_pickle"):
                value = options.get(option)
                if value is not None and not (isinstance(value, ast.Constant) and value.value is False):
                    found.append(f"line {node.lineno}: {option} is not False")
        elif isinstance(node, ast.Dict):
            for key, value in zip(node.keys, node.values, strict=True):
                name = key.value if isinstance(key, ast.Constant) else None
                if name in ("trust_remote_code", "allow_pickle") and is_true(value):
                    found.append(f"line {node.lineno}: {name} is True")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.strip() == "0.0.0.0":
            found.append(f"line {node.lineno}: listens on every network")
        elif isinstance(node, ast.ImportFrom) and node.module == "torch" and "load" in [a.name for a in node.names]:
            found.append(f"line {node.lineno}: write torch.load in full, so that it can be checked")
    for line, module in imported_modules(tree, ""):
        if module.split(".")[0] in PICKLES:
            found.append(f"line {line}: imports {module}")
    return sorted(set(found))


def report(faults: dict[str, list[str]]) -> str:
    return "\n".join(f"{file}, {fault}" for file, here in faults.items() for fault in here)


def test_imports_flow_one_way() -> None:
    faults = {}
    for room in ROOMS:
        for path in python_files(room):
            package = ".".join(path.relative_to(ROOT).parent.parts)
            faults[name_of(path)] = upward_imports(tree_of(path), room, package)
    assert not any(faults.values()), report(faults)


def test_nothing_unsafe_is_read_or_opened() -> None:
    faults = {name_of(path): unsafe_lines(tree_of(path)) for path in python_files(*ROOMS)}
    assert not any(faults.values()), report(faults)


def test_every_file_says_what_it_is_for() -> None:
    silent = [name_of(path) for path in python_files(*ROOMS, "tests") if not ast.get_docstring(tree_of(path))]
    assert not silent, f"no module docstring: {', '.join(silent)}"


def test_files_stay_short() -> None:
    lengths = {name_of(path): len(path.read_bytes().splitlines()) for path in python_files(*ROOMS)}
    long = {name: length for name, length in lengths.items() if length > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines, to be divided: {long}"


@pytest.mark.parametrize("module", ["qformer", "adapters", "serve", "serve.cli.command"])
def test_importing_does_no_work(module: str) -> None:
    """What `--help` imports must answer in under a second, so it may load none of the heavy libraries."""
    if not (ROOT / "serve" / "cli" / "command.py").exists() and module == "serve.cli.command":
        pytest.skip("the command is not written yet")
    code = f"import sys, {module}; print(*sorted(set(sys.modules) & set({HEAVY})))"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0, run.stderr
    assert run.stdout.split() == []


@pytest.mark.parametrize(
    ("room", "package", "source"),
    [
        ("qformer", "qformer", "import adapters.features.cache"),
        ("qformer", "qformer", "def f():\n    from serve import engine"),
        ("adapters", "adapters.data", "import importlib\nimportlib.import_module('serve.cli.command')"),
        ("serve", "serve", "from scripts import quickstart"),
        ("serve", "serve", "import tests.conftest"),
    ],
)
def test_an_upward_import_is_noticed(room: str, package: str, source: str) -> None:
    assert upward_imports(ast.parse(source), room, package)


@pytest.mark.parametrize(
    ("room", "package", "source"),
    [
        (
            "adapters",
            "adapters.data",
            "from . import images\nfrom ..features import FeatureCache\nimport qformer.bridge",
        ),
        ("serve", "serve", "from adapters import artefact\nimport server, scripting"),
    ],
)
def test_a_downward_import_is_allowed(room: str, package: str, source: str) -> None:
    assert upward_imports(ast.parse(source), room, package) == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=flag)",
        "from torch import load",
        "import pickle",
        "def f():\n    from joblib import dump",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "AutoModel.from_pretrained(name, trust_remote_code=flag)",
        "options = {'trust_remote_code': True}",
        "numpy.load(path, allow_pickle=True)",
        "launch(server_name='0.0.0.0')",
    ],
)
def test_an_unsafe_line_is_noticed(source: str) -> None:
    assert unsafe_lines(ast.parse(source))


def test_safe_lines_are_allowed() -> None:
    source = (
        "torch.load(path, weights_only=True)\nnumpy.load(path, allow_pickle=False)\nlaunch(server_name='127.0.0.1')"
    )
    assert unsafe_lines(ast.parse(source)) == []
