"""Names that other tools give to the fields of a row: for hints, never to read a row by them."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

_OTHER_NAMES = {
    "image": (
        "image_path", "image_file", "image_name", "image_url", "img", "img_path", "filename", "file", "filepath",
        "file_path", "path", "photo", "picture", "pictures", "url",
    ),
    "question": ("prompt", "query", "questions", "q", "ask", "input", "user", "text_input", "problem", "text"),
    "answer": ("label", "response", "output", "target", "multiple_choice_answer", "direct_answers", "a"),
    "caption": ("text", "description", "sentence", "sentences", "raw", "alt", "alt_text"),
}  # fmt: skip
_QUESTION_MARKS = ("?", "\uff1f")
_OWN = {"image", "file_name", "images", "answer", "answers", "caption", "captions", "id", "question_id", "language"}


def meant_for(name: str, fields: Mapping[str, Any]) -> str | None:
    """The field of a row that was probably meant for a field that it lacks: by its name, or because it asks something.

    Args:
        name: "image", "question", "answer" or "caption".
        fields: of the row.
    """
    unread = {str(field).strip().lower(): str(field) for field in fields if str(field) not in _OWN}
    for other in (name, *_OTHER_NAMES.get(name, ())):
        if other in unread:
            return unread[other]
    if near := difflib.get_close_matches(name, unread, n=1, cutoff=0.8):
        return unread[near[0]]
    if name == "question":
        texts = ((field, fields[field]) for field in unread.values())
        return next(
            (field for field, text in texts if isinstance(text, str) and text.rstrip().endswith(_QUESTION_MARKS)), None
        )
    return None
