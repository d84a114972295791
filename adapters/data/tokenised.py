"""Tokenised questions by picture, on disk: what an epoch is planned from."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from adapters.data.image_ref import ImageRef
from adapters.data.lazy import LazySequence, Picked
from adapters.data.row_store import RecordFile


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
    questions: Sequence[TokenisedQuestion]
    sided: bool = False


class _StoredQuestions(LazySequence[TokenisedQuestion]):
    """Tokenised questions in the order of the rows."""

    def __init__(self) -> None:
        self._records = RecordFile()

    def __len__(self) -> int:
        return len(self._records)

    def append(self, question: TokenisedQuestion) -> None:
        self._records.append(
            (question.own, question.answers, question.instruction, question.prefix_end, question.caption)
        )

    def records(self) -> Iterator[object]:
        """Each question as it is kept."""
        return (self._records.read(index) for index in range(len(self)))

    def append_record(self, written: str) -> None:
        """Keep one that `records` gave, as JSON."""
        self._records.append_written(written.encode())

    def item(self, index: int) -> TokenisedQuestion:
        own, answers, instruction, prefix_end, caption = self._records.read(index)
        return TokenisedQuestion(tuple(own), tuple(map(tuple, answers)), instruction, prefix_end, caption)


class TokenisedPictures(LazySequence[TokenisedPicture]):
    """Questions grouped by picture, in the order in which pictures first appear.

    In memory a question takes 12 bytes, and a picture its reference and what the prompts of its questions begin with.
    """

    def __init__(self) -> None:
        self._questions = _StoredQuestions()
        self._groups: dict[bytes, int] = {}
        self._heads: list[tuple[tuple[ImageRef, ...], tuple[int, ...]]] = []
        self._sided: set[int] = set()
        self._shared: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._group_of = array("i")  # by question
        self._order = np.zeros(0, dtype=np.int32)  # questions by group
        self._starts = np.zeros(1, dtype=np.int32)  # of the groups, in `_order`

    def add(
        self,
        images: tuple[ImageRef, ...],
        shared: tuple[int, ...],
        turn: int,
        questions: Iterable[TokenisedQuestion],
        *,
        sided: bool,
    ) -> None:
        """Add the questions of a row.

        Args:
            images: what they are about.
            shared: what the prompt begins with.
            turn: which pass over the file it is; each pass has groups of its own.
            questions: the row's.
            sided: whether what is said names a side.

        Raises:
            UserError: there is no room.
        """
        told_apart = repr(([image.digest() for image in images], shared, turn))
        key = hashlib.blake2b(told_apart.encode(), digest_size=16).digest()
        group = self._groups.setdefault(key, len(self._heads))
        if group == len(self._heads):
            self._heads.append((images, self._shared.setdefault(shared, shared)))
        if sided:
            self._sided.add(group)
        for question in questions:
            self._questions.append(question)
            self._group_of.append(group)

    def finished(self) -> TokenisedPictures:
        """Group what was added; nothing is added after it."""
        groups = np.asarray(self._group_of, dtype=np.int32)
        self._order = np.argsort(groups, kind="stable").astype(np.int32)
        counts = np.bincount(groups, minlength=len(self._heads))
        self._starts = np.concatenate(([0], np.cumsum(counts))).astype(np.int32)
        self._groups, self._group_of = {}, array("i")
        return self

    def stored(self) -> bytes:
        """All of it but the pictures themselves, which go by their digests; `restored` takes it."""
        shared = {tokens: place for place, tokens in enumerate(self._shared)}
        rest = {
            "heads": [([image.digest() for image in images], shared[tokens]) for images, tokens in self._heads],
            "shared": list(shared),
            "sided": sorted(self._sided),
            "order": self._order.tolist(),
            "starts": self._starts.tolist(),
        }
        lines = [json.dumps(rest, separators=(",", ":")), *map(json.dumps, self._questions.records())]
        return "\n".join(lines).encode()

    @classmethod
    def restored(cls, content: bytes, pictures: Mapping[str, ImageRef]) -> TokenisedPictures:
        """What `stored` gave.

        Args:
            content: of `stored`.
            pictures: by digest.

        Raises:
            KeyError: a picture is missing.
        """
        first, *records = content.decode().split("\n")
        rest = json.loads(first)
        made = cls()
        shared = [tuple(tokens) for tokens in rest["shared"]]
        made._shared = {tokens: tokens for tokens in shared}
        made._heads = [(tuple(pictures[one] for one in digests), shared[place]) for digests, place in rest["heads"]]
        made._sided = set(rest["sided"])
        made._order = np.asarray(rest["order"], dtype=np.int32)
        made._starts = np.asarray(rest["starts"], dtype=np.int32)
        for record in records:
            made._questions.append_record(record)
        return made

    def __len__(self) -> int:
        return len(self._heads)

    def item(self, index: int) -> TokenisedPicture:
        """The picture of a number; its questions are read when they are asked for."""
        images, shared = self._heads[index]
        questions = Picked(self._questions, self._order[self._starts[index] : self._starts[index + 1]])
        return TokenisedPicture(images, shared, questions, index in self._sided)
