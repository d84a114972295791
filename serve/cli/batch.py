"""`querybridge batch`: a file of questions, or a folder of pictures, answered by script."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qformer.errors import UserError
from serve.cli.common import (
    AdapterOption,
    BeamsOption,
    ColumnsOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    MaxTokensOption,
    OfflineOption,
    OutsideOption,
    PresetOption,
    QuietOption,
    RationaleTokensOption,
    SkipOption,
    VotesOption,
    columns_of,
    decoding_over,
    report,
    split_list,
)

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from serve.batch.asking import Predictor

_TOLD_EVERY = 2.0  # seconds between two lines of progress


def batch(
    source: Annotated[
        str,
        typer.Argument(
            metavar="INPUT",
            help="A data file with image and question columns, or a folder of pictures with --question.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", help="The .jsonl, .csv or .parquet file to write; a stopped job goes on where it was."),
    ],
    adapter: AdapterOption = None,
    task: Annotated[
        str | None,
        typer.Option("--task", help="vqa, caption, reason or embed; vqa or caption is inferred from the rows."),
    ] = None,
    question: Annotated[
        list[str] | None,
        typer.Option(
            "--question", help='Asked about every row, with columns in braces: "is there a {part}?"; repeatable.'
        ),
    ] = None,
    choices: Annotated[
        str | None,
        typer.Option("--choices", help="Answers to choose from for every row, with commas between, or a JSON list."),
    ] = None,
    logprobs: Annotated[
        bool, typer.Option("--logprobs", help="With each answer, its tokens and their log-probabilities.")
    ] = False,
    min_confidence: Annotated[
        float | None,
        typer.Option(
            "--min-confidence", help="Leave an answer empty whose confidence is below this; its line says so."
        ),
    ] = None,
    columns: ColumnsOption = None,
    limit: LimitOption = None,
    skip_bad_rows: SkipOption = False,
    allow_outside: OutsideOption = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts generated together.")] = 64,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Processes, or actors, that answer.")] = 1,
    engine: Annotated[
        str, typer.Option("--engine", help="local, or ray: the workers are actors of a Ray cluster ($RAY_ADDRESS).")
    ] = "local",
    decoding: PresetOption = None,
    beams: BeamsOption = None,
    max_new_tokens: MaxTokensOption = None,
    rationale_tokens: RationaleTokensOption = None,
    votes: VotesOption = 1,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    offline: OfflineOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Answer a file of questions: rows in, rows out, each kept as it comes."""
    from serve.batch.run import run_batch

    if engine not in ("local", "ray"):
        raise UserError(f"--engine '{engine}': take local or ray")
    flags = (decoding, beams, max_new_tokens)
    decoding_over(*flags)  # a mistake is reported before the models are loaded
    named = split_list(choices, "--choices") if choices is not None else []
    if (named or task == "embed") and any(flag is not None for flag in flags):
        why = "--choices gives each its probability" if named else "--task embed embeds pictures"
        raise UserError(f"{why} and writes nothing: leave the decoding's flags out")
    read_as = columns_of(columns)
    if task != "embed":
        dtype = dtype or _dtype(out, adapter, device, alone=workers == 1 and engine == "local")
    settings = {"batch_size": batch_size, "device": device, "dtype": dtype, "offline": offline}
    make = partial(_embedding if task == "embed" else _answering, adapter, flags, settings, workers)
    with _answerer(make, engine, workers) as answerer:
        done = run_batch(
            source, out, answerer, task=task, questions=question or [], choices=named, logprobs=logprobs,
            min_confidence=min_confidence, rationale_tokens=rationale_tokens, votes=votes, columns=read_as,
            limit=limit, skip_bad_rows=skip_bad_rows, allow_outside=allow_outside, offline=offline,
            on_progress=None if quiet else Progress(),
        )  # fmt: skip
    report(
        {"out": str(out), **vars(done)},
        as_json,
        f"{out}: {done.answered} rows answered, {done.already} were already, {done.failed} bad rows",
    )


