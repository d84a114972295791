"""What answers a batch job's file: kept beside it, so that a job that goes on never mixes answers of two kinds.

`answers.jsonl.job.json` beside `answers.jsonl` holds a hash of the rows, the adapter, the decoding, the task and what
else was asked for.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qformer.atomic import whole_file
from qformer.errors import UserError

_FORMAT = 2


@dataclass(frozen=True)
class BatchJob:
    """What a file of answers was made from and by.

    Args:
        source: the input's name, for people.
        rows: how many of its rows were read, good and bad.
        rows_digest: over those rows, as `digest_of` makes it. Pictures count by name: one that was changed on disk
            while its job stood still is not noticed.
        adapter: the adapter's name, for people: a run that was moved is the same adapter.
        adapter_fingerprint: "sha256:…" of the adapter.
        task: "vqa", "caption", "reason" or "embed".
        decoding: how tokens are chosen, by setting.
        settings: what else was asked for, by the name of its flag.
    """

    source: str
    rows: int
    rows_digest: str
    adapter: str
    adapter_fingerprint: str
    task: str
    decoding: Mapping[str, Any]
    settings: Mapping[str, Any]


class RowsDigest:
    """A hash over rows as they come, so that no row need be kept."""

    def __init__(self) -> None:
        self.rows = 0
        self._sha = hashlib.sha256()

    def add(self, row_digest: str) -> None:
        """Take a row's own hash, in hexadecimal."""
        self._sha.update(f"{' ' if self.rows else ''}{row_digest}".encode())
        self.rows += 1

    def value(self) -> str:
        """`sha256:…` over the rows so far."""
        return f"sha256:{self._sha.hexdigest()}"


def job_file(out: Path) -> Path:
    """Where the job of a file of answers is kept."""
    return out.with_name(out.name + ".job.json")


def read_job(out: Path) -> BatchJob | None:
    """The job that the answers in `out` belong to; None if there are none yet.

    Raises:
        UserError: there are answers, but what made them is not written or cannot be read; or `out` is a folder.
    """
    if out.is_dir():
        raise UserError(f"--out {out}: this is a folder; name a file such as answers.jsonl")
    try:
        if not out.exists() or out.stat().st_size == 0:
            return None  # a job file that is left alone says nothing about answers to come
        values = json.loads(job_file(out).read_text(encoding="utf-8"))
        if values.pop("format") != _FORMAT:
            raise UserError(f"--out {out}: {job_file(out).name} is of another version of querybridge; {_way_out(out)}")
        job = BatchJob(**values)
        if not (isinstance(job.rows, int) and isinstance(job.decoding, dict) and isinstance(job.settings, dict)):
            raise TypeError("rows, decoding and settings")
        return job
    except FileNotFoundError:
        # Whatever wrote it, nothing tells which adapter did: to go on might mix the answers of two.
        raise UserError(
            f"--out {out}: it holds something already, and no {job_file(out).name} beside it says what wrote that;"
            " name another file, or delete it"
        ) from None
    except OSError as error:
        raise UserError(
            f"--out {out}: cannot be read ({error.strerror}); mend its rights or name another file"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"--out {out}: {job_file(out).name} is damaged; {_way_out(out)}") from error


def write_job(out: Path, job: BatchJob) -> None:
    """Write the job beside its answers, whole or not at all."""
    with whole_file(job_file(out)) as partial:
        partial.write_text(json.dumps({"format": _FORMAT, **asdict(job)}, indent=1) + "\n", encoding="utf-8")


def check_same_job(out: Path, before: BatchJob, now: BatchJob, same_rows: bool) -> None:
    """See that answers to come go with those that are in `out`; the input may have grown at its end.

    Args:
        out: the file of answers, for the message.
        before: the job they belong to.
        now: the job that would go on.
        same_rows: the first of the rows, as many as there were, are those of then.

    Raises:
        UserError: they do not; the line names all that differs.
    """
    differs = []
    if now.rows < before.rows:
        differs.append(f"{now.source} has {now.rows} rows, had {before.rows}")
    elif not same_rows:
        differs.append(f"the first {before.rows} rows of {now.source} are not those of then")
    if now.adapter_fingerprint != before.adapter_fingerprint:
        was = before.adapter if now.adapter != before.adapter else "another of this name"
        differs.append(f"the adapter is {now.adapter}, was {was}")
    if now.task != before.task:
        differs.append(f"the task is {now.task}, was {before.task}")
    for ours, theirs in ((now.decoding, before.decoding), (now.settings, before.settings)):
        names = sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))
        differs += [f"{name} is {_shown(ours.get(name))}, was {_shown(theirs.get(name))}" for name in names]
    if differs:
        raise UserError(f"--out {out}: its answers were made otherwise ({'; '.join(differs)}); {_way_out(out)}")


def _shown(value: object) -> str:
    return "not given" if value is None or value == [] else str(value)


def _way_out(out: Path) -> str:
    return f"name another file, or delete both {out} and {job_file(out).name}"
