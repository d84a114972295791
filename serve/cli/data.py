"""`querybridge data`: look at a data file before anything is trained on it or asked about it."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from serve.cli.common import (
    ColumnsOption,
    JsonOption,
    OfflineOption,
    OutsideOption,
    QuietOption,
    SkipOption,
    columns_of,
    progress,
    report,
)

if TYPE_CHECKING:
    from adapters.data.check import DataCheck
    from adapters.data.duplicates import Copies
    from adapters.data.findings import Findings

SHOWN = 20  # bad rows, and copies, that people are shown; --json has all

app = typer.Typer(
    help="Check and look at a data file before it is used.",
    context_settings={"help_option_names": ["-h", "--help"]},
)

FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="A data file or folder, or a packaged set.")]
TaskOption = Annotated[
    str | None, typer.Option("--task", help="vqa, caption or reason; inferred from the rows if left out.")
]


@app.command()
def check(
    file: FileArgument,
    val: Annotated[
        str | None,
        typer.Option("--val", help="A second file, to validate or test on: checked too, and searched for copies."),
    ] = None,
    task: TaskOption = None,
    columns: ColumnsOption = None,
    no_answers: Annotated[
        bool, typer.Option("--no-answers", help="Rows to be answered, as batch takes them: answers may be absent.")
    ] = False,
    allow_outside: OutsideOption = False,
    offline: OfflineOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Read every row and open every picture; exit code 2 if one is bad. With --val, name pictures of both files."""
    from adapters.data.check import check_data, check_pair

    how: Any = {
        "task": task,
        "need_answers": not no_answers,
        "columns": columns_of(columns),
        "allow_outside": allow_outside,
        "offline": offline,
        "on_progress": None if quiet else progress("opened"),
    }
    if val is None:
        found = check_data(file, **how)
        report(_values(found), as_json, _describe(found))
        bad = bool(found.faults)
    else:
        found, second, copies = check_pair(file, val, **how)
        values = {**_values(found), "val": _values(second), **_shared(copies)}
        parts = [_describe(found), f"{val}\n{_describe(second)}", _describe_shared(copies)]
        report(values, as_json, "\n\n".join(parts))
        bad = bool(found.faults or second.faults)
    if bad:
        raise typer.Exit(2)


