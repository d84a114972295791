"""A run's folder: one run at a time in it, the recipe it is opened with, and a loss that is no number."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from qformer.errors import UserError
from qformer.file_lock import lock


def check_finite(value: float, step: int, learning_rate: float, *, what: str = "the loss") -> None:
    """Raise a UserError that says what to try if a value is NaN or infinite."""
    if not math.isfinite(value):
        raise UserError(
            f"{what} is {value} at step {step}; try --set train.learning_rate={learning_rate / 3:.1e},"
            " --set train.clip_norm=0.3 or --dtype float32 (weights up to the last validation are kept)"
        )


@contextmanager
def one_run_at_a_time(out: Path) -> Iterator[None]:
    """Hold a run's folder, among all processes of a machine; a run's further processes go with its first.

    The folder is made if there is none, with those around it, and taken away again if nothing was left in it.

    Raises:
        UserError: another run holds it, or it cannot be written.
    """
    if os.environ.get("RANK", "0") != "0" or (out.exists() and not out.is_dir()):  # a file is refused where it is read
        yield
        return
    made = [folder for folder in (out, *out.parents) if not folder.exists()]  # the innermost first
    taken_away, path = False, out / "run.lock"
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    except OSError as error:
        raise UserError(f"--out {out}: cannot be written ({error.strerror}); name another folder") from error
    with file:
        # a file that its holder removed after it was opened locks nothing
        if not lock(file) or not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise UserError(
                f"--out {out}: another run is writing there; wait until it has ended, or name another folder"
            )
        try:
            yield
        finally:
            with suppress(OSError):  # Windows takes no open file away
                path.unlink()
                taken_away = True
            with suppress(OSError):  # not empty
                for folder in made:
                    folder.rmdir()
    if not taken_away:
        with suppress(OSError):
            path.unlink()


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
