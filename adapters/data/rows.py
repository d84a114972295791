"""From the fields of one row to an Example: which task they are for, and what each must hold."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from adapters.data.answers import normalise
from adapters.data.bad_row import BadRow
from adapters.data.conversations import conversation_of, is_conversation
from adapters.data.examples import Example
from adapters.data.field_names import meant_for
from adapters.data.formats.raw_rows import RawRow, kind_of, known_file, shorten
from adapters.data.image_ref import ImageRef
from adapters.data.picture_files import Pictures
from adapters.data.prompts import CAPTION_REQUEST, IMAGE_MARK, Turn
from adapters.tasks import Task

IMAGE_FIELDS = ("image", "file_name", "images")  # the second as in an imagefolder's metadata
ANSWER_FIELDS = ("answer", "answers")
CAPTION_FIELDS = ("caption", "captions")
ID_FIELDS = ("id", "question_id")
RATIONALE_FIELD = "rationale"
_LIST_AS_TEXT = re.compile(r"""\s*\[\s*(["']).*\1\s*\]\s*""", re.DOTALL)
_APART = re.compile(r"\s+([.,;:!?]+)(?=\s|$)")  # punctuation apart from the words, as a word of its own


def tasks_of(fields: Mapping[str, Any], *, need_answers: bool, asked: str | None = None) -> tuple[Task, ...]:
    """Infer from a row's fields what it can be read as, what it is first; BadRow if it is neither VQA nor captions.

    A conversation is read as the questions and answers that it is made of. A row with a rationale is one to reason
    about, and can be read as VQA, without it; so can one without, if it is to be answered.

    Args:
        fields: of the row.
        need_answers: False for rows to be answered: then a picture alone asks for its caption.
        asked: the task that the user names, if any. Only who names captions gets them of a row with an empty question,
            or with a field that may be a question under another name.
    """
    if is_conversation(fields):
        return ("vqa",)
    tasks: list[Task] = []
    if "question" in fields and RATIONALE_FIELD in fields:
        tasks += ["reason", "vqa"]
    elif "question" in fields:
        tasks += ["vqa"] if need_answers else ["vqa", "reason"]
    if has_captions(fields):
        tasks.append("caption")
    if need_answers or any(name in fields for name in ANSWER_FIELDS):
        if not tasks:
            raise BadRow(_taskless(fields, need_answers))
    elif not tasks and asked != "caption":
        if whole := _whole_file(fields):
            raise BadRow(whole)
        if near := meant_for("question", fields):
            raise BadRow(f"field 'question' is missing, and there is '{near}': is that it? Write 'question'")
        if asked is not None:
            raise BadRow("field 'question' is missing: add it, or ask for captions with --task caption")
        tasks.append("caption")
    elif asked == "caption" and "caption" not in tasks and not str(fields.get("question", "")).strip():
        tasks.append("caption")
    return tuple(tasks)


def _whole_file(fields: Mapping[str, Any]) -> str | None:
    whole = known_file([name for name, value in fields.items() if isinstance(value, list)])
    return f"this is a whole file, not a row: {whole}" if whole else None


def _taskless(fields: Mapping[str, Any], need_answers: bool) -> str:
    """What is said of a row with neither a question nor a caption."""
    answered = any(name in fields for name in ANSWER_FIELDS)
    names = ("question",) if answered else ("question", "caption")
    if whole := _whole_file(fields):
        return whole
    found = shorten(", ".join(map(str, fields)) or "nothing", 80)
    hints = [f"'{near}' to '{name}' if that is it" for name in names if (near := meant_for(name, fields))]
    advice = f"rename {', or '.join(hints)}" if hints else _wanted(need_answers)
    return f"field {' or '.join(map(repr, names))} is missing (found: {found}): {advice}"


def has_captions(fields: Mapping[str, Any]) -> bool:
    """Whether a row holds captions, under either name."""
    return any(name in fields for name in CAPTION_FIELDS)


def _wanted(need_answers: bool) -> str:
    vqa = "image, question and answer" if need_answers else "image and question"
    return f"write {vqa}, or image and caption{'' if need_answers else ' or image alone'}"


def read_row(row: RawRow, task: Task, pictures: Pictures, *, need_answers: bool) -> list[Example]:
    """Read one row as VQA, captions or a question with reasons; a conversation is an example for each answer.

    Each of a conversation's examples has the turns before it as its history. Of rows to be answered, there is one: the
    user's last turn.

    Raises:
        BadRow: a field is missing, empty, of a wrong type or there under two names, a picture is not there, the
            question's `<image>` marks are not as many as the pictures, or the answer is none of the choices.
    """
    if task == "vqa" and is_conversation(row.fields):
        return _conversation(row, pictures, need_answers)
    return [_single(row, task, pictures, need_answers)]


def _conversation(row: RawRow, pictures: Pictures, need_answers: bool) -> list[Example]:
    fields = row.fields
    shown = _images(fields) if any(fields.get(name) is not None for name in IMAGE_FIELDS) else []
    said = conversation_of(fields, shown)
    turns = [
        Turn(one.role, one.text, tuple(pictures.find(picture, row.where, row.pictures_in) for picture in one.pictures))
        for one in said
    ]
    language = _text(fields, "language") if fields.get("language") is not None else "en"
    id_field = _present(fields, ID_FIELDS, required=False)
    own_id = _scalar(fields[id_field], id_field) if id_field in fields else str(row.number)
    asked = [number for number, turn in enumerate(turns) if turn.role == "user"]
    if need_answers and turns[-1].role == "user":
        raise BadRow("the conversation ends with the user's turn, so its answer is missing: add it")
    examples = []
    for rank, place in enumerate(asked, start=1):
        answer = turns[place + 1].text if place + 1 < len(turns) else None
        if (need_answers and not said[place + 1].learned) or not (need_answers or rank == len(asked)):
            continue
        kind = fields["kind"] if isinstance(fields.get("kind"), str) else f"turn {rank}" if len(asked) > 1 else None
        examples.append(
            Example(
                images=tuple(image for turn in turns[: place + 1] for image in turn.images),
                question=turns[place].text,
                answers=() if answer is None else (answer,),
                where=row.where,
                id=f"{own_id}/{rank}" if need_answers and len(asked) > 1 else own_id,
                language=language,
                row=row.number,
                kind=kind,
                history=tuple(turns[:place]),
            )
        )
    if not examples:
        raise BadRow("each of the assistant's turns has weight 0, so nothing is learned: leave the row out")
    if any(not example.images for example in examples):
        raise BadRow("its first question comes before any picture: show one in the user's first turn")
    return examples


def _single(row: RawRow, task: Task, pictures: Pictures, need_answers: bool) -> Example:
    fields = row.fields
    labels = _images(fields)
    question = _text(fields, "question") if task != "caption" else ""
    if (marks := question.count(IMAGE_MARK)) not in (0, len(labels)):
        raise BadRow(
            f"'question' has {marks} {IMAGE_MARK} mark{'s' * (marks > 1)} and the row {len(labels)}"
            f" picture{'s' * (len(labels) > 1)}: make the two numbers equal, or leave the marks out"
        )
    answer_field = _present(fields, CAPTION_FIELDS if task == "caption" else ANSWER_FIELDS, required=need_answers)
    answers = _texts(fields[answer_field], answer_field, need_answers) if answer_field in fields else ()
    language = _text(fields, "language") if fields.get("language") is not None else "en"
    if task == "caption" and language not in CAPTION_REQUEST:
        raise BadRow(f"'language' is '{shorten(language)}': take one of {', '.join(CAPTION_REQUEST)}")
    if task == "caption":
        answers = tuple(close_up(answer) for answer in answers)
    id_field = _present(fields, ID_FIELDS, required=False)
    own_id = _scalar(fields[id_field], id_field) if id_field in fields else str(row.number)
    images = tuple(pictures.find(label, row.where, row.pictures_in) for label in labels)
    kind = fields["kind"] if isinstance(fields.get("kind"), str) else None  # anything else goes by this name too
    example = Example(images, question, answers, row.where, own_id, language, row.number, kind=kind)
    if task == "reason":
        return replace(example, **_asked_with(fields, answers), **_reasons(fields))
    alone = task == "caption" or RATIONALE_FIELD in fields  # a row of reasons that is read as VQA is its question alone
    if not alone and ("context" in fields or "choices" in fields):
        return replace(example, **_asked_with(fields, answers))
    return example


def close_up(caption: str) -> str:
    """A caption without the space before its punctuation and at its ends, which sets such as Flickr8k come with.

    Scorers do not see the difference (they leave punctuation out), but people do.
    """
    return _APART.sub(r"\1", caption).strip()


def _asked_with(fields: Mapping[str, Any], answers: tuple[str, ...]) -> dict[str, Any]:
    """What belongs to a question beside its words, and the answers as choices; absent, null and "" are the same."""
    context = _optional(fields, "context")
    choices: tuple[str, ...] = ()
    if (value := fields.get("choices")) is not None:
        if not isinstance(value, list):
            raise BadRow(f"'choices' is {kind_of(value)} ({shorten(value)}): write a list of texts")
        choices = tuple(_answer(item, "choices") for item in value)
        if len(choices) < 2:
            raise BadRow(f"'choices' holds {len(choices)}: give at least two, or leave the field out")
        known = {normalise(choice): choice for choice in choices}
        for answer in answers:
            if normalise(answer) not in known:
                raise BadRow(f"the answer '{shorten(answer)}' is none of the choices ({_listed(choices)}): correct one")
        answers = tuple(known[normalise(answer)] for answer in answers)  # in the very words of the choice
    return {"answers": answers, "context": context, "choices": choices}


def _reasons(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What only a row with reasons has; absent, null and "" are the same."""
    steps = fields.get("steps")  # for scores by group; anything else goes by this name too
    return {
        "rationale": _optional(fields, RATIONALE_FIELD),
        "steps": steps if isinstance(steps, int) and not isinstance(steps, bool) else None,
    }


def _optional(fields: Mapping[str, Any], name: str) -> str:
    return _text(fields, name) if fields.get(name) not in (None, "") else ""


def _listed(choices: tuple[str, ...]) -> str:
    return shorten(", ".join(choices))


def _images(fields: Mapping[str, Any]) -> list[str | ImageRef]:
    """The pictures a row names, in order: a text, or a list of texts under either name; or the pictures themselves."""
    name = _present(fields, IMAGE_FIELDS)
    value = fields[name]
    if isinstance(value, ImageRef):
        return [value]
    if not isinstance(value, list):
        return [_text(fields, name)]
    if not value:
        raise BadRow(f"'{name}' is an empty list: name at least one picture")
    for item in value:
        if not isinstance(item, str | ImageRef) or not (isinstance(item, ImageRef) or item.strip()):
            kind = "an empty text" if isinstance(item, str) else f"{kind_of(item)} ({shorten(item)})"
            raise BadRow(f"'{name}' holds {kind}: write each picture as text in quotes")
    return value


def _present(fields: Mapping[str, Any], names: tuple[str, ...], *, required: bool = True) -> str:
    """Return the one of the names that the row has, else the first name if the field may be absent."""
    there = [name for name in names if name in fields]
    if len(there) > 1:
        raise BadRow(f"the row has both '{there[0]}' and '{there[1]}': keep one of them")
    if not there and required:
        found = shorten(", ".join(map(str, fields)) or "nothing", 80)
        near = meant_for(names[0], fields)
        advice = f"rename '{near}' to '{names[0]}' if that is it" if near else "add it"
        raise BadRow(f"field '{names[0]}' is missing or empty (found: {found}): {advice}")
    return there[0] if there else names[0]


def _text(fields: Mapping[str, Any], name: str) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise BadRow(f"'{name}' is {kind_of(value)} ({shorten(value)}): write text in quotes")
    if not value.strip():
        raise BadRow(f"'{name}' is empty: fill it in")
    return value


def _texts(value: object, name: str, needed: bool) -> tuple[str, ...]:
    values = value if isinstance(value, list) else [value]
    if not needed:
        values = [item for item in values if item is not None and item != ""]
    elif not values:
        raise BadRow(f"'{name}' is an empty list: give at least one")
    return tuple(_answer(item, name) for item in values)


def _answer(value: object, name: str) -> str:
    """A text to learn or to compare: without space at its ends, and with composed letters, so that equals are equal."""
    text = _scalar(value, name).strip()
    if text.startswith("[") and _LIST_AS_TEXT.fullmatch(text):
        raise BadRow(f'\'{name}\' holds a list written as text ({shorten(text)}): write a JSON list ["…", "…"]')
    return unicodedata.normalize("NFC", text)


def _scalar(value: object, name: str) -> str:
    """Take text, and a number as the text it is written as ("how many?" has such answers)."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise BadRow(f"'{name}' holds {kind_of(value)} ({shorten(value)}): write text in quotes")
    if isinstance(value, float) and not math.isfinite(value):
        raise BadRow(f"'{name}' holds {json.dumps(value)}, which is no number: write text in quotes, or leave it out")
    if not str(value).strip():
        raise BadRow(f"'{name}' is empty: fill it in")
    return str(value)
