"""Conversations as tools write them, read as one thing: OpenAI's and LLaMA-Factory's messages, ShareGPT, LLaVA, alpaca.

Shapes: `{"messages": [{"role", "content"}], "images"}`, the content a text with `<image>` marks or a list of parts;
`{"conversations": [{"from", "value"}], "image"}`; `{"texts": [{"user", "assistant"}], "images"}`; and
`{"instruction", "input", "output", "system", "history", "images"}`.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from adapters.data.bad_row import BadRow
from adapters.data.formats.raw_rows import kind_of, shorten
from adapters.data.image_ref import ImageRef
from adapters.data.prompts import IMAGE_MARK, words_between

Picture = str | ImageRef
_Content = tuple[str, list[Picture | None]]
Role = Literal["system", "user", "assistant"]

SHAPES = ("messages", "conversations", "texts", "instruction")
"""Fields by which a conversation is known."""
SHAPE_FIELDS = (*SHAPES, "input", "output", "system", "history")
"""All fields of conversations."""
_ROLES: dict[str, Role] = {
    "system": "system", "developer": "system", "user": "user", "human": "user", "assistant": "assistant",
    "gpt": "assistant", "model": "assistant",
}  # fmt: skip
_AGAINST = (
    "question", "answer", "answers", "caption", "captions", "choices", "context", "rationale"
)  # fmt: skip
_NOT_READ = ("videos", "audios", "tools", "functions", "chosen", "rejected")
_TURN_FIELDS = {"role", "content", "from", "value", "weight", "name"}
_TEXT_PARTS = ("text", "input_text", "output_text")
_PICTURE_PARTS = ("image", "image_url", "input_image")
_END_MARKS = re.compile(rf"^(?:\s*{IMAGE_MARK})+\s*|\s*(?:{IMAGE_MARK}\s*)+$")


@dataclass(frozen=True)
class Said:
    """One turn, before its pictures are looked up.

    Attributes:
        role: who speaks.
        text: in words; marks stand only where a picture lies between words.
        pictures: that its marks, or its parts, show.
        learned: whether it is learned from, if it is the assistant's.
    """

    role: Role
    text: str
    pictures: tuple[Picture, ...] = ()
    learned: bool = True


def is_conversation(fields: Mapping[str, Any]) -> bool:
    """Whether a row is a conversation: one of its fields is a shape's, and holds something."""
    return bool(_shapes(fields))


def _shapes(fields: Mapping[str, Any]) -> list[str]:
    found = [name for name in SHAPES if fields.get(name) is not None]
    texts = fields.get("texts")
    if "texts" in found and not (isinstance(texts, list) and texts and isinstance(texts[0], dict)):
        found.remove("texts")
    return found


def conversation_of(fields: Mapping[str, Any], shown: Sequence[Picture]) -> list[Said]:
    """A row's turns: a system turn perhaps, then the user's and the assistant's by turns.

    Args:
        fields: of the row.
        shown: the pictures that the row names beside its turns, in order; marks and empty picture parts take them.

    Raises:
        BadRow: it is not of such a form, or marks and pictures are not as many.
    """
    shapes = _shapes(fields)
    both = [*shapes, *(name for name in _AGAINST if fields.get(name) is not None)]
    if len(both) > 1:
        raise BadRow(f"the row has both '{both[0]}' and '{both[1]}': keep one of them")
    strange = next((name for name in _NOT_READ if fields.get(name)), None)
    if strange is not None:
        raise BadRow(f"'{strange}' is not read: take it out, or leave the row out")
    return _checked(_with_pictures(list(_turns(shapes[0], fields)), shown, shapes[0]), shapes[0])


@dataclass(frozen=True)
class _Turn:
    """One turn as it is written: its text, and its pictures in order, None for the next of the row's own."""

    role: Role
    content: _Content
    learned: bool = True


def _turns(shape: str, fields: Mapping[str, Any]) -> Iterator[_Turn]:
    if fields.get("system") not in (None, ""):
        yield _Turn("system", _content(fields["system"], "'system'"))
    if shape == "instruction":
        yield from _alpaca(fields)
        return
    listed = fields[shape]
    if not isinstance(listed, list) or not listed:
        raise BadRow(f"'{shape}' is {kind_of(listed) if listed else 'empty'}: write a list of turns")
    for number, turn in enumerate(listed, start=1):
        where = f"'{shape}' turn {number}"
        if not isinstance(turn, dict):
            raise BadRow(f"{where} is {kind_of(turn)} ({shorten(turn)}): write an object with role and content")
        if shape == "texts":
            yield _Turn("user", _content(turn.get("user"), where))
            yield _Turn("assistant", _content(turn.get("assistant"), where))
            continue
        role = turn.get("role", turn.get("from"))
        if not isinstance(role, str) or role not in _ROLES:
            raise BadRow(f"{where} is by {shorten(role)}: the roles that are read are system, user and assistant")
        strange = [name for name, value in turn.items() if name not in _TURN_FIELDS and value not in (None, "", [])]
        if strange:
            raise BadRow(f"{where} has '{shorten(strange[0])}', which is not read: take it out, or leave the row out")
        content = _content(turn.get("content", turn.get("value")), where)
        yield _Turn(_ROLES[role], content, turn.get("weight") != 0)


