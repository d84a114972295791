"""The order in which a run sees its answers: rows by picture, micro-batches by tokens, steps by answers.

The plan of an epoch depends on the rows, the recipe and the number of processes alone, so a resumed run goes on exactly
where it stopped and every process of a distributed run knows its share without asking.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapters.data.collate import PackedAnswer, PackedSequence, padded_length
from adapters.data.examples import DataSet, Example, Fault
from adapters.data.image_ref import ImageRef
from adapters.data.prompts import Prompt, PromptBuilder, Turn
from adapters.data.views import draw_view, names_a_side
from adapters.tasks import Stage
from qformer.errors import UserError


@dataclass(frozen=True)
class TokenisedQuestion:
    """One question with its possible answers, tokenised.

    Attributes:
        own: the prompt after its last image.
        answers: with their end tokens; an answer is there as often as people gave it.
        instruction: what an instruction-aware bridge reads: the question, or the request for a caption.
        prefix_end: None; or, for a caption to an encoder-decoder, how many of `own`'s last tokens close the prompt:
            each epoch a chance prefix of the caption goes in front of them, to the encoder; the rest is learned.
        caption: the language of the answers, if they are captions.
    """

    own: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]
    instruction: str
    prefix_end: int | None = None
    caption: str | None = None


@dataclass(frozen=True)
class TokenisedPicture:
    """All questions that share their pictures and the first part of the prompt; `sided` if one says left or right."""

    images: tuple[ImageRef, ...]
    shared: tuple[int, ...]
    questions: tuple[TokenisedQuestion, ...]
    sided: bool = False


@dataclass(frozen=True)
class Step:
    """One optimiser step."""

    rows: tuple[PackedSequence, ...]

    @property
    def supervised(self) -> int:
        """Tokens the loss sums over, in all rows: every process divides by the same number."""
        return sum(len(branch.answer) for row in self.rows for branch in row.packed_answers)

    @property
    def answers(self) -> int:
        """Answers learned from in this step."""
        return sum(len(row.packed_answers) for row in self.rows)

    def share(self, rank: int, world: int) -> Step:
        """One process's part: alike in length to the others'."""
        return Step(tuple(sorted(self.rows, key=len, reverse=True)[rank::world]))

    def micro_batches(self, max_tokens: int) -> list[tuple[PackedSequence, ...]]:
        """The rows, longest first so that little is padding, cut to fit a token budget."""
        cut: list[tuple[PackedSequence, ...]] = []
        current: list[PackedSequence] = []
        for row in sorted(self.rows, key=len, reverse=True):
            if current and (len(current) + 1) * padded_length(len(current[0])) > max_tokens:
                cut.append(tuple(current))
                current = []
            current.append(row)
        return [*cut, tuple(current)] if current else cut


def tokenise(
    data: DataSet, prompts: PromptBuilder, *, max_tokens: int, stages: Sequence[Stage] = ("rationale", "answer")
) -> list[TokenisedPicture]:
    """Turn a data set into tokenised questions, grouped by picture in the order of first appearance.

    Args:
        data: the rows.
        prompts: words and tokenises.
        max_tokens: the longest prompt with its answer.
        stages: of a row with reasons; each is a question about its picture: what the reasons are, what the answer is
            with the reasons given, and what it is asked directly.

    Raises:
        UserError: an example has no answer, or is longer than `max_tokens`; or no row has the reasons to learn.
    """
    grouped: dict[tuple[object, ...], tuple[tuple[ImageRef, ...], tuple[int, ...], list[TokenisedQuestion]]] = {}
    sided: set[tuple[object, ...]] = set()
    _check_rationales(data, stages)
    for example, task, answers in (
        part for row in data.examples for part in _to_learn(row, data.task, stages, prompts)
    ):
        prompt = prompt_for(example, task, prompts)
        counted = tuple(tuple(prompts.answer_ids(answer)) for answer in answers)
        if too_long := _too_long(prompt, counted, max_tokens):
            raise UserError(f"{example.where}: {too_long}")
        if task == "caption":  # every caption is learned from
            end = prompts.closing_tokens if prompts.is_encoder_decoder else None
            language = example.language
            questions = [
                TokenisedQuestion(prompt.own, (answer,), prompt.instruction, end, language) for answer in counted
            ]
        else:  # one of the answers people gave is drawn each epoch, so each counts by its share
            questions = [TokenisedQuestion(prompt.own, counted, prompt.instruction)]
        key = (*(image.digest() for image in example.images), prompt.shared, example.turn)
        grouped.setdefault(key, (example.images, prompt.shared, []))[2].extend(questions)
        said = (turn.text for turn in example.history)
        if names_a_side((example.question, example.context, example.rationale, *example.choices, *answers, *said)):
            sided.add(key)
    return [
        TokenisedPicture(images, shared, tuple(questions), key in sided)
        for key, (images, shared, questions) in grouped.items()
    ]


def leave_out_long(data: DataSet, prompts: PromptBuilder, *, max_tokens: int, stages: Sequence[Stage]) -> DataSet:
    """The data set without the rows that `tokenise` would refuse for their length; they join its faults.

    Args:
        data: the rows.
        prompts: words and tokenises.
        max_tokens: the longest prompt with its answer.
        stages: of a row with reasons, as `tokenise` takes them.

    Raises:
        UserError: no row is left.
    """
    kept, faults = [], list(data.faults)
    for row in data.examples:
        problems = (
            _too_long(prompt_for(example, task, prompts), [prompts.answer_ids(text) for text in answers], max_tokens)
            for example, task, answers in _to_learn(row, data.task, stages, prompts)
        )
        problem = next(filter(None, problems), None)
        if problem is None:
            kept.append(row)
        else:
            faults.append(Fault(row.row, row.where, problem))
    if not kept:
        raise UserError(f"{data.name}: no row is left; the first: {faults[0]}")
    return replace(data, examples=tuple(kept), faults=tuple(faults))


def _too_long(prompt: Prompt, answers: Sequence[Sequence[int]], max_tokens: int) -> str | None:
    """What is wrong with a prompt that is too long with its longest answer; None if it is not."""
    longest = len(prompt.ids) + max(len(answer) for answer in answers)
    if longest <= max_tokens:
        return None
    return (
        f"prompt and answer are {longest} tokens, more than train.micro_batch_tokens ({max_tokens}); shorten the text"
        f" or raise it with --set train.micro_batch_tokens={longest}"
    )


def _check_rationales(data: DataSet, stages: Sequence[Stage]) -> None:
    reasons = [example for example in data.examples if (example.task or data.task) == "reason"]
    if reasons and set(stages) != {"direct"} and not any(example.rationale for example in reasons):
        raise UserError(
            f"{data.name}: no row has a rationale to learn; fill them in, or learn answers alone with"
            " --set reason.stages=[direct]"
        )


def _to_learn(
    example: Example, task: str, stages: Sequence[Stage], prompts: PromptBuilder
) -> Iterator[tuple[Example, str, Sequence[str]]]:
    """What a row teaches: what is asked, as which task or stage, and what is answered."""
    task = example.task or task
    if not example.answers:
        raise UserError(f"{example.where}: there is no answer to learn; add one, or leave the row out")
    if task != "reason":
        yield example, task, example.answers
        return
    asked, answers = replace(example, task=None), [prompts.choice(text, example.choices) for text in example.answers]
    for stage in stages:  # a row without reasons teaches that there are none to give
        if stage == "rationale":
            yield asked, stage, [example.rationale]
        else:
            yield replace(asked, rationale="") if stage == "direct" else asked, "answer", answers


def prompt_for(example: Example, task: str, prompts: PromptBuilder) -> Prompt:
    """The prompt of an example: its question, or the request for a caption in its language.

    A question in a conversation is asked as the page's chat and the API ask it, with all that was said before.

    Args:
        example: what is asked; its own task counts if it has one.
        task: of the examples that have none: "vqa" or "caption"; or a stage of reasoning, "rationale" (which "reason"
            begins with) or "answer", for which the example's rationale is given if it has one.
        prompts: words and tokenises.
    """
    task = example.task or task
    if task == "caption":
        return prompts.caption(example.language, len(example.images), where=example.where)
    if example.history:
        own = example.images[sum(len(turn.images) for turn in example.history) :]
        try:
            return prompts.chat([*example.history, Turn("user", example.question, own)])
        except UserError as error:
            raise UserError(f"{example.where}: {error}") from error
    asked: Any = {"context": example.context, "choices": example.choices, "where": example.where}
    if task == "vqa":
        return prompts.vqa(example.question, len(example.images), **asked)
    if task == "answer":
        return prompts.answer(example.question, len(example.images), rationale=example.rationale, **asked)
    return prompts.rationale(example.question, len(example.images), **asked)


def plan_epoch(
    pictures: Sequence[TokenisedPicture],
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    row_tokens: int,
    views: int = 1,
    world: int = 1,
) -> list[Step]:
    """Shuffle an epoch and cut it into steps of at least `batch_size` answers; a row is never split over steps.

    Args:
        pictures: what `tokenise` gave.
        seed: of the whole run.
        epoch: 0, 1, 2, …
        batch_size: answers a step. What is left at the end joins the last step.
        row_tokens: a picture's questions share sequences up to this length; 0 gives each question its own.
        views: of each picture; one is drawn for each sequence.
        world: processes; a step has at least a row for each.
    """
    rng = random.Random(f"{seed}:{epoch}")
    rows = [row for picture in pictures for row in _rows(picture, rng, row_tokens, views)]
    rng.shuffle(rows)
    steps: list[list[PackedSequence]] = [[]]
    waiting = 0
    for row in rows:
        if waiting >= batch_size and len(steps[-1]) >= world:
            steps.append([])
            waiting = 0
        steps[-1].append(row)
        waiting += len(row.packed_answers)
    if len(steps) > 1 and (waiting < batch_size or len(steps[-1]) < world):
        rest = steps.pop()
        steps[-1] += rest
    return [Step(tuple(rows)) for rows in steps]


def plan_validation(pictures: Sequence[TokenisedPicture], *, row_tokens: int) -> Step:
    """All rows once, in order, with the first answer of each question."""
    return Step(tuple(row for picture in pictures for row in _rows(picture, None, row_tokens)))


def _rows(
    picture: TokenisedPicture, rng: random.Random | None, row_tokens: int, views: int = 1
) -> list[PackedSequence]:
    """Fill sequences of at most `row_tokens` with a picture's questions; 0 gives each question its own."""
    questions = list(picture.questions)
    if rng is not None:
        rng.shuffle(questions)
    rows: list[PackedSequence] = []
    for question in questions:
        answer = rng.choice(question.answers) if rng is not None else question.answers[0]
        own = question.own
        if rng is not None and question.prefix_end is not None:
            own, answer = split_prefix(own, answer, question.prefix_end, rng)
        branch = PackedAnswer(own, answer, question.instruction, question.caption)
        if rows and len(longer := replace(rows[-1], packed_answers=(*rows[-1].packed_answers, branch))) <= row_tokens:
            rows[-1] = longer
        else:
            images = picture.images if rng is None else draw_view(picture.images, views, rng, sided=picture.sided)
            rows.append(PackedSequence(images, picture.shared, (branch,)))
    return rows


def split_prefix(
    own: tuple[int, ...], answer: tuple[int, ...], closing: int, rng: random.Random
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prefix language modelling (BLIP-2, arXiv 2301.12597, section 3.3): a chance cut through a caption.

    Args:
        own: the prompt after its last image, `closing` end tokens included.
        answer: the caption's tokens, its end token included.
        closing: tokens that close the prompt.
        rng: draws the cut; at least a word's token and the end stay to be learned.

    Returns:
        The prompt with the caption's prefix before its closing tokens, and the rest of the caption.
    """
    cut = rng.randrange(max(1, len(answer) - 1))
    place = len(own) - closing
    return own[:place] + answer[:cut] + own[place:], answer[cut:]
