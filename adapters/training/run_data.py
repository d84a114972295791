"""What both training loops share around their steps: the data of a run, its features, its validations, its result."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from accelerate.utils import broadcast_object_list

from adapters.data.duplicates import copies_between, describe_copies
from adapters.data.examples import DataSet
from adapters.data.image_ref import ImageRef
from adapters.features.cache import FeatureCache
from adapters.training.reporting import Reporter

Item = TypeVar("Item")


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        folder: the run's folder.
        best: its best artefact.
        steps: optimiser steps taken, over all sittings.
        metrics: the best validation's figures, and peak_memory_gib of this sitting.
        finished: False if Ctrl-C stopped it; `resume` goes on.
    """

    folder: Path
    best: Path
    steps: int
    metrics: dict[str, float]
    finished: bool


def fill_caches(
    caches: Sequence[FeatureCache], images: Sequence[ImageRef], *, rank: int = 0, world: int = 1, quiet: bool = False
) -> None:
    """Encode a process's share of the pictures that are not in the caches yet."""
    shown = time.monotonic()

    def progress(done: int, total: int) -> None:
        nonlocal shown
        if not quiet and (time.monotonic() - shown > 10 or done == total):
            shown = time.monotonic()
            print(f"encoding pictures: {done}/{total}", file=sys.stderr, flush=True)

    for cache in caches:
        cache.fill(images[rank::world], on_progress=progress)


def broadcast_from_main(value: Item) -> Item:
    """The first process's value, on all of them: what each would measure for itself may come out differently."""
    (value,) = broadcast_object_list([value])
    return value


def steps_between_validations(total: int) -> int:
    """For a recipe that does not say: four validations a run, and one every 200 steps at least."""
    return min(200, -(-total // 4))


def report_terms(terms: Iterable[str]) -> None:
    """Say on stderr what the image encoder's own training binds this run to."""
    if bound := list(dict.fromkeys(terms)):
        print(
            f"the image encoder was trained on data whose terms this run inherits: {'; '.join(bound)}", file=sys.stderr
        )


def report_copies(train: DataSet, val: DataSet) -> None:
    """Say on stderr which validation pictures are in training too, near copies included: scores on them mislead."""
    copies = copies_between(train.images, val.images)
    for line in copies.unreadable[:3]:
        print(f"not compared: {line}", file=sys.stderr)
    if copies.pairs:
        shown = "; ".join(describe_copies(copies.pairs, 3))
        print(
            f"{len(copies.pairs)} validation pictures are in the training data too, so scores flatter: {shown}"
            f"{' …' if len(copies.pairs) > 3 else ''}; take them out of one of the two (querybridge data check)",
            file=sys.stderr,
        )


def report_skipped(report: Reporter, *parts: DataSet) -> None:
    """Say which bad rows were left out: the first three, and how many."""
    for data in parts:
        for line in data.skipped[:3]:
            report.say(f"left out: {line}")
        if data.skipped:
            report.say(f"{data.name}: {len(data.skipped)} bad rows left out")