def _alpaca(fields: Mapping[str, Any]) -> Iterator[_Turn]:
    history = fields.get("history") or []
    if not isinstance(history, list):
        raise BadRow(f"'history' is {kind_of(history)}: write a list of [question, answer]")
    for number, pair in enumerate(history, start=1):
        where = f"'history' entry {number}"
        if not isinstance(pair, list) or len(pair) != 2:
            raise BadRow(f"{where} is {shorten(pair)}: write [question, answer]")
        yield _Turn("user", _content(pair[0], where))
        yield _Turn("assistant", _content(pair[1], where))
    asked = [_text(fields[name], f"'{name}'") for name in ("instruction", "input") if fields.get(name)]
    yield _Turn("user", _content("\n".join(asked), "'instruction'"))
    if fields.get("output") is not None:
        yield _Turn("assistant", _content(fields["output"], "'output'"))


def _text(value: object, where: str) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{where} is {kind_of(value)} ({shorten(value)}): write text in quotes")
    return value


def _content(content: object, where: str) -> _Content:
    """A turn's text and its pictures. Pictures at an end of the words come first, as the page and the API put them."""
    if not isinstance(content, list):
        return _marked_text(_text(content, where))
    parts = [_part(part, where) for part in content]
    texts = [part for part in parts if isinstance(part, str)]
    if len(texts) == len(parts):
        return _marked_text("\n".join(texts))
    if any(IMAGE_MARK in text for text in texts):
        raise BadRow(f"{where} has both parts that are pictures and {IMAGE_MARK} marks: keep one of them")
    pictures = [part[0] for part in parts if not isinstance(part, str)]
    return words_between([part if isinstance(part, str) else None for part in parts]), pictures


def _marked_text(text: str) -> _Content:
    """A text with marks, which stay only if words are on both sides of one."""
    count = text.count(IMAGE_MARK)
    bare = _END_MARKS.sub("", text)
    return text if IMAGE_MARK in bare else bare, [None] * count


def _part(part: object, where: str) -> str | tuple[Picture | None]:
    """A part's text; or its picture, None for the next of the row's own."""
    if isinstance(part, str):
        return part
    if not isinstance(part, dict) or part.get("type") not in (*_TEXT_PARTS, *_PICTURE_PARTS):
        kind = part.get("type") if isinstance(part, dict) else part
        raise BadRow(f"{where} has a part of the kind {shorten(kind)}: only text and pictures are read")
    if part["type"] in _TEXT_PARTS:
        return _text(part.get("text"), where)
    names = ("image_url", "image", "url", "path")
    found = next((part[name] for name in names if part.get(name) is not None), None)
    if isinstance(found, dict):
        found = found.get("url")
    if found is None or isinstance(found, ImageRef):
        return (found,)
    return (_text(found, f"{where}, its picture,"),)


def _with_pictures(turns: list[_Turn], shown: Sequence[Picture], shape: str) -> list[Said]:
    """Turns with the row's pictures at their places; without any place, all come first in the user's first turn."""
    places = sum(picture is None for turn in turns for picture in turn.content[1])
    named = any(turn.content[1] for turn in turns)
    if places != len(shown) and named:
        raise BadRow(
            f"'{shape}' has {places} {IMAGE_MARK} mark{'s' * (places != 1)} and the row {len(shown)}"
            f" picture{'s' * (len(shown) != 1)}: make the two numbers equal, or leave the marks out"
        )
    left = iter(shown)
    first = next((number for number, turn in enumerate(turns) if turn.role == "user"), -1)
    said = []
    for number, turn in enumerate(turns):
        text, pictures = turn.content
        own = tuple(next(left) if picture is None else picture for picture in pictures)
        if not named and number == first:
            own = tuple(shown)
        said.append(Said(turn.role, unicodedata.normalize("NFC", text.strip()), own, turn.learned))
    return said


def _checked(said: list[Said], shape: str) -> list[Said]:
    expected: Role = "user"
    for number, turn in enumerate(said, start=1):
        where = f"'{shape}' turn {number}"
        if turn.role == "system" and number == 1:
            if turn.pictures:
                raise BadRow(f"{where} is the system's and shows a picture: let the user show it")
            continue
        if turn.role != expected:
            raise BadRow(f"{where} is the {turn.role}'s, and the {expected}'s is due: let the two speak by turns")
        if turn.role == "assistant" and turn.pictures:
            raise BadRow(f"{where} is the assistant's and has a picture's mark: only the user shows pictures")
        if not turn.text.replace(IMAGE_MARK, "").strip():
            raise BadRow(f"{where} has no words: fill it in")
        expected = "assistant" if expected == "user" else "user"
    if not any(turn.role == "user" for turn in said):
        raise BadRow(f"'{shape}' has no turn of the user's: add it")
    if not any(turn.pictures for turn in said):
        raise BadRow("the conversation has no picture: add 'image' or 'images', or leave the row out")
    return said
