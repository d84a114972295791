"""Settings given as `key=value` beside a recipe's file."""

from __future__ import annotations

from typing import Any

import yaml

from qformer.errors import UserError


def apply_override(values: dict[str, Any], override: str) -> None:
    """Apply one `key=value` to a recipe's mapping in place; the key is dotted, the value is read as YAML.

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
        value = yaml.safe_load(text)
        if isinstance(value, str):  # YAML reads 1e-4 as text
            value = _number(value)
    except yaml.YAMLError as error:
        raise UserError(f"--set {override}: the value is not YAML") from error
    if isinstance(section, list):
        raise UserError(f"--set {override}: name an entry of the list that exists, such as vision.towers.0.layer=-2")
    section[parts[-1]] = value


def _number(text: str) -> str | float:
    try:
        return float(text)
    except ValueError:
        return text
