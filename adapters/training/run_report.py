"""The page that a run leaves beside its metrics: its validation answers scored, compared with controls, and shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters.data.examples import Example, sample_evenly
from adapters.evaluation.breakdown import break_down
from adapters.evaluation.captions import cider_of_each, score_captions
from adapters.evaluation.intervals import with_interval
from adapters.evaluation.report import Answered, Report, save_report
from adapters.evaluation.short_answers import mean, pictures_of, score_short_answers
from adapters.inference.answering import reply_to_examples
from adapters.loading.assembly import Assembly
from adapters.training.checkpoint import RunState
from adapters.training.controls import SHORT, ValidationAnswers, commonest_answers
from adapters.training.setup import Opened
from qformer.decoding import Decoding

NAME = "report.html"
MOST_ROWS = 5000
"""Answers that a page is made of at most, evenly over the validation rows."""
MOST_CAPTIONS = 64
"""Pictures that captions are written of for a page, which validation does not do."""
_CAPTIONED = Decoding(max_new_tokens=40)


@dataclass(frozen=True)
class _Kept:
    step: int
    answers: ValidationAnswers


class RunReport:
    """Keeps what the best validation answered, and makes the page of it when the run is finished.

    Args:
        opened: the run.
        assembly: what is trained; it is asked only if no validation of this sitting has its answers.
    """

    def __init__(self, opened: Opened, assembly: Assembly) -> None:
        self._opened, self._assembly = opened, assembly
        self._newest: ValidationAnswers | None = None
        self._kept: _Kept | None = None

    def take(self, answers: ValidationAnswers) -> None:
        """Take a validation's answers."""
        self._newest = answers

    def validated(self, position: RunState) -> None:
        """Keep the newest answers if they are the best weights', or if no others are known."""
        if self._newest is not None and (self._kept is None or position.best_step == position.step):
            self._kept = _Kept(position.step, self._newest)

    def write(self, position: RunState, controls: Mapping[str, float]) -> Path | None:
        """Write the page into the run's folder; None if there is nothing to show.

        That is so without validation rows, of reasons alone, and of a run that was finished before.

        Args:
            position: where the run ended.
            controls: what the run does not change, as `adapters.training.controls.fixed_controls` returns it.

        Raises:
            UserError: it cannot be written.
        """
        recipe, out = self._opened.recipe, self._opened.options.out / NAME
        if self._newest is None and out.exists():
            return None  # a run that was finished before has nothing new to say
        rows = self._opened.val.examples
        asked = [row for row in rows if (row.task or recipe.task) == "vqa"] if self._kept is None else []
        if self._kept is not None or asked:
            kept = self._kept or _Kept(position.step, self._ask(sample_evenly(asked, MOST_ROWS)))
            measure, step = "exact_match", kept.step
            scores, answered = self._score(kept.answers)
        else:
            captioned = [row for row in rows if (row.task or recipe.task) == "caption"]
            if not captioned:
                return None
            measure, step = "CIDEr", position.step
            scores, answered = self._caption(sample_evenly(captioned, MOST_CAPTIONS))
        if "val_linear_probe" in controls:
            probe = f"{controls['val_linear_probe']:.1%} exact answers, on all validation rows"
        else:
            probe = "not fitted"
        facts = [
            ("run", str(self._opened.options.out)),
            ("validation data", self._opened.val.name),
            ("rows", f"{len(answered):,} of {len(rows):,}"),
            ("weights", f"of step {step}" + (", the best" if step == position.best_step else ", not the best")),
            (
                "decoding",
                f"greedy, {(SHORT if measure == 'exact_match' else _CAPTIONED).max_new_tokens} tokens at most",
            ),
            ("answers compared", "as sets" if recipe.data.match == "set" else "exactly"),
            *([("linear probe on the frozen features", probe)] if measure == "exact_match" else []),
        ]
        title = f"{out.parent.resolve().name}: validation"
        save_report(Report(title, facts, measure, scores, answered, sets=recipe.data.match == "set"), out)
        return out

    def _score(self, answers: ValidationAnswers) -> tuple[dict[str, Any], list[Answered]]:
        chosen = sample_evenly(range(len(answers.asked)), MOST_ROWS)
        examples = [answers.asked[place] for place in chosen]
        texts = [answers.texts[place] for place in chosen]
        blank = {"blank": [answers.blank[place] for place in chosen]} if answers.blank else {}
        sets = self._opened.recipe.data.match == "set"
        scores, answered = score_short_answers(
            examples,
            texts,
            [answers.confidences[place] for place in chosen],
            guesses=commonest_answers(self._opened.train.examples, [row.question for row in examples]),
            sets=sets,
            controls=blank,
        )
        return scores | break_down(texts, examples, sets=sets), answered

    def _ask(self, asked: Sequence[Example]) -> ValidationAnswers:
        said = reply_to_examples(self._assembly, asked, "vqa", decoding=SHORT)
        return ValidationAnswers(asked, [one.text for one in said], [one.confidence for one in said], [])

    def _caption(self, examples: Sequence[Example]) -> tuple[dict[str, Any], list[Answered]]:
        examples = [row for row in examples if row.language == examples[0].language]
        said = reply_to_examples(self._assembly, examples, "caption", decoding=_CAPTIONED)
        texts, right = [one.text for one in said], [row.answers for row in examples]
        language = examples[0].language
        each = cider_of_each(texts, right, language=language)
        scores = {
            **score_captions(texts, right, language=language),
            **with_interval("CIDEr", each, pictures_of(examples)),
        }
        confidences = [one.confidence for one in said]
        scores["confidence"] = mean(confidences)
        return scores, [Answered(*row) for row in zip(examples, texts, confidences, each, strict=True)]
