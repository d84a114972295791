"""Settings given as `key=value` beside a recipe's file."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import yaml

from qformer.errors import UserError


def apply_override(values: dict[str, Any], override: str) -> None:
    """Apply one `key=value` to a recipe's mapping in place; the key is dotted, the value is read by `_value`.

    Raises:
        UserError: it is no `key=value`, its value is not YAML, or the key leads through a value.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: write it as key=value, such as train.epochs=2")
    section: Any = values
    parts = key.split(".")
    for index, part in enumerate(parts[:-1]):
        if isinstance(section, list):
            if not part.isdigit() or int(part) >= len(section):
                raise UserError(f"--set {override}: '{'.'.join(parts[:index])}' has entries 0 to {len(section) - 1}")
            section = section[int(part)]
        else:
            if section.get(part) is None:
                section[part] = {}
            section = section[part]
        if not isinstance(section, dict | list):
            raise UserError(f"--set {override}: '{'.'.join(parts[: index + 1])}' is a value, not a section")
    try:
        value = _value(text)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not YAML") from error
    if isinstance(section, list):
        raise UserError(f"--set {override}: name an entry of the list that exists, such as vision.towers.0.layer=-2")
    section[parts[-1]] = value


def _value(text: str) -> Any:
    """Read a value as YAML, but keep text whole: " #" begins no comment, and a line break is no space.

    Raises:
        yaml.YAMLError: it is not YAML.
    """
    value = yaml.safe_load(text)
    tokens = list(yaml.scan(text, Loader=yaml.SafeLoader))
    between = (text[one.end_mark.index : other.start_mark.index] for one, other in pairwise(tokens))
    if any("#" in gap for gap in between):
        return text.strip()
    if not isinstance(value, str):
        return value
    first = tokens[1]  # after the beginning of the stream
    quoted_or_tagged = isinstance(first, yaml.TagToken) or (isinstance(first, yaml.ScalarToken) and not first.plain)
    return value if quoted_or_tagged else _number(text.strip())  # YAML reads 1e-4 as text


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text
