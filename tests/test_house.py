"""The rules of the house that no linter knows: who may import whom, what may not be loaded, read or opened."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from import_graph import called, circles, climbs, import_graph, imported_modules

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("qformer", "adapters", "serve", "scripts")  # from the lowest to the highest
DOOR = ROOT / "querybridge.py"
MAX_LINES = 400
HEAVY = ("torch", "transformers", "gradio", "peft", "accelerate", "bitsandbytes", "matplotlib", "pyarrow", "onnx")
FLOORS = (  # from the lowest to the highest; the longest name that fits a file counts
    ("qformer",),
    ("adapters.catalogue", "adapters.overrides", "adapters.tasks", "adapters.recipe_data", "adapters.recipe"),
    ("adapters.data.scenes",),
    ("adapters.data",),
    ("adapters.choice",),
    ("adapters.evaluation",),
    ("adapters.features",),
    ("adapters.loading",),
    ("adapters.artefact",),
    ("adapters.inference",),
    ("adapters.training",),
    ("adapters.memory",),
    ("adapters.finetune", "adapters.pretrain"),
    ("serve",),
    ("serve.api", "serve.page"),
    ("serve.cli",),
    ("querybridge",),
    ("scripts",),
)
MAX_RECIPE_READERS = 12
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def python_files(*folders: str) -> list[Path]:
    """Return every Python file below `folders` of the repository."""
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


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


def recipes_through_assemblies(tree: ast.AST) -> list[str]:
    """Name where a recipe is reached through an assembly: `assembly.recipe`, `adapter.assembly.recipe`, …"""
    return [
        f"line {node.lineno}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "recipe"
        and ast.unparse(node.value).rpartition(".")[2] == "assembly"
    ]


def sources(*folders: str) -> dict[str, str]:
    """Return the text of every Python file below `folders`, and of querybridge.py, by its path."""
    return {name_of(path): path.read_text(encoding="utf-8") for path in [*python_files(*folders), DOOR]}


def report(faults: dict[str, list[str]]) -> str:
    return "\n".join(f"{file}, {fault}" for file, here in faults.items() for fault in here)


def test_imports_flow_one_way() -> None:
    faults = {}
    for room in ROOMS:
        for path in python_files(room):
            package = ".".join(path.relative_to(ROOT).parent.parts)
            faults[name_of(path)] = upward_imports(tree_of(path), room, package)
    assert not any(faults.values()), report(faults)


def test_no_two_files_need_each_other() -> None:
    found = circles(import_graph(sources("qformer", "adapters", "serve")))
    assert not found, "circles of imports:\n" + "\n".join(" → ".join(circle) for circle in found)


def test_no_import_climbs() -> None:
    graph = import_graph({path: text for path, text in sources(*ROOMS).items() if path != "adapters/__init__.py"})
    found = climbs(graph, FLOORS)
    assert not found, "\n".join(found)


def test_packages_start_empty() -> None:
    """A package's own file holds its docstring and nothing else, so importing one file never loads its neighbours."""
    full = [
        name_of(path) for path in python_files(*ROOMS) if path.name == "__init__.py" and len(tree_of(path).body) > 1
    ]
    assert full == []


def test_a_recipe_enters_few_files() -> None:
    graph = import_graph(sources("qformer", "adapters", "serve"))
    readers = [module for module, targets in graph.items() if "adapters.recipe" in targets and module != "querybridge"]
    assert len(readers) <= MAX_RECIPE_READERS, f"{len(readers)} files import adapters.recipe: {', '.join(readers)}"


def test_serving_asks_an_assembly_not_its_recipe() -> None:
    faults = {name_of(path): recipes_through_assemblies(tree_of(path)) for path in python_files("serve")}
    assert not any(faults.values()), report(faults)


def test_nothing_unsafe_is_read_or_opened() -> None:
    faults = {name_of(path): unsafe_lines(tree_of(path)) for path in [*python_files(*ROOMS), DOOR]}
    assert not any(faults.values()), report(faults)


def test_every_file_says_what_it_is_for() -> None:
    silent = [name_of(path) for path in [*python_files(*ROOMS, "tests"), DOOR] if not ast.get_docstring(tree_of(path))]
    assert not silent, f"no module docstring: {', '.join(silent)}"


def test_files_stay_short() -> None:
    lengths = {name_of(path): len(path.read_bytes().splitlines()) for path in [*python_files(*ROOMS), DOOR]}
    long = {name: length for name, length in lengths.items() if length > MAX_LINES}
    assert not long, f"over {MAX_LINES} lines, to be divided: {long}"


@pytest.mark.parametrize("module", ["qformer", "adapters", "serve", "serve.cli.command", "querybridge"])
def test_importing_does_no_work(module: str) -> None:
    """What `--help` imports must answer in under a second, so it may load none of the heavy libraries."""
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


