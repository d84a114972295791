"""YAML from others: text, numbers, lists and mappings, without what makes a small file large or endless."""

from __future__ import annotations

from typing import Any

import yaml

_MOST = 10_000  # values, each counted as often as an alias repeats it


def read_yaml(text: str) -> Any:
    """Read YAML safely.

    Raises:
        yaml.YAMLError: it is not YAML, is nested too deeply, or its aliases make it far larger than it looks.
    """
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        if node is not None and _size(node, {}) > _MOST:
            raise yaml.YAMLError(f"its aliases make more than {_MOST:,} values of it")
        return yaml.safe_load(text)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for; `known` has those of nodes that were counted, 0 while they are."""
    if id(node) in known:
        if not known[id(node)]:
            raise yaml.YAMLError("it holds itself")
        return known[id(node)]
    known[id(node)] = 0
    inside: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        inside = node.value
    elif isinstance(node, yaml.MappingNode):
        inside = [part for pair in node.value for part in pair]
    known[id(node)] = size = 1 + sum(_size(part, known) for part in inside)
    return size
