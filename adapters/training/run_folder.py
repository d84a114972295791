"""A run's folder: whether it may be used, what stands in it to go on from, and the recipe it is opened with."""

from __future__ import annotations

import math
from pathlib import Path

from adapters.recipe import Recipe, differing_keys, load_recipe
from adapters.training.checkpoint import find_state, read_run_state
from qformer.errors import UserError


def check_run_folder(out: Path, resume: bool, recipe: Recipe) -> Path | None:
    """The state to go on from, or None for a fresh run.

    Raises:
        UserError: there is nothing to resume, a run stands in the way, or it was another recipe's.
    """
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out}: this is a file; name a folder")
    state = find_state(out / "state")
    if resume:
        if state is None:
            raise UserError(f"--resume: {out} holds no run to go on with; leave --resume out, or name the run's folder")
        if differing := differing_keys(load_recipe(out / "recipe.yaml"), recipe):
            raise UserError(
                f"--resume: the recipe differs from the run's in {', '.join(differing[:3])}; give the same recipe and"
                f" --set as before ({out / 'recipe.yaml'}), or name another --out"
            )
        return state
    if state is not None:
        steps = read_run_state(state).step
        raise UserError(
            f"--out {out}: a run of {steps} steps stands there; add --resume to go on, or name another folder"
        )
    return None


def check_finite(value: float, step: int, recipe: Recipe, *, what: str = "the loss") -> None:
    """Raise a UserError that says what to try where a value is NaN or infinite."""
    if not math.isfinite(value):
        raise UserError(
            f"{what} is {value} at step {step}; try --set train.learning_rate={recipe.train.learning_rate / 3:.1e},"
            " --set train.clip_norm=0.3 or --dtype float32 (weights up to the last validation are kept)"
        )


def open_run_folder(out: Path, recipe: Recipe) -> None:
    """Make the folder and write the resolved recipe into it.

    Raises:
        UserError: it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / "recipe.yaml").write_text(recipe.dump(), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another folder") from error