def _dtype(out: Path, adapter: str | None, device: str | None, *, alone: bool) -> str | None:
    """The dtype that a job goes on in, or that all its workers take; None leaves it to the one that loads.

    What was not recorded with an adapter is measured when it is loaded: two processes may find otherwise.
    """
    from serve.batch.job import read_job
    from serve.batch.tables import journal_of

    if (before := read_job(journal_of(out))) is not None:
        return str(before.settings["--dtype"]) if "--dtype" in before.settings else None
    if alone:
        return None
    from adapters.artefact.artefact import answering_dtype, find_artefact
    from adapters.artefact.facts import read_facts
    from adapters.loading.vision_side import default_device
    from serve.adapter import default_adapter

    facts = read_facts(find_artefact(adapter if adapter is not None else default_adapter()))
    return answering_dtype(facts, device or default_device())


def _answerer(make: Callable[[int], Predictor], engine: str, workers: int) -> AbstractContextManager[Any]:
    """This process, several, or actors of a cluster, as a context."""
    if engine == "ray":
        from serve.batch.ray_actors import RayActors

        return RayActors(make, workers)
    if workers > 1:
        from serve.batch.workers import Workers

        return Workers(make, workers)
    from serve.batch.blocks import OneProcess

    return nullcontext(OneProcess(partial(make, 0)))


def _answering(
    adapter: str | None, flags: Sequence[Any], settings: dict[str, Any], workers: int, number: int
) -> Predictor:
    """The predictor of a worker, with the decoding that the flags ask for."""
    from serve.batch.predictor import VQAPredictor

    over = decoding_over(*flags)
    predictor = VQAPredictor(adapter, **_placed(settings, workers, number))
    predictor.decoding = {task: over(predictor.usual_decoding(task)) for task in ("vqa", "caption", "reason")}
    return predictor


def _embedding(
    adapter: str | None, flags: Sequence[Any], settings: dict[str, Any], workers: int, number: int
) -> Predictor:
    from serve.batch.predictor import EmbeddingPredictor

    return EmbeddingPredictor(adapter, **_placed(settings, workers, number))


def _placed(settings: dict[str, Any], workers: int, number: int) -> dict[str, Any]:
    """The settings of a worker: the GPUs of a machine are dealt out among several, unless one is named."""
    if workers > 1 and settings["device"] in (None, "cuda"):
        import torch

        if (gpus := torch.cuda.device_count()) > 1:
            return settings | {"device": f"cuda:{number % gpus}"}
    return settings


class Progress:
    """Tells on standard error how many rows are done, how many a second, and how long the rest will take."""

    def __init__(self) -> None:
        self._first: tuple[float, int] | None = None  # when it was told first, and how many were done
        self._told = -_TOLD_EVERY

    def __call__(self, done: int, total: int) -> None:
        """Take a count; a line is printed every few seconds, and at the end."""
        now = time.monotonic()
        self._first = self._first or (now, done)
        if done == 0 or (done < total and now - self._told < _TOLD_EVERY):
            return
        self._told = now
        print(f"answered {done}/{total}{self._speed(now, done, total)}", file=sys.stderr, flush=True)

    def _speed(self, now: float, done: int, total: int) -> str:
        """From the second time on: what was done before counts for nothing."""
        begun, before = self._first or (now, done)
        if done == before or now == begun:
            return ""
        rate = (done - before) / (now - begun)
        left = "" if done == total else f", {in_words((total - done) / rate)} left"
        return f" ({rate:.{0 if rate >= 100 else 1}f} rows/s{left})"


def in_words(seconds: float) -> str:
    """A time as "45 s", "3 min", "2 h 05 min" or "4 d 03 h"."""
    minutes, hours, days = round(seconds / 60), round(seconds / 3600), seconds / 86400
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if minutes < 90:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{int(days)} d {hours % 24:02d} h"