@app.command()
def preview(
    file: FileArgument,
    out: Annotated[
        Path | None, typer.Option("--out", help="The PNG to write; left out, preview.png, or none with --html.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="An HTML page to write, with the pictures inside it.")
    ] = None,
    rows: Annotated[int, typer.Option("--rows", min=1, max=200, help="How many rows.")] = 12,
    sample: Annotated[
        int | None, typer.Option("--sample", metavar="SEED", help="Rows drawn at random with this seed, not the first.")
    ] = None,
    task: TaskOption = None,
    columns: ColumnsOption = None,
    allow_outside: OutsideOption = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Draw pictures with their questions and answers onto one sheet, or put them on a page."""
    from adapters.data.preview import preview_data
    from adapters.data.preview_page import preview_page

    how: Any = {
        "rows": rows, "sample": sample, "task": task, "columns": columns_of(columns), "allow_outside": allow_outside,
        "offline": offline,
    }  # fmt: skip
    made = []
    if html is not None:
        made.append(preview_page(file, html, **how))
    if out is not None or html is None:
        made.append(preview_data(file, out or Path("preview.png"), **how))
    last = made[-1]
    bad = last.bad_rows + last.bad_pictures
    notes = [f"{bad} bad rows: querybridge data check {file} lists them"] if bad else []
    if last.escaped:
        notes.append(
            "some letters are written as escapes such as \\u4e2d, because no font here has them; install one that"
            " does, such as Noto Sans CJK, or take --html"
        )
    for note in notes:
        print(note, file=sys.stderr)
    values = {**dataclasses.asdict(last), "rows": list(last.rows)}
    if html is not None:
        values["html"] = html
    report(values, as_json, "\n".join(f"{one.out}: {len(one.rows)} rows" for one in made))


@app.command()
def convert(
    file: FileArgument,
    out: Annotated[Path, typer.Option("--out", help="The .jsonl or .parquet file to write.")],
    task: TaskOption = None,
    columns: ColumnsOption = None,
    no_answers: Annotated[
        bool, typer.Option("--no-answers", help="Rows to be answered, as batch takes them: answers may be absent.")
    ] = False,
    skip_bad_rows: SkipOption = False,
    allow_outside: OutsideOption = False,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write the rows of a data file, of whatever format, as JSON lines or as Parquet with the pictures in it."""
    from adapters.data.convert import convert_data

    made = convert_data(
        file, out, task=task, need_answers=not no_answers, columns=columns_of(columns), skip_bad_rows=skip_bad_rows,
        allow_outside=allow_outside, offline=offline,
    )  # fmt: skip
    if made.outside:
        print("its pictures lie outside its folder: read it with --allow-outside, or write .parquet", file=sys.stderr)
    left_out = f", {made.bad_rows:,} bad rows left out" if made.bad_rows else ""
    beside = f", {made.pictures:,} pictures beside it" if made.pictures else ""
    report(dataclasses.asdict(made), as_json, f"{made.out}: {made.rows:,} rows{beside}{left_out}")


def _values(found: DataCheck) -> dict[str, object]:
    values = dataclasses.asdict(found)
    del values["faults"]
    values |= values.pop("findings")
    bad = [{"row": fault.row, "where": fault.where, "error": fault.message} for fault in found.faults]
    return {**values, "bad": len(bad), "bad_rows": bad}


def _shared(copies: Copies) -> dict[str, object]:
    return {"in_both": len(copies.pairs), "copies": [dataclasses.asdict(pair) for pair in copies.pairs]}


def _describe_shared(copies: Copies) -> str:
    from adapters.data.duplicates import describe_copies

    lines = [f"{'pictures in both':<20}{len(copies.pairs):,}"]
    lines += [f"  {line}" for line in describe_copies(copies.pairs, SHOWN)]
    if len(copies.pairs) > SHOWN:
        lines.append(f"  … and {len(copies.pairs) - SHOWN:,} more; --json lists all")
    return "\n".join(lines)


def _describe(found: DataCheck) -> str:
    languages = ", ".join(f"{name} ({count:,})" for name, count in found.languages.items())
    longest = f"{found.longest_question} characters"
    if found.longest_question_row:
        longest += f" (row {found.longest_question_row})"
    table = {
        "task": found.task or "none could be told",
        "rows": f"{found.rows:,}",
        "pictures": f"{found.pictures:,}, {found.distinct_pictures:,} distinct",
        "answers": f"{found.answers:,}",
        "languages": languages or "none",
        "longest question": longest,
        **_answers(found.findings),
        "bad rows": f"{len(found.faults):,}",
    }
    lines = [f"{name:<20}{value}" for name, value in table.items()]
    lines += [f"  {fault}" for fault in found.faults[:SHOWN]]
    if len(found.faults) > SHOWN:
        lines.append(f"  … and {len(found.faults) - SHOWN:,} more; --json lists all")
    lines += [f"note: {note}" for note in found.findings.notes]
    return "\n".join(lines)


def _answers(findings: Findings) -> dict[str, str]:
    """What answers there are, and how far the question alone gets, for people."""
    common = ", ".join(f"{_short(answer)} ({count:,})" for answer, count in findings.commonest_answers[:5])
    table = {"distinct answers": f"{findings.distinct_answers:,}: {common}" if common else "0"}
    if findings.longest_answer_row:
        longest = f"{findings.longest_answer} characters (row {findings.longest_answer_row})"
        table["longest answer"] = longest
    if (alone := findings.question_alone) is not None:
        table["question alone"] = (
            f"{alone.commonest_answer:.1%} commonest answer, {alone.by_question:.1%} by question,"
            f" {alone.bag_of_words:.1%} by its words"
        )
    return table


def _short(answer: str) -> str:
    return answer if len(answer) <= 30 else f"{answer[:29]}…"
