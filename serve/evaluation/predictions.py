"""Files of predictions: a line for each row with what was answered, and two of them compared."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters.evaluation.comparison import compare_hits, paired_difference
from adapters.evaluation.report import Answered, check_report
from adapters.evaluation.vqa import vqa_accuracy
from qformer.atomic import whole_file
from qformer.errors import UserError

TASKS = ("vqa", "probes", "caption", "reason")


def check_outputs(predictions: str | Path | None, report: str | Path | None, data: str | Path, task: str) -> None:
    """Say what is wrong with the files that are to be written before anything slow is done.

    Raises:
        UserError: as `check_predictions` and `check_report`, and if both are one file.
    """
    if predictions is not None:
        check_predictions(predictions, data, task)
    if report is not None:
        check_report(report)
    if predictions is not None and report is not None and Path(predictions).resolve() == Path(report).resolve():
        raise UserError(f"--save-predictions {predictions}: the report is to be written there too; name another file")


def check_predictions(predictions: str | Path, data: str | Path, task: str) -> None:
    """Say what is wrong with a file for predictions before anything slow is done.

    Raises:
        UserError: it is the data file or a folder, its folder cannot be made, or the task has no predictions.
    """
    path = Path(predictions)
    if task not in TASKS:
        raise UserError(f"--save-predictions goes with --task {', '.join(TASKS)}, not {task}")
    if path.is_dir() or path.resolve() == Path(data).expanduser().resolve():
        what = "a folder" if path.is_dir() else "the data file itself"
        raise UserError(f"--save-predictions {predictions}: this is {what}; name another file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(_unwritable(path, error)) from error


def write_predictions(path: str | Path, answered: Sequence[Answered], *, captions: bool = False) -> None:
    """Write a line for each row, as it is in its file, with what was answered.

    Raises:
        UserError: the file cannot be written.
    """
    target = Path(path)
    try:
        with whole_file(target) as building, building.open("w", encoding="utf-8") as file:
            for one in answered:
                file.write(json.dumps(_prediction(one, captions), ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(_unwritable(target, error)) from error


def compare_predictions(first: str | Path, second: str | Path) -> dict[str, Any]:
    """Compare what two adapters answered to the same rows.

    Args:
        first: a file that `evaluate` wrote with `predictions`.
        second: another, of the same data.

    Returns:
        "measure": "exact_match" or, of captions, "CIDEr"; "n" and "pictures"; what
        `adapters.evaluation.comparison.compare_hits` says, of captions "first", "second", "difference",
        "difference_low" and "difference_high" alone; and of answers "vqa_accuracy_difference", "…_low" and "…_high".

    Raises:
        UserError: a file cannot be read, holds no predictions, or the two are not of the same rows.
    """
    ours, theirs = _read(Path(first)), _read(Path(second))
    if len(ours) != len(theirs):
        raise UserError(f"{first} has {len(ours)} rows and {second} {len(theirs)}: predict the same rows with both")
    for number, (mine, other) in enumerate(zip(ours, theirs, strict=True), start=1):
        for field in ("row", "image", "images", "question", "answer"):
            if mine.get(field) != other.get(field):
                raise UserError(
                    f"{second}, line {number}: '{field}' is {other.get(field)!r}, but {mine.get(field)!r} in {first}:"
                    " predict the same rows with both"
                )
    measure = "exact_match" if "right" in ours[0] else "CIDEr"
    field = "right" if measure == "exact_match" else "CIDEr"
    for path, rows in ((first, ours), (second, theirs)):
        for number, row in enumerate(rows, start=1):
            if not isinstance(row.get(field), bool if field == "right" else int | float):
                raise UserError(f"{path}, line {number}: '{field}' is {row.get(field)!r}; write the file with evaluate")
    pictures = [json.dumps(row.get("images") or row.get("image")) for row in ours]
    found: dict[str, Any] = {"measure": measure, "n": len(ours), "pictures": len(set(pictures))}
    if measure == "exact_match":
        found |= compare_hits([row["right"] for row in ours], [row["right"] for row in theirs], pictures)
        return found | _apart("vqa_accuracy_difference", _accuracies(ours), _accuracies(theirs), pictures)
    before, after = [row["CIDEr"] for row in ours], [row["CIDEr"] for row in theirs]
    means = {"first": sum(before) / len(before), "second": sum(after) / len(after)}
    return found | means | _apart("difference", before, after, pictures)


def _apart(name: str, first: Sequence[float], second: Sequence[float], pictures: Sequence[str]) -> dict[str, Any]:
    value, low, high = paired_difference(first, second, pictures)
    return {name: value, f"{name}_low": low, f"{name}_high": high}


def _accuracies(rows: Sequence[dict[str, Any]]) -> list[float]:
    answers = [row["answer"] if isinstance(row["answer"], list) else [row["answer"]] for row in rows]
    return [vqa_accuracy(row["prediction"], given) for row, given in zip(rows, answers, strict=True)]


def _read(path: Path) -> list[dict[str, Any]]:
    try:
        lines = path.expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not UTF-8'}); name a file that"
            " evaluate --save-predictions wrote"
        ) from error
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not {"row", "answer", "prediction"} <= row.keys():
            raise UserError(
                f"{path}, line {number}: this is no prediction; name a file that evaluate --save-predictions wrote"
            )
        rows.append(row)
    if not rows:
        raise UserError(f"{path} holds no predictions; write it with evaluate --save-predictions")
    return rows


def _prediction(one: Answered, captions: bool) -> dict[str, Any]:
    example, labels = one.example, [image.label for image in one.example.images]
    return {
        "row": example.row,
        **({"image": labels[0]} if len(labels) == 1 else {"images": labels}),
        **({} if captions else {"question": example.question}),
        **({"kind": example.kind} if example.kind else {}),
        "answer": example.answers[0] if len(example.answers) == 1 else example.answers,
        "prediction": one.said,
        **({} if one.rationale is None else {"rationale": one.rationale}),
        **({"CIDEr": round(one.score, 6)} if captions else {"right": one.score == 1}),
        "confidence": round(one.confidence, 4),
    }


def _unwritable(path: Path, error: OSError) -> str:
    return f"--save-predictions {path}: cannot be written ({error.strerror}); free space or name another file"
