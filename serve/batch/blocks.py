"""A block of rows, answered: always in the same parts, whatever of it was done before, so that answers are the same.

What is answered together may change an answer in its last digits. So blocks begin at fixed rows, a predictor plans a
whole block, and of its parts those are answered that still hold a row to answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from adapters.data.examples import Example
from qformer.errors import UserError
from serve.batch.asking import Asking, Facts, Fields, Predictor


@dataclass(frozen=True)
class Block:
    """Rows that are planned together.

    Args:
        number: of the block, in the order of the rows.
        examples: the good rows, each with its number among all that is asked.
        waiting: the numbers of those that have no answer yet.
    """

    number: int
    examples: tuple[tuple[int, Example], ...]
    waiting: frozenset[int]


@dataclass(frozen=True)
class Piece:
    """A part of a block's answers, by the rows' numbers: a predictor's fields, or {"error": what is wrong}."""

    block: int
    found: dict[int, Fields]
    last: bool


@runtime_checkable
class Answerer(Protocol):
    """Whatever answers blocks: this process, several, or a cluster."""

    def facts(self, asking: Asking) -> Facts:
        """What answers; raises UserError if it cannot do what is asked."""
        ...

    def run(self, blocks: Iterable[Block], asking: Asking) -> Iterator[Piece]:
        """Pieces of the blocks' answers, in any order. Blocks are taken as they are needed, a few ahead."""
        ...


def answer_block(predictor: Predictor, block: Block, asking: Asking) -> Iterator[dict[int, Fields]]:
    """Answer the rows of a block that wait, part by part.

    Args:
        predictor: what answers.
        block: the rows.
        asking: what is wanted of them.

    Raises:
        UserError: something went wrong that no row is to blame for, such as a full disk.
    """
    good = list(block.examples)
    try:
        predictor.prepare([example for _, example in good])
        plan = predictor.plan([example for _, example in good], asking)
    except UserError:
        blamed = _blamed(predictor, good, asking)
        if not blamed:
            raise
        if faults := {number: {"error": text} for number, text in blamed.items() if number in block.waiting}:
            yield dict(faults)
        good = [(number, example) for number, example in good if number not in blamed]
        predictor.prepare([example for _, example in good])
        plan = predictor.plan([example for _, example in good], asking)
    for part in plan:
        numbers = [good[place][0] for place in part]
        if block.waiting.isdisjoint(numbers):
            continue
        answers = predictor.answer([good[place][1] for place in part], asking)
        yield {number: found for number, found in zip(numbers, answers, strict=True) if number in block.waiting}


def _blamed(predictor: Predictor, rows: Sequence[tuple[int, Example]], asking: Asking) -> dict[int, str]:
    """The rows that cannot be answered, for themselves, each with what is wrong with it."""
    faults: dict[int, str] = {}
    for number, example in rows:
        try:
            predictor.check(example, asking)
        except UserError as error:
            faults[number] = str(error)
    return faults


class OneProcess:
    """Answers in this process; while one block is answered, the pictures of the next are read, decoded and encoded.

    Args:
        make: gives the predictor; called once, when the input has been found good.
    """

    def __init__(self, make: Callable[[], Predictor]) -> None:
        self._make = make
        self._predictor: Predictor | None = None

    def facts(self, asking: Asking) -> Facts:
        """What answers; raises UserError if it cannot do what is asked."""
        return self._loaded().facts(asking)

    def run(self, blocks: Iterable[Block], asking: Asking) -> Iterator[Piece]:
        """Answer blocks in their order."""
        predictor = self._loaded()
        for block in prepared_ahead(blocks, predictor.prepare):
            yield from pieces(predictor, block, asking)

    def _loaded(self) -> Predictor:
        self._predictor = self._predictor or self._make()
        return self._predictor


def pieces(predictor: Predictor, block: Block, asking: Asking) -> Iterator[Piece]:
    """The answers of a block as they come; the last piece is empty."""
    for found in answer_block(predictor, block, asking):
        yield Piece(block.number, found, last=False)
    yield Piece(block.number, {}, last=True)


def prepared_ahead(blocks: Iterable[Block], prepare: Callable[[Sequence[Example]], None]) -> Iterator[Block]:
    """Yield blocks in their order; while one is worked on, the next is prepared in a thread.

    A fault of the preparation is not told here: whoever prepares the block again will meet it.
    """

    def quietly(block: Block) -> None:
        with suppress(UserError):
            prepare([example for _, example in block.examples])

    pool = ThreadPoolExecutor(1, thread_name_prefix="prepare")
    ahead: tuple[Block, Future[None] | None] | None = None
    try:
        for block in blocks:
            now, ahead = ahead, (block, pool.submit(quietly, block) if ahead is not None else None)
            if now is not None:
                if now[1] is not None:
                    now[1].result()
                yield now[0]
        if ahead is not None:
            if ahead[1] is not None:
                ahead[1].result()
            yield ahead[0]
    finally:
        pool.shutdown(cancel_futures=True)
