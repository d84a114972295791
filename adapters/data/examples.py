"""What a row of data is once it has been read, for training, batches and evaluation alike."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import TypeVar

import numpy as np

from adapters.data.image_ref import ImageRef
from adapters.data.lazy import Joined, Mapped, Picked
from adapters.data.prompts import Turn
from adapters.tasks import Mixed, Stage, Task
from qformer.errors import UserError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Example:
    """One row.

    Args:
        images: the pictures that the row is about, in order.
        question: the question; "" for a caption row, whose prompt is put in later.
        answers: all answers (VQAv2 has ten) or captions; empty if none were asked for.
        where: file and row, for messages.
        id: the row's own id, or its number counted from 1.
        language: the language of the answers ("en" if the row does not say).
        row: the row's number in its file, counted from 1; 0 if it comes from none.
        task: set if rows of several tasks are learned from together; else the data set's.
        context: text that is given with the question besides the picture; "" if there is none.
        choices: what may be answered to the question; empty if anything may.
        rationale: of a row with reasons: the reasons for the answer; "" if there are none.
        kind: what kind of question it is, if the row says so.
        stages: of such a row: what it teaches, if not what the recipe says.
        steps: of such a row: how many steps its reasoning has, if it says so.
        turn: which of an epoch's passes over its file this is, counted from 0.
        history: of a question in a conversation: the turns before it, the system's first. Their pictures come first in
            `images`, and those of the question itself last.
    """

    images: tuple[ImageRef, ...]
    question: str
    answers: tuple[str, ...]
    where: str
    id: str
    language: str = "en"
    row: int = 0
    task: Task | None = None
    context: str = ""
    choices: tuple[str, ...] = ()
    rationale: str = ""
    kind: str | None = None
    steps: int | None = None
    stages: tuple[Stage, ...] = ()
    turn: int = 0
    history: tuple[Turn, ...] = ()

    @property
    def answer(self) -> str:
        """The first answer; "" if there is none."""
        return self.answers[0] if self.answers else ""


@dataclass(frozen=True)
class Fault:
    """A bad row, and what is wrong with it.

    Args:
        row: its number in the file, counted from 1.
        where: file and row, for messages.
        message: one line: what was found and how to mend it.
        missing: the picture it names that is not there, if that is what is wrong.
    """

    row: int
    where: str
    message: str
    missing: str | None = None

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


@dataclass(frozen=True)
class DataSet:
    """Rows of one task, or of several that were merged.

    Args:
        name: the file's name, or the packaged set's.
        task: "vqa", "caption" or "reason"; "mixed" if each example says its own.
        examples: the good rows in the order of the file; each is made when it is asked for.
        fingerprint: "sha256:…" over the rows and their pictures' names and sizes.
        terms: the licence of a packaged set; None for a user's file.
        faults: the bad rows that were left out, in the order of the file.
    """

    name: str
    task: Task | Mixed
    examples: Sequence[Example]
    fingerprint: str
    terms: str | None = None
    faults: tuple[Fault, ...] = ()

    @cached_property
    def images(self) -> tuple[ImageRef, ...]:
        """The distinct pictures of the good rows, in the order in which rows first name them."""
        return tuple(dict.fromkeys(image for example in self.examples for image in example.images))

    @property
    def skipped(self) -> tuple[str, ...]:
        """One line for each bad row that was left out."""
        return tuple(str(fault) for fault in self.faults)


def merge(parts: Sequence[DataSet]) -> DataSet:
    """Several data sets as one, in their order; each example says its task from then on.

    Args:
        parts: at least one.
    """
    stamped: list[Sequence[Example]] = [
        part.examples if part.task == "mixed" else Mapped(part.examples, partial(replace, task=part.task))
        for part in parts
    ]
    if len(parts) == 1:
        return replace(parts[0], examples=stamped[0])
    tasks = {part.task for part in parts}
    return DataSet(
        name=" + ".join(part.name for part in parts),
        task=parts[0].task if len(tasks) == 1 else "mixed",
        examples=Joined(stamped),
        fingerprint="sha256:" + hashlib.sha256(" ".join(part.fingerprint for part in parts).encode()).hexdigest(),
        terms="; ".join(dict.fromkeys(part.terms for part in parts if part.terms)) or None,
        faults=tuple(fault for part in parts for fault in part.faults),
    )


def with_stages(data: DataSet, stages: Sequence[Stage] | None) -> DataSet:
    """A data set whose rows with reasons teach these stages; None leaves them as they are.

    Raises:
        UserError: its rows are not of the task "reason".
    """
    if stages is None:
        return data
    if data.task != "reason":
        raise UserError(f"{data.name}: stages={list(stages)} is for rows with reasons; set task: reason beside it")
    return replace(data, examples=Mapped(data.examples, partial(replace, stages=tuple(stages))))


def repeat(data: DataSet, times: int) -> DataSet:
    """A data set whose rows come so often in an epoch, each time at another place of it."""
    if times == 1:
        return data
    turns = [Mapped(data.examples, partial(replace, turn=turn)) for turn in range(times)]
    return replace(data, examples=Joined(turns))


def mix(parts: Sequence[DataSet], shares: Sequence[float], seed: int = 0) -> list[DataSet]:
    """Data sets repeated so that each makes its share of an epoch's rows, and none of its rows is left out.

    The one that is largest for its share comes once; of the others, each row comes as often as the next, or once more.

    Args:
        parts: at least one.
        shares: of each, in any unit.
        seed: of which rows come once more.
    """
    unit = max(len(part.examples) / share for part, share in zip(parts, shares, strict=True))
    mixed = []
    for number, (part, share) in enumerate(zip(parts, shares, strict=True)):
        count = len(part.examples)
        times, rest = divmod(round(unit * share), count)
        again = random.Random(f"{seed}:{number}").sample(range(count), rest)
        more = Mapped(Picked(part.examples, sorted(again)), partial(replace, turn=times))
        mixed.append(replace(part, examples=Joined([repeat(part, times).examples, more])))
    return mixed


def split_by_image(dataset: DataSet, fraction: float, seed: int) -> tuple[DataSet, DataSet]:
    """Hold out whole pictures: no picture of the second part is in the first.

    Pictures are distinguished by their bytes, so a copy under another name stays with its twin; each file is
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
    order = _order(groups, seed)
    if len(order) < 2:
        raise UserError(f"{dataset.name} has {len(order)} picture(s): holding some out needs at least 2")
    held_out = set(order[: min(max(1, round(fraction * len(order))), len(order) - 1)])
    return _split(dataset, groups, held_out, f"{fraction}:{seed}")


