"""A run's folder: the recipe it is opened with, and a loss that is no number."""

from __future__ import annotations

import math
from pathlib import Path

from qformer.errors import UserError


def check_finite(value: float, step: int, learning_rate: float, *, what: str = "the loss") -> None:
    """Raise a UserError that says what to try if a value is NaN or infinite."""
    if not math.isfinite(value):
        raise UserError(
            f"{what} is {value} at step {step}; try --set train.learning_rate={learning_rate / 3:.1e},"
            " --set train.clip_norm=0.3 or --dtype float32 (weights up to the last validation are kept)"
        )


def open_run_folder(out: Path, recipe: str) -> None:
    """Make the folder and write the resolved recipe, as YAML, into it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipe.yaml").write_text(recipe, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another folder") from error
