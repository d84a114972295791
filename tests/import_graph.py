"""Which file imports which: circles between files, and imports that climb from a lower room to a higher one."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

Graph = dict[str, dict[str, int]]
"""Module → the modules that it imports, each with the first line that does so."""

IMPORTING = ("importlib.import_module", "import_module", "__import__")


def called(node: ast.Call) -> str:
    """Return the dotted name that is called, or "" if it is computed."""
    return ast.unparse(node.func) if isinstance(node.func, ast.Name | ast.Attribute) else ""


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


def module_name(path: Path) -> str:
    """The dotted name of a file, from its path relative to the root; a package's is that of its `__init__.py`."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def import_graph(sources: Mapping[str, str]) -> Graph:
    """Read who imports whom, at any depth: inside functions and under `TYPE_CHECKING` too.

    Args:
        sources: the text of each file by its path relative to the root, such as "adapters/data/rows.py".
    """
    paths = {module_name(Path(path)): Path(path) for path in sources}
    graph: Graph = {}
    for module, path in paths.items():
        graph[module] = {}
        package = ".".join(path.parent.parts)
        for line, name in imported_modules(ast.parse(sources[str(path)], filename=str(path)), package):
            target = _known(name, paths)
            if target and target != module:
                graph[module].setdefault(target, line)
    return graph


def _known(name: str, modules: Mapping[str, object]) -> str | None:
    """The file that a dotted name leads to: itself, or the longest part of it that is a file."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        if (candidate := ".".join(parts[:length])) in modules:
            return candidate
    return None


def circles(graph: Graph) -> list[list[str]]:
    """Shortest circles of imports, one for each pair of files that need each other, each beginning and ending alike."""
    found: dict[frozenset[str], list[str]] = {}
    for module, targets in graph.items():
        for target in targets:
            back = _way(graph, target, module)
            if back:
                found.setdefault(frozenset(back), [module, *back])
    return sorted(found.values(), key=lambda circle: (len(circle), circle))


def _way(graph: Graph, start: str, end: str) -> list[str] | None:
    """The shortest way along imports from one file to another, both included."""
    before: dict[str, str | None] = {start: None}
    queue = [start]
    for module in queue:  # breadth first; the queue grows while it is read
        if module == end:
            way: list[str] = []
            step: str | None = module
            while step is not None:
                way.append(step)
                step = before[step]
            return way[::-1]
        for target in graph.get(module, {}):
            if target not in before:
                before[target] = module
                queue.append(target)
    return None


def floor_of(module: str, floors: Sequence[Sequence[str]]) -> int | None:
    """The number of the floor that a file is on: that of the longest name in `floors` that it is or lies in."""
    matches = [
        (len(name), number)
        for number, names in enumerate(floors)
        for name in names
        if module == name or module.startswith(f"{name}.")
    ]
    return max(matches)[1] if matches else None


def climbs(graph: Graph, floors: Sequence[Sequence[str]]) -> list[str]:
    """Imports of a higher floor by a lower one, and files on no floor; the lowest floor is the first."""
    found = []
    for module, targets in graph.items():
        floor = floor_of(module, floors)
        if floor is None:
            found.append(f"{module} is on no floor")
            continue
        for target, line in targets.items():
            other = floor_of(target, floors)
            if other is not None and other > floor:
                found.append(f"{module}, line {line}: imports {target}")
    return found
