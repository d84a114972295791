"""Cross-validation for small data sets: every picture is held out once, then one adapter learns from all of them.

No fold chooses anything by its held-out pictures: each runs to its end and its last weights are scored. So the score is
that of the procedure, and the last adapter, trained in the same way on everything, should do a little better.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from adapters.data.examples import Example
from adapters.evaluation.intervals import interval_by_picture
from adapters.evaluation.vqa import exact_match
from adapters.training.controls import OnAnswers
from adapters.training.run_data import Result
from qformer.atomic import whole_file
from qformer.errors import UserError

SCORED = "fold.json"
"""In a fold's folder: what its held-out questions scored. A fold that has it is not run again."""
_CONTROLS = ("val_loss", "val_blank_images", "val_commonest_answer", "val_linear_probe")


class Train(Protocol):
    """One run, without early stopping."""

    def __call__(
        self, fold: str | None, out: Path, *, on_answers: OnAnswers | None, measured: Mapping[str, float]
    ) -> Result:
        """Train in a folder.

        Args:
            fold: the part of the pictures that is held out, such as "2/5"; None holds nothing out.
            out: the run's folder; a run that was stopped in it goes on.
            on_answers: called with the held-out questions and the answers to them, at each validation.
            measured: what the artefact says if nothing is held out.
        """


@dataclass(frozen=True)
class FoldScore:
    """What one fold's held-out questions scored.

    Attributes:
        hits: 1.0 or 0.0 for each question.
        pictures: which picture each question is about.
        controls: fractions and the loss, as the run's validation has them.
    """

    hits: Sequence[float]
    pictures: Sequence[str]
    controls: Mapping[str, float]


def cross_validate(
    train: Train, out: Path, folds: int, *, sets: bool = False, say: Callable[[str], None] = lambda line: None
) -> Result:
    """Train once for each fold, score it on the pictures that it did not see, and train once on everything.

    Args:
        train: makes one run.
        out: the last run's folder; those of the folds are in `folds/` inside it. Folds that are scored are not run
            again.
        folds: how many parts the pictures are cut into, at least 2.
        sets: as in `adapters.evaluation.vqa.exact_match`.
        say: called with a line after each fold, and one for all of them.

    Returns:
        The last run's result. Its metrics are those of all folds: "val_exact_match" over all questions with its 95 %
        interval by picture, and the means of the controls.

    Raises:
        UserError: as `train` does, or a fold's score cannot be read.
    """
    scores: list[FoldScore] = []
    for fold in range(1, folds + 1):
        folder = out / "folds" / str(fold)
        if not (folder / SCORED).is_file():
            run = _run_fold(train, f"{fold}/{folds}", folder, sets=sets)
            if not run.finished:
                return run
        scores.append(_read_score(folder / SCORED))
        exact = sum(scores[-1].hits) / len(scores[-1].hits)
        say(f"fold {fold} of {folds}: {exact:.1%} of {len(scores[-1].hits)} questions")
    measured = combine(scores)
    say(
        f"all folds: {measured['val_exact_match']:.1%} of {sum(len(score.hits) for score in scores)} questions, 95 %"
        f" interval {measured['val_exact_match_low']:.1%} to {measured['val_exact_match_high']:.1%};"
        " now one adapter on all pictures"
    )
    return train(None, out, on_answers=None, measured=measured)


def combine(scores: Sequence[FoldScore]) -> dict[str, float]:
    """The score over all questions with its interval, and the controls, each fold weighing by its questions."""
    hits = [hit for score in scores for hit in score.hits]
    pictures = [picture for score in scores for picture in score.pictures]
    low, high = interval_by_picture(hits, pictures)
    found = {"val_exact_match": sum(hits) / len(hits), "val_exact_match_low": low, "val_exact_match_high": high}
    for name in _CONTROLS:
        having = [score for score in scores if name in score.controls]
        if having:
            questions = sum(len(score.hits) for score in having)
            found[name] = sum(score.controls[name] * len(score.hits) for score in having) / questions
    return found


def _run_fold(train: Train, fold: str, folder: Path, *, sets: bool) -> Result:
    """Run one fold to its end and keep the score of its last weights beside them."""
    newest: list[tuple[Sequence[Example], Sequence[str]]] = []

    def keep(asked: Sequence[Example], texts: Sequence[str]) -> None:
        newest[:] = [(asked, texts)]

    run = train(fold, folder, on_answers=keep, measured={})
    if run.finished and not newest:  # it was killed between its last validation and its score
        shutil.rmtree(folder)
        run = train(fold, folder, on_answers=keep, measured={})
    if not run.finished:
        return run
    ((asked, texts),) = newest
    hits = [float(exact_match(text, row.answers, sets=sets)) for text, row in zip(texts, asked, strict=True)]
    pictures = [" ".join(image.digest() for image in row.images) for row in asked]
    score = FoldScore(hits, pictures, {name: run.metrics[name] for name in _CONTROLS if name in run.metrics})
    with whole_file(folder / SCORED) as file:
        file.write_text(json.dumps(asdict(score)), encoding="utf-8")
    return run


def _read_score(path: Path) -> FoldScore:
    try:
        return FoldScore(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): remove {path.parent} and run again with --resume") from error
