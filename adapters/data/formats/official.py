"""JSON files as two well-known data sets publish them: VQAv2's questions and answers, COCO's captions and boxes.

VQAv2: Goyal et al., 2017, arXiv 1612.00837. COCO captions: Chen et al., 2015, arXiv 1504.00325.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from adapters.data.formats.raw_rows import RawRow, shorten
from qformer.errors import UserError

_FOLDERS = (".", "images", "..", "../images")  # where pictures are looked for, from the data file on
_SPLIT = re.compile(r"(train|val|test)\d*")


def official_rows(path: Path, value: Mapping[str, Any]) -> Iterator[RawRow] | None:
    """The rows of a well-known file, told by the lists that it holds; None if it is none.

    Args:
        path: the file.
        value: what it holds.

    Raises:
        UserError: the other half of a pair is missing or of another set, or the file holds boxes, which no task learns.
    """
    if isinstance(value.get("questions"), list):
        return _vqa_rows(path, value, _partner(path, value, "annotations"))
    if isinstance(value.get("annotations"), list) and isinstance(value.get("images"), list):
        return _caption_rows(path, value)
    if isinstance(value.get("annotations"), list) and all("question_id" in one for one in _some(value["annotations"])):
        questions = _partner(path, value, "questions")
        if questions is None:
            raise UserError(f"{path} holds VQAv2's answers alone: put the file of their questions beside it")
        return _vqa_rows(path, questions, value)
    return None


def _some(items: list[Any]) -> list[dict[str, Any]]:
    return [one for one in items[:10] if isinstance(one, dict)]


def _partner(path: Path, value: Mapping[str, Any], holding: str) -> dict[str, Any] | None:
    """What the other file of a pair holds: the one beside it with the same pictures whose list has that name.

    VQAv2 names them `v2_OpenEnded_mscoco_train2014_questions.json` and `v2_mscoco_train2014_annotations.json`.
    """
    part = _part(path, value)
    found: list[tuple[Path, dict[str, Any]]] = []
    for file in sorted(path.parent.glob("*.json")):
        if file == path or holding not in file.name or (part and part not in file.name):
            continue
        try:
            other = json.loads(file.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(f"{file}, which belongs to {path.name}, cannot be read ({shorten(str(error))})") from error
        if isinstance(other, dict) and isinstance(other.get(holding), list):
            found.append((file, other))
    if len(found) > 1:
        names = ", ".join(file.name for file, _ in found)
        raise UserError(f"{path}: several files may hold its {holding} ({names}): leave one beside it")
    return found[0][1] if found else None


def _part(path: Path, value: Mapping[str, Any]) -> str:
    """Which part of COCO's pictures a file is about, such as "train2014"; "" if it does not say."""
    named = value.get("data_subtype")
    if isinstance(named, str) and named:
        return named
    found = _SPLIT.search(path.name)
    return found[0] if found else ""


def _vqa_rows(path: Path, questions: Mapping[str, Any], annotations: Mapping[str, Any] | None) -> Iterator[RawRow]:
    answers = {one.get("question_id"): one for one in annotations["annotations"]} if annotations is not None else {}
    part = _part(path, questions)
    asked = {one.get("question_id") for one in questions["questions"] if isinstance(one, dict)}
    if annotations is not None and (strange := [key for key in answers if key not in asked]):
        raise UserError(
            f"{path}: {len(strange)} of {len(answers)} answers are to questions that it does not hold (the first:"
            f" question_id {shorten(strange[0])}): put the file of the same questions beside it"
        )
    name: str | None = None
    for number, one in enumerate(questions["questions"], start=1):
        where = f"{path} question {number}"
        if not isinstance(one, dict) or not {"image_id", "question", "question_id"} <= one.keys():
            yield RawRow(where, number, {}, f"it lacks image_id, question or question_id: {shorten(one)}")
            continue
        if not isinstance(one["image_id"], int):
            yield RawRow(where, number, {}, f"'image_id' is {shorten(one['image_id'])}: write a whole number")
            continue
        name = name or _picture_name(path, part, one["image_id"])
        fields = {"id": one["question_id"], "image": name.format(one["image_id"]), "question": one["question"]}
        given = answers.get(one["question_id"])
        if given is not None:
            listed = given.get("answers")
            texts = [each.get("answer") for each in listed if isinstance(each, dict)] if listed else []
            fields["answers"] = texts or [given.get("multiple_choice_answer")]
            if isinstance(given.get("answer_type"), str):
                fields["kind"] = given["answer_type"]
        yield RawRow(where, number, fields, pictures_in=(path.parent / name).parent)


def _picture_name(path: Path, part: str, image: int) -> str:
    """A picture's path with a place for its number, as the first picture is found; else as it is published."""
    names = [f"COCO_{part}_{{:012d}}.jpg", "{:012d}.jpg", "{}.jpg", "{}.png"]
    folders = [*_FOLDERS, *([part, f"../{part}"] if part else [])]
    for folder in folders:
        for name in names:
            if (path.parent / folder / name.format(image)).is_file():
                return str(Path(folder) / name)
    return f"{part}/{names[0]}" if part else names[1]


def _caption_rows(path: Path, value: Mapping[str, Any]) -> Iterator[RawRow]:
    annotations = value["annotations"]
    if any("caption" not in one for one in _some(annotations)):
        what = "boxes" if any("bbox" in one for one in _some(annotations)) else "no captions"
        raise UserError(f"{path} is a file of COCO's with {what}: only captions are learned, no task learns boxes")
    captions: dict[Any, list[Any]] = {}
    for one in annotations:
        if isinstance(one, dict):
            captions.setdefault(one.get("image_id"), []).append(one.get("caption"))
    folder: str | None = None
    part = _part(path, {})
    for number, image in enumerate(value["images"], start=1):
        where = f"{path} picture {number}"
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
            yield RawRow(where, number, {}, f"it lacks file_name: {shorten(image)}")
            continue
        if folder is None:
            tried = [*_FOLDERS, *([part, f"../{part}"] if part else [])]
            folder = next((one for one in tried if (path.parent / one / image["file_name"]).is_file()), ".")
        fields: dict[str, Any] = {"image": str(Path(folder) / image["file_name"])}
        if isinstance(image.get("id"), int | str):
            fields["id"] = image["id"]
        if texts := captions.pop(image.get("id"), None):
            fields["captions"] = texts
        yield RawRow(where, number, fields, pictures_in=path.parent / folder)
    if captions:
        raise UserError(
            f"{path}: {sum(map(len, captions.values()))} captions are of pictures that it does not list (the first:"
            f" image_id {shorten(next(iter(captions)))}): take them out, or list the pictures"
        )


def refuse_boxes(path: Path) -> Iterator[RawRow]:
    """What is said of Pascal VOC's annotations (.xml): boxes, which no task learns."""
    raise UserError(f"{path}: XML, such as Pascal VOC's boxes, is not read: no task learns boxes")
