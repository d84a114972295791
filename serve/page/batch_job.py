"""A batch job of the page: uploaded files laid out in a folder of their own, answered by the engine among others."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from adapters.data.batches import prompt_for
from adapters.data.examples import Example
from adapters.data.formats.registry import TEXT
from adapters.data.prompts import Turn
from adapters.inference.request import Request
from qformer.errors import UserError
from serve.batch.asking import Asking, Facts, Fields
from serve.batch.predictor import VQAPredictor
from serve.batch.rows import BatchRows
from serve.batch.run import run_batch
from serve.batch.tables import write_table
from serve.engine.engine import Engine
from serve.page.context import submit_all, wait_for
from serve.page.security import inside

MAX_ROWS = 2000
DATA_FILES = tuple(TEXT)
_TOGETHER = 16  # rows that are put to the engine at a time
_SEEN = 0.3  # seconds between two looks at how far a job has come


class Ended(Exception):
    """Nobody waits for the job any more."""


class EnginePredictor(VQAPredictor):
    """Answers rows by the engine, so that a batch job and who else asks have turns.

    Args:
        engine: what answers.
        adapter: its name.
    """

    def __init__(self, engine: Engine, adapter: str) -> None:
        self.engine = engine.adapter(adapter)
        self.decoding = None
        self.batch_size = _TOGETHER
        self.ended = threading.Event()
        self._requests = engine

    def facts(self, asking: Asking) -> Facts:
        """What answers; the job lives no longer than its adapter, so a name is enough."""
        return Facts(self.engine.name, "", asdict(self.decoding_for(asking.task)))

    def prepare(self, examples: Sequence[Example]) -> None:
        """Nothing: the engine encodes pictures as it comes to them."""

    def answer(self, examples: Sequence[Example], asking: Asking) -> list[Fields]:
        """Answers to some examples, as a line's fields.

        Raises:
            UserError: a picture cannot be read.
            Busy: too many wait.
            Ended: nobody waits any more.
        """
        answers: list[Any] = []
        for so_far in wait_for(submit_all(partial(self._ask, example, asking.task) for example in examples)):
            if self.ended.is_set():
                raise Ended
            answers = so_far
        return [
            {"answer": one.text, "confidence": one.confidence} | ({"choices": one.choices} if one.choices else {})
            for one in answers
        ]

    def _ask(self, example: Example, task: str) -> Any:
        how: dict[str, Any] = {"adapter": self.engine.name}
        if example.choices:
            turn = Turn("user", example.question, example.images)
            return self._requests.choose([turn], example.choices, **how)
        asked = Request(prompt_for(example, task, self.engine.assembly.prompts), example.images)
        return self._requests.submit(asked, decoding=self.decoding_for(task), **how)


@dataclass
class BatchJobShown:
    """How far a job has come.

    Attributes:
        done: rows that have a line.
        total: rows in all.
        lines: what is known of each row, as `querybridge batch` writes it.
        csv: all lines as a table, at the end.
        finished: whether all rows have a line.
    """

    done: int = 0
    total: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)
    csv: str = ""
    finished: bool = False

    def jsonl(self) -> str:
        """All lines as JSON lines."""
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in self.lines)


def answer_files(
    engine: Engine, files: Sequence[tuple[str, Path]], questions: Sequence[str], adapter: str
) -> Iterator[BatchJobShown]:
    """Answer uploaded rows, or questions about uploaded pictures; how far it has come, at short intervals.

    Args:
        engine: what answers.
        files: names and places of what was uploaded: pictures, and one data file at most, whose rows name them.
        questions: asked about every row or picture; none takes the rows' own, or describes pictures.
        adapter: its name.

    Raises:
        UserError: two files have the same name, there are several data files or too many rows, or a row names a
            picture that was not uploaded.
    """
    folder = Path(tempfile.mkdtemp(prefix="querybridge-batch-"))
    try:
        source = _lay_out(files, folder / "in")
        task = None if questions or source.is_file() else "caption"
        total = _checked_rows(source, questions, task, folder / "in")
        yield from _run(engine, source, questions, task, adapter, folder, BatchJobShown(total=total))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(
    engine: Engine,
    source: Path,
    questions: Sequence[str],
    task: str | None,
    adapter: str,
    folder: Path,
    shown: BatchJobShown,
) -> Iterator[BatchJobShown]:
    predictor, failure = EnginePredictor(engine, adapter), list[BaseException]()
    out = folder / "answers.jsonl"

    def work(on_progress: Callable[[int, int], None]) -> None:
        try:
            run_batch(
                source, out, predictor, questions=questions, task=task, skip_bad_rows=True, offline=True,
                chunk=_TOGETHER, write_every=_SEEN, on_progress=on_progress,
            )  # fmt: skip
        except BaseException as error:
            failure.append(error)

    def count(done: int, total: int) -> None:
        shown.done, shown.total = done, total

    worker = threading.Thread(target=work, args=(count,), daemon=True)
    worker.start()
    try:
        while worker.is_alive():
            worker.join(_SEEN)
            shown.lines = _lines(out)
            yield shown
        if failure:
            raise failure[0]
        shown.lines, shown.finished, shown.done = _lines(out), True, shown.total
        write_table(out, folder / "answers.csv")
        shown.csv = (folder / "answers.csv").read_text(encoding="utf-8")
        yield shown
    finally:
        predictor.ended.set()
        worker.join()


def _lay_out(files: Sequence[tuple[str, Path]], folder: Path) -> Path:
    """Uploaded files under their own names in a folder; gives the data file, or the folder if there is none."""
    folder.mkdir(parents=True)
    tables = []
    for name, path in files:
        place = folder / Path(name).name
        if place.exists():
            raise UserError(f"Two files are called '{place.name}': give one of them another name")
        with suppress(OSError):
            os.link(path, place)
        if not place.exists():
            shutil.copy(path, place)
        if place.suffix.lower() in DATA_FILES:
            tables.append(place)
    if not files:
        raise UserError("There is nothing to answer yet: upload a data file with its pictures, or pictures alone")
    if len(tables) > 1:
        raise UserError(f"There are {len(tables)} data files: upload one at a time")
    if tables:
        _lay_out_folders(tables[0], [name for name in folder.iterdir() if name != tables[0]])
    return tables[0] if tables else folder


def _lay_out_folders(table: Path, pictures: Sequence[Path]) -> None:
    """Put pictures where the data file looks for them, which may be in folders: a browser sends names alone."""
    text = table.read_text(encoding="utf-8", errors="replace")
    for picture in pictures:
        found = {one.strip() for one in re.findall(rf"[^\"',;\t\n]+/{re.escape(picture.name)}", text)}
        if len(found) > 1:
            raise UserError(
                f"{table.name} names both {' and '.join(sorted(found)[:2])}: give each picture a name of its own"
            )
        for name in found:
            place = table.parent / name
            if inside(str(place), table.parent.resolve()):
                place.parent.mkdir(parents=True, exist_ok=True)
                if not place.exists():
                    shutil.copy(picture, place)


def _checked_rows(source: Path, questions: Sequence[str], task: str | None, folder: Path) -> int:
    """How many answers are asked for; every picture is one that was uploaded."""
    total = 0
    for row in BatchRows(source, questions=questions, task=task, allow_outside=True, offline=True):  # looked at below
        for asked in row.asked:
            total += 1
            images = asked.asked.images if isinstance(asked.asked, Example) else ()
            for image in images:
                if image.path is not None and not inside(str(image.path), folder.resolve()):
                    raise UserError(f"Row {asked.row}: '{image.label}' was not uploaded: upload the pictures too")
        if total > MAX_ROWS:
            raise UserError(f"There are more than {MAX_ROWS} rows: querybridge batch answers as many as you like")
    return total


def _lines(out: Path) -> list[dict[str, Any]]:
    if not out.exists():
        return []
    whole = out.read_text(encoding="utf-8").rpartition("\n")[0]  # the last may be half written
    return [json.loads(line) for line in whole.splitlines()]
