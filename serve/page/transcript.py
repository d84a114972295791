"""A conversation to take away: as Markdown with its pictures in it, or as JSON."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

from adapters.data.image_ref import ImageRef
from adapters.data.images import open_image
from qformer.errors import UserError
from serve.page.conversation import Conversation
from serve.page.notes import how_it_went

_SIDE = 768  # pixels, the longest side of a picture's copy


def as_markdown(conversation: Conversation) -> str:
    """The conversation as Markdown; pictures are small copies inside it.

    Raises:
        UserError: there is nothing to take away yet.
    """
    parts = ["# Conversation"]
    for number, turn in enumerate(_turns(conversation)):
        parts.append(f"## {'Question' if turn.role == 'user' else 'Answer'}")
        parts += [_picture(image) for image in turn.images]
        parts.append("\n".join(f"> {line}" for line in turn.text.splitlines() or [""]))
        if turn.role == "assistant":
            said = conversation.said[number // 2]
            parts.append(how_it_went(said.answer, said.seconds))
    return "\n\n".join(parts) + "\n"


def as_json(conversation: Conversation) -> list[dict[str, Any]]:
    """The conversation as a list of turns: `role`, `text`, `pictures` (names) and, of an answer, what came of it.

    Raises:
        UserError: there is nothing to take away yet.
    """
    found: list[dict[str, Any]] = []
    for number, turn in enumerate(_turns(conversation)):
        one: dict[str, Any] = {"role": turn.role, "text": turn.text}
        if turn.role == "user":
            one["pictures"] = [image.label for image in turn.images]
        else:
            said = conversation.said[number // 2]
            one |= {
                "confidence": said.answer.confidence,
                "adapter": said.answer.adapter,
                "seconds": round(said.seconds, 2),
                "finish": said.answer.finish,
            }
        found.append(one)
    return found


def _turns(conversation: Conversation) -> Iterator[Any]:
    if not conversation.turns:
        raise UserError("There is nothing to download yet: ask something first")
    return iter(conversation.turns)


def _picture(image: ImageRef) -> str:
    name = image.label.translate(str.maketrans("[]()\n", "     "))
    try:
        picture = open_image(image)
    except UserError:
        return f"*{name}: deleted since*"
    picture.thumbnail((_SIDE, _SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, format="JPEG", quality=85)
    return f"![{name}](data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()})"
