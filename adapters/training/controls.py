"""What a run's validation is compared with: no picture, no model, and no bridge."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from adapters.data.answers import normalise
from adapters.data.examples import Example
from adapters.data.image_ref import blank_image
from adapters.data.tokenised import TokenisedPicture
from adapters.evaluation.intervals import interval_by_picture
from adapters.evaluation.vqa import exact_match, score
from adapters.inference.answering import answer_examples, reply_to_examples
from adapters.loading.assembly import Assembly
from adapters.training.reader_fit import probe_answers
from adapters.training.sharing import shared
from qformer.decoding import Decoding

SHORT = Decoding(max_new_tokens=10)  # how validation answers questions: greedy

OnAnswers = Callable[[Sequence[Example], Sequence[str]], None]


@dataclass(frozen=True)
class ValidationAnswers:
    """What a validation answered, row by row.

    Attributes:
        asked: the questions.
        texts: the answers.
        confidences: of the answers, from 0 to 1.
        blank: the answers on blank pictures; none if they were not asked for.
    """

    asked: Sequence[Example]
    texts: Sequence[str]
    confidences: Sequence[float]
    blank: Sequence[str]


_LEARNED_BY_HEART = 3.0  # times the training loss


def fixed_controls(
    assembly: Assembly,
    pictures: Sequence[TokenisedPicture],
    train: Sequence[Example],
    asked: Sequence[Example],
    *,
    sets: bool = False,
) -> dict[str, float]:
    """Exact match of two answerers that a run does not change.

    Args:
        assembly: the frozen towers are used.
        pictures: tokenised training data.
        train: the same as rows.
        asked: validation questions.
        sets: as in `adapters.evaluation.vqa.exact_match`.

    Returns:
        "val_commonest_answer": each question's commonest training answer, or the commonest of all; and if the data
        suit it, "val_linear_probe": ridge regression on pooled features (`probe_answers`). Empty without questions.
    """
    if not asked:
        return {}
    guesses = commonest_answers(train, [example.question for example in asked])
    found = {"val_commonest_answer": score(guesses, [row.answers for row in asked], sets=sets)["exact_match"]}
    single = [example for example in asked if len(example.images) == 1]
    probed = probe_answers(assembly, pictures, [(one.images[0], one.question) for one in single]) if single else None
    if probed is not None:
        found["val_linear_probe"] = score(probed, [row.answers for row in single], sets=sets)["exact_match"]
    return found


def commonest_answers(train: Sequence[Example], questions: Sequence[str]) -> list[str]:
    """The commonest training answer to each question; to a question that is new, the commonest of all."""
    wanted = [normalise(question) for question in questions]
    by_question: dict[str, Counter[str]] = {question: Counter() for question in wanted}
    overall: Counter[str] = Counter()
    for example in train:
        answers = [normalise(answer) for answer in example.answers]
        if (counted := by_question.get(normalise(example.question))) is not None:
            counted.update(answers)
        overall.update(answers)
    return [(by_question[question] or overall or Counter([""])).most_common(1)[0][0] for question in wanted]


def validate_answers(
    assembly: Assembly,
    asked: Sequence[Example],
    on_answers: OnAnswers | None = None,
    *,
    sets: bool = False,
    keep: Callable[[ValidationAnswers], None] | None = None,
) -> dict[str, float]:
    """Exact match of greedy answers, its 95 % interval by picture, and exact match on blank pictures.

    Args:
        assembly: what answers.
        asked: validation questions.
        on_answers: called with them and the answers.
        sets: as in `adapters.evaluation.vqa.exact_match`.
        keep: called with all that was answered.

    Returns:
        "val_exact_match", "val_exact_match_low", "val_exact_match_high" and "val_blank_images", as fractions.
    """
    answers = [example.answers for example in asked]
    answer = partial(answer_examples, assembly, task="vqa", decoding=SHORT)
    said = shared(
        asked,
        lambda part: [(one.text, one.confidence) for one in reply_to_examples(assembly, part, "vqa", decoding=SHORT)],
    )
    texts = [text for text, _ in said]
    if on_answers is not None:
        on_answers(asked, texts)
    hits = [exact_match(text, right, sets=sets) for text, right in zip(texts, answers, strict=True)]
    found = {"val_exact_match": sum(hits) / len(hits)}
    pictures = [tuple(image.digest() for image in example.images) for example in asked]
    found["val_exact_match_low"], found["val_exact_match_high"] = interval_by_picture(hits, pictures)
    blank = blank_image()
    unseen = [replace(example, images=(blank,) * len(example.images)) for example in asked]
    blind = shared(unseen, answer)
    if keep is not None:
        keep(ValidationAnswers(asked, texts, [confidence for _, confidence in said], blind))
    found["val_blank_images"] = score(blind, answers, sets=sets)["exact_match"]
    return found


def describe_controls(metrics: Mapping[str, float], *, step: int, total: int, stopped_early: bool) -> list[str]:
    """The end of a run in words: a table of the best validation beside its controls, and what to make of it.

    Args:
        metrics: of the best validation.
        step: the step of the best validation.
        total: steps of the run as planned.
        stopped_early: whether patience ran out before the last step.
    """
    if "val_exact_match" not in metrics:
        return []
    interval = ""
    if "val_exact_match_low" in metrics:
        interval = f"   95 % interval {metrics['val_exact_match_low']:.1%} to {metrics['val_exact_match_high']:.1%}"
    lines = [f"exact answers to the validation questions, step {step} of {total}"]
    rows = (
        ("this adapter", "val_exact_match", interval),
        ("the same on blank pictures", "val_blank_images", ""),
        ("each question's commonest training answer", "val_commonest_answer", ""),
        ("a linear probe on the pooled features", "val_linear_probe", ""),
    )
    lines += [f"  {name:42} {metrics[key]:7.1%}{more}" for name, key, more in rows if key in metrics]
    if stopped_early:
        lines.append("stopped early: the last validations were no better (train.patience)")
    train_loss, val_loss = metrics.get("train_loss"), metrics.get("val_loss")
    if train_loss is not None and val_loss is not None and val_loss > _LEARNED_BY_HEART * max(train_loss, 0.05):
        lines.append(
            f"it learns by heart: the loss is {train_loss:.2f} in training and {val_loss:.2f} on the validation"
            " questions; more pictures help, or fewer epochs"
        )
    exact = metrics["val_exact_match"]
    if exact < metrics.get("val_linear_probe", 0.0):
        lines.append(
            "below the linear probe: the features hold more than the adapter says; try more epochs"
            " (--set train.epochs=8), or --set bridge.reader=answers if it is another"
        )
    if exact <= max(metrics.get("val_blank_images", 0.0), metrics.get("val_commonest_answer", 0.0)):
        lines.append(
            "no better than without the pictures: it learned the questions alone; check that the answers can be seen in"
            " the pictures, or try another image encoder (querybridge models)"
        )
    return lines
