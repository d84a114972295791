"""What a row of data is once it has been read, for training, batches and evaluation alike."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

from adapters.data.images import ImageRef
from qformer.errors import UserError

Task = Literal["vqa", "caption"]


@dataclass(frozen=True)
class Example:
    """One row.

    Args:
        images: the pictures that the row is about, in order.
        question: the question; "" for a caption row, whose prompt is put in later.
        answers: all answers (VQAv2 has ten) or captions; empty where none were asked for.
        where: file and row, for messages.
        id: the row's own id, or its number counted from 1.
        language: the language of the answers ("en" where the row does not say).
    """

    images: tuple[ImageRef, ...]
    question: str
    answers: tuple[str, ...]
    where: str
    id: str
    language: str = "en"


@dataclass(frozen=True)
class DataSet:
    """Rows of one task.

    Args:
        name: the file's name, or the packaged set's.
        task: "vqa" or "caption".
        examples: the good rows in the order of the file.
        fingerprint: "sha256:…" over the rows and their pictures' names and sizes.
        terms: the licence of a packaged set; None for a user's file.
        skipped: one line for each bad row that was left out.
    """

    name: str
    task: Task
    examples: tuple[Example, ...]
    fingerprint: str
    terms: str | None = None
    skipped: tuple[str, ...] = ()


def split_by_image(dataset: DataSet, fraction: float, seed: int) -> tuple[DataSet, DataSet]:
    """Hold out whole pictures: no picture of the second part is in the first.

    Pictures are told apart by their bytes, so a copy under another name stays with its twin; each file is
    read once for that. The choice depends on `seed` and the pictures only, not on the order of the rows.

    Args:
        dataset: the rows to split.
        fraction: the share of the pictures to hold out, between 0 and 1; at least one is.
        seed: another seed holds out other pictures.

    Returns:
        The rows to train on and the rows held out, each in its old order. Skipped rows stay with the first.

    Raises:
        UserError: the fraction is not between 0 and 1, or there are fewer than two pictures.
    """
    if not 0 < fraction < 1:
        raise UserError(f"the held-out fraction is {fraction}: give a number between 0 and 1, such as 0.05")
    groups = _group_by_image(dataset.examples)
    # A hash gives each picture its own lot: the order of the rows does not matter, nor Python's version.
    lots = sorted(set(groups), key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())
    if len(lots) < 2:
        raise UserError(f"{dataset.name} has {len(lots)} picture(s): holding some out needs at least 2")
    held_out = set(lots[: min(max(1, round(fraction * len(lots))), len(lots) - 1)])

    def part(name: str, keep_held_out: bool) -> DataSet:
        rows = zip(dataset.examples, groups, strict=True)
        origin = f"{dataset.fingerprint}:{name}:{fraction}:{seed}"
        return replace(
            dataset,
            name=f"{dataset.name} ({name})",
            examples=tuple(example for example, group in rows if (group in held_out) == keep_held_out),
            fingerprint="sha256:" + hashlib.sha256(origin.encode()).hexdigest(),
            skipped=() if keep_held_out else dataset.skipped,
        )

    return part("train", False), part("val", True)


def _group_by_image(examples: Iterable[Example]) -> list[str]:
    """Return a group's name for each row; rows that share a picture, if only through other rows, share it."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    rows = [sorted({image.digest() for image in example.images}) for example in examples]
    for first, *others in rows:
        for other in others:
            low, high = sorted((root(first), root(other)))  # the least name leads, whatever the order of the rows
            parent[high] = low
    return [root(row[0]) for row in rows]