def split_fold(dataset: DataSet, fold: int, folds: int, seed: int = 0) -> tuple[DataSet, DataSet]:
    """Hold out one of several parts of the pictures; every picture is held out in one fold, with all its rows.

    Args:
        dataset: the rows to split.
        fold: which part, from 1 to `folds`.
        folds: parts of about as many pictures each.
        seed: another seed makes other parts.

    Returns:
        As `split_by_image`.

    Raises:
        UserError: there is no such fold, or there are fewer pictures than folds.
    """
    if folds < 2 or not 1 <= fold <= folds:
        raise UserError(f"data.fold={fold}/{folds}: write which part of how many is held out, such as 2/5")
    groups = _group_by_image(dataset.examples)
    order = _order(groups, seed)
    if len(order) < folds:
        raise UserError(f"{dataset.name} has {len(order)} picture(s): give as many folds at most, not {folds}")
    return _split(dataset, groups, set(order[fold - 1 :: folds]), f"fold {fold} of {folds}:{seed}")


def _order(groups: Sequence[str], seed: int) -> list[str]:
    """The pictures in a random order that depends neither on the order of the rows nor on Python's version."""
    return sorted(set(groups), key=lambda group: hashlib.sha256(f"{seed}:{group}".encode()).digest())


def _split(dataset: DataSet, groups: Sequence[str], held_out: set[str], how: str) -> tuple[DataSet, DataSet]:
    """The rows whose picture is not held out, and those whose picture is."""

    is_held_out = np.fromiter((group in held_out for group in groups), dtype=bool, count=len(groups))

    def part(name: str, keep_held_out: bool) -> DataSet:
        origin = f"{dataset.fingerprint}:{name}:{how}"
        return replace(
            dataset,
            name=f"{dataset.name} ({name})",
            examples=Picked(dataset.examples, np.flatnonzero(is_held_out == keep_held_out)),
            fingerprint="sha256:" + hashlib.sha256(origin.encode()).hexdigest(),
            faults=() if keep_held_out else dataset.faults,
        )

    return part("train", False), part("val", True)


def _group_by_image(examples: Iterable[Example]) -> list[str]:
    """Return a group's name for each row; rows that share a picture, if only through other rows, share it."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            name = parent[name]
        return name

    firsts: list[str] = []
    for example in examples:
        first, *others = sorted({image.digest() for image in example.images})
        firsts.append(first)
        for other in others:
            low, high = sorted((root(first), root(other)))  # the least name leads, whatever the order of the rows
            parent[high] = low
    return [root(first) for first in firsts]


def sample_evenly(items: Sequence[Item], most: int | None) -> Sequence[Item]:
    """At most so many items, evenly over all: a mixture of files keeps its mixture."""
    if most is None or len(items) <= most:
        return items
    return Picked(items, [index * len(items) // most for index in range(most)])
