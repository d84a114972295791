"""The order in which a run sees its answers: rows by picture, micro-batches by tokens, steps by answers.

The plan of an epoch depends on the rows, the recipe and the number of processes alone, so a resumed run goes on exactly
where it stopped and every process of a distributed run knows its share without asking.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from typing import Any

from adapters.data.collate import PackedAnswer, PackedSequence, padded_length, row_length, rows_of
from adapters.data.examples import DataSet, Example, Fault
from adapters.data.lazy import LazySequence, Picked, places_where
from adapters.data.prompts import Prompt, PromptBuilder, Turn
from adapters.data.tokenised import TokenisedPicture, TokenisedPictures, TokenisedQuestion
from adapters.data.views import draw_view, names_a_side
from adapters.tasks import Stage
from qformer.errors import UserError


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

    def micro_batches(self, max_tokens: int, row_tokens: int = 0) -> list[tuple[PackedSequence, ...]]:
        """The sequences, longest first so that little is padding, cut to fit a token budget.

        Args:
            max_tokens: rows by their padded length, at most.
            row_tokens: the longest row that several sequences share, as the batch is collated.
        """
        cut: list[tuple[PackedSequence, ...]] = []
        current: list[tuple[PackedSequence, ...]] = []
        longest = 0
        for row in rows_of(sorted(self.rows, key=len, reverse=True), row_tokens):
            length = padded_length(row_length(row))
            if current and (len(current) + 1) * max(longest, length) > max_tokens:
                cut.append(tuple(chain.from_iterable(current)))
                current, longest = [], 0
            current.append(row)
            longest = max(longest, length)
        return [*cut, tuple(chain.from_iterable(current))] if current else cut


def tokenise(
    data: DataSet, prompts: PromptBuilder, *, max_tokens: int, stages: Sequence[Stage] = ("rationale", "answer")
) -> TokenisedPictures:
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
    found = TokenisedPictures()
    _check_rationales(data, stages)
    ids_of = lru_cache(maxsize=4096)(lambda answer: tuple(prompts.answer_ids(answer)))  # short ones come often
    for example, task, answers in (
        part for row in data.examples for part in _to_learn(row, data.task, stages, prompts)
    ):
        prompt = prompt_for(example, task, prompts)
        counted = tuple(map(ids_of, answers))
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
        said = (turn.text for turn in example.history)
        sided = names_a_side((example.question, example.context, example.rationale, *example.choices, *answers, *said))
        found.add(example.images, prompt.shared, example.turn, questions, sided=sided)
    return found.finished()


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
    faults = list(data.faults)

    def fits(row: Example) -> bool:
        problems = (
            _too_long(prompt_for(example, task, prompts), [prompts.answer_ids(text) for text in answers], max_tokens)
            for example, task, answers in _to_learn(row, data.task, stages, prompts)
        )
        problem = next(filter(None, problems), None)
        if problem is not None:
            faults.append(Fault(row.row, row.where, problem))
        return problem is None

    kept = Picked(data.examples, places_where(data.examples, fits))
    if not kept:
        raise UserError(f"{data.name}: no row is left; the first: {faults[0]}")
    return replace(data, examples=kept, faults=tuple(faults))


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
    if data.task not in ("reason", "mixed"):
        return
    reasons = (
        bool(one.rationale)
        for one in data.examples
        if (one.task or data.task) == "reason" and set(one.stages or stages) != {"direct"}
    )
    if (first := next(reasons, None)) is not None and not (first or any(reasons)):
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
    for stage in example.stages or stages:  # a row without reasons teaches that there are none to give
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


class EpochPlan(LazySequence[Step]):
    """The steps of an epoch, each made when it is asked for; what was drawn takes 12 to 28 bytes an answer.

    Args:
        pictures: what `tokenise` gave.
        rng: draws.
        batch_size: as `plan_epoch` takes it.
        row_tokens: likewise.
        views: likewise.
        world: likewise.
    """

    def __init__(
        self,
        pictures: Sequence[TokenisedPicture],
        rng: random.Random,
        *,
        batch_size: int,
        row_tokens: int,
        views: int,
        world: int,
    ) -> None:
        self._pictures = pictures
        self._picture_of, self._view_of = array("i"), array("i")  # by row
        self._row_starts = array("i", [0])  # of the rows, in the next three
        self._questions, self._answers, self._cuts = array("i"), array("i"), array("i")
        for number, picture in enumerate(pictures):
            for _, view, drawn in _rows(picture, rng, row_tokens, views):
                self._picture_of.append(number)
                self._view_of.append(view)
                for question, answer, cut in drawn:
                    self._questions.append(question)
                    self._answers.append(answer)
                    self._cuts.append(cut)
                self._row_starts.append(len(self._questions))
        self._order = array("i", range(len(self._picture_of)))
        rng.shuffle(self._order)
        self._step_starts = self._cut(batch_size, world)

    def _cut(self, batch_size: int, world: int) -> array[int]:
        """Where in the order each step begins, and the end."""
        starts = array("i", [0])
        waiting = 0
        for place, row in enumerate(self._order):
            if waiting >= batch_size and place - starts[-1] >= world:
                starts.append(place)
                waiting = 0
            waiting += self._row_starts[row + 1] - self._row_starts[row]
        if len(starts) > 1 and (waiting < batch_size or len(self._order) - starts[-1] < world):
            starts.pop()
        starts.append(len(self._order))
        return starts

    def __len__(self) -> int:
        return len(self._step_starts) - 1

    def item(self, index: int) -> Step:
        """Make a step."""
        return Step(tuple(map(self._row, self._order[self._step_starts[index] : self._step_starts[index + 1]])))

    def _row(self, row: int) -> PackedSequence:
        picture, view = self._pictures[self._picture_of[row]], self._view_of[row]
        images = (picture.images[0].seen_as(view),) if view else picture.images
        branches = tuple(
            _branch(picture.questions[self._questions[place]], self._answers[place], self._cuts[place])
            for place in range(self._row_starts[row], self._row_starts[row + 1])
        )
        return PackedSequence(images, picture.shared, branches)


def plan_epoch(
    pictures: Sequence[TokenisedPicture],
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    row_tokens: int,
    views: int = 1,
    world: int = 1,
) -> EpochPlan:
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
    return EpochPlan(pictures, rng, batch_size=batch_size, row_tokens=row_tokens, views=views, world=world)


def plan_validation(pictures: Sequence[TokenisedPicture], *, row_tokens: int) -> Step:
    """All rows once, in order, with the first answer of each question."""
    return Step(tuple(row for picture in pictures for row, _, _ in _rows(picture, None, row_tokens)))


_Drawn = tuple[int, int, int]  # a question of a picture, one of its answers, and where that is cut, or _WHOLE
_WHOLE = -1


def _rows(
    picture: TokenisedPicture, rng: random.Random | None, row_tokens: int, views: int = 1
) -> Iterator[tuple[PackedSequence, int, list[_Drawn]]]:
    """Fill sequences of at most `row_tokens` with a picture's questions; 0 gives each question its own.

    Yields:
        Each sequence, the view it shows, and what was drawn for it.
    """
    places = list(range(len(picture.questions)))
    if rng is not None:
        rng.shuffle(places)
    row: PackedSequence | None = None
    view, drawn = 0, list[_Drawn]()
    for place in places:
        question = picture.questions[place]
        answer, cut = 0, _WHOLE
        if rng is not None:
            answer = rng.choice(range(len(question.answers)))
            if question.prefix_end is not None:
                cut = draw_cut(question.answers[answer], rng)
        branch = _branch(question, answer, cut)
        if row is not None:
            if len(longer := replace(row, packed_answers=(*row.packed_answers, branch))) <= row_tokens:
                row = longer
                drawn.append((place, answer, cut))
                continue
            yield row, view, drawn
        images = picture.images if rng is None else draw_view(picture.images, views, rng, sided=picture.sided)
        row, view, drawn = PackedSequence(images, picture.shared, (branch,)), images[0].view, [(place, answer, cut)]
    if row is not None:
        yield row, view, drawn


def _branch(question: TokenisedQuestion, answer: int, cut: int) -> PackedAnswer:
    """A question with one of its answers, from the cut on."""
    own, tokens = question.own, question.answers[answer]
    if cut != _WHOLE:
        own, tokens = split_prefix(own, tokens, question.prefix_end or 0, cut)
    return PackedAnswer(own, tokens, question.instruction, question.caption)


def draw_cut(answer: Sequence[int], rng: random.Random) -> int:
    """How many of a caption's tokens are given: a word's token and the end at least stay to be learned."""
    return rng.randrange(max(1, len(answer) - 1))


def split_prefix(
    own: tuple[int, ...], answer: tuple[int, ...], closing: int, cut: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Prefix language modelling (BLIP-2, arXiv 2301.12597, section 3.3): a cut through a caption.

    Args:
        own: the prompt after its last image, `closing` end tokens included.
        answer: the caption's tokens, its end token included.
        closing: tokens that close the prompt.
        cut: how many of the caption's tokens are given.

    Returns:
        The prompt with the caption's prefix before its closing tokens, and the rest of the caption.
    """
    place = len(own) - closing
    return own[:place] + answer[:cut] + own[place:], answer[cut:]