CIRCLES = {
    "at the top": {"qformer/a.py": "import qformer.b", "qformer/b.py": "from qformer.a import A"},
    "inside a function": {
        "qformer/a.py": "def f():\n    from qformer import b",
        "qformer/b.py": "from . import a",
    },
    "for types only": {
        "adapters/a.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from adapters.data.b import B",
        "adapters/data/b.py": "from ..a import A",
    },
    "by name": {"serve/a.py": "import importlib\nimportlib.import_module('serve.b')", "serve/b.py": "import serve.a"},
    "through a third": {
        "qformer/a.py": "import qformer.b",
        "qformer/b.py": "import qformer.c",
        "qformer/c.py": "import qformer.a",
    },
    "with a package's own file": {
        "adapters/data/__init__.py": "from .a import A",
        "adapters/data/a.py": "from adapters.data import A",
    },
}


@pytest.mark.parametrize("made_up", CIRCLES.values(), ids=CIRCLES.keys())
def test_a_circle_is_noticed(made_up: dict[str, str]) -> None:
    (circle,) = circles(import_graph(made_up))
    assert circle[0] == circle[-1] and len(circle) == len(made_up) + 1


def test_two_circles_are_told_apart() -> None:
    made_up = {
        "qformer/a.py": "import qformer.b, qformer.c",
        "qformer/b.py": "import qformer.a",
        "qformer/c.py": "import qformer.a",
    }
    found = circles(import_graph(made_up))
    assert found == [["qformer.a", "qformer.b", "qformer.a"], ["qformer.a", "qformer.c", "qformer.a"]]


def test_files_in_line_are_no_circle() -> None:
    made_up = {
        "qformer/__init__.py": "",
        "qformer/a.py": "import qformer.a_b, torch",
        "qformer/a_b.py": "from qformer.c import C",
        "qformer/c.py": "from __future__ import annotations\nimport json",
    }
    graph = import_graph(made_up)
    assert graph["qformer.a"] == {"qformer.a_b": 1} and graph["qformer.c"] == {}
    assert circles(graph) == []


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("qformer/a.py", "from adapters.recipe import Recipe"),
        ("adapters/recipe.py", "if TYPE_CHECKING:\n    from adapters.data.rows import Row"),
        ("adapters/data/scenes/drawing.py", "def f():\n    from adapters.data import rows"),
        ("adapters/loading/assembly.py", "from ..artefact import facts"),
        ("adapters/training/start.py", "from adapters.finetune import finetune"),
        ("serve/engine/engine.py", "from serve.api.schemas import Chat"),
        ("serve/page/app.py", "import serve.cli.command"),
        ("serve/cli/command.py", "import querybridge"),
        ("querybridge.py", "import scripts.quickstart"),
    ],
)
def test_an_import_that_climbs_is_noticed(file: str, source: str) -> None:
    lower = (
        "adapters/recipe.py", "adapters/data/rows.py", "adapters/artefact/facts.py", "adapters/finetune.py",
        "serve/api/schemas.py", "serve/cli/command.py", "querybridge.py", "scripts/quickstart.py",
    )  # fmt: skip
    assert len(climbs(import_graph({name: "" for name in lower} | {file: source}), FLOORS)) == 1


def test_a_file_on_no_floor_is_noticed() -> None:
    assert climbs(import_graph({"adapters/odds_and_ends.py": ""}), FLOORS) == ["adapters.odds_and_ends is on no floor"]


def test_imports_that_go_down_are_allowed() -> None:
    made_up = {
        "qformer/a.py": "",
        "adapters/data/rows.py": "from adapters.data.scenes import drawing\nimport qformer.a",
        "adapters/data/scenes/drawing.py": "",
        "serve/engine/engine.py": "from adapters.data.rows import Row",
        "serve/api/app.py": "from serve.engine.engine import Engine\nfrom serve.page.app import mount",
        "serve/page/app.py": "from serve.engine import engine",
        "scripts/quickstart.py": "import serve.api.app, querybridge",
        "querybridge.py": "import serve.engine.engine",
    }
    assert climbs(import_graph(made_up), FLOORS) == []


@pytest.mark.parametrize(
    "source", ["assembly.recipe", "adapter.assembly.recipe.task", "x = engine.adapter().assembly.recipe.bridge"]
)
def test_a_recipe_through_an_assembly_is_noticed(source: str) -> None:
    assert len(recipes_through_assemblies(ast.parse(source))) == 1


def test_other_recipes_are_allowed() -> None:
    source = "recipe.task\nadapter.task\nassembly.task\nassembly.recipe_name\nrun.recipe"
    assert recipes_through_assemblies(ast.parse(source)) == []
