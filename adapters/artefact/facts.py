"""What is known about an artefact besides its weights, and the file that holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from qformer.atomic import whole_file
from qformer.errors import UserError

# 2 has the kind, 3 averages and the recipe's decoding, 4 the compute dtype, 5 imports, 6 the temperature
_FORMAT_VERSION = 6
FACTS = "artefact.json"


@dataclass(frozen=True)
class Facts:
    """What is known about an artefact besides its weights.

    Attributes:
        fingerprints: of the frozen parts, by role.
        data: name, fingerprint and size of the training data.
        metrics: what was measured, by name; fractions, not per cent.
        terms: terms of the training data, one a line; inherited from an artefact it started from.
        steps: optimiser steps taken.
        started_from: the artefact it started from, or None.
        averaged: the artefacts whose weights' mean it is, each with its share; None if one run made it.
        versions: of the libraries.
        format_version: of this folder's layout.
        kind: "representation" is BLIP-2's first stage (norm, bridge, heads); "language" has an LLM that reads them.
        imported: the published checkpoint that it is, trained elsewhere; None if it was trained here.
        temperature: of answers' confidence (`adapters.evaluation.calibration.tempered`); 1 if none was fitted.
        compute_dtype: "float32" or "bfloat16", in which it was trained; None if that is not known (before format 4).
    """

    fingerprints: Mapping[str, str]
    data: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)
    terms: tuple[str, ...] = ()
    steps: int = 0
    started_from: str | None = None
    averaged: Mapping[str, float] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    format_version: int = _FORMAT_VERSION
    kind: Literal["representation", "language"] = "language"
    compute_dtype: str | None = None
    imported: str | None = None
    temperature: float = 1.0


def read_facts(folder: Path) -> Facts:
    """The facts of an artefact.

    Raises:
        UserError: they cannot be read, or are of a newer format.
    """
    try:
        values = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        if values["format_version"] > _FORMAT_VERSION:
            raise UserError(
                f"{folder}: format {values['format_version']} is newer than this querybridge reads; update it"
            )
        values["terms"] = tuple(values["terms"])
        return Facts(**values)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(f"{folder / FACTS}: damaged or not ours ({error}); fetch a fresh copy") from error


def save_facts(folder: Path, facts: Facts) -> None:
    """Write the facts of an artefact that is being made, in today's format."""
    values = asdict(facts) | {"format_version": _FORMAT_VERSION}
    (folder / FACTS).write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")


def keep_temperature(folder: Path, temperature: float) -> None:
    """Write the temperature of confidences into an artefact; a reader never sees a half-written file.

    Raises:
        UserError: the facts cannot be read or written.
    """
    values = asdict(replace(read_facts(folder), temperature=temperature)) | {"format_version": _FORMAT_VERSION}
    try:
        with whole_file(folder / FACTS) as building:
            building.write_text(json.dumps(values, indent=2, ensure_ascii=False), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{folder / FACTS} cannot be written ({error.strerror or error}), so the temperature {temperature:.4g} is"
            " not kept: copy the adapter's folder to where you may write, and name it with --adapter"
        ) from error
