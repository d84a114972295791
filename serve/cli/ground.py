"""`querybridge ground`: where a phrase is in a picture, as a box and a heat map, without a language model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qformer.errors import UserError
from serve.cli.common import AdapterOption, DeviceOption, JsonOption, OfflineOption, report

if TYPE_CHECKING:
    from serve.adapter import LoadedAdapter
    from serve.looking.grounding import Grounding


def ground(
    image: Annotated[str, typer.Argument(help="The picture.")],
    phrase: Annotated[str, typer.Argument(help="What to look for, such as the man in red.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="A picture to write: .png or .jpg, with the box and the heat map.")
    ] = None,
    adapter: AdapterOption = None,
    device: DeviceOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Find a phrase in a picture: a box and a heat map."""
    from adapters.data.image_ref import image_ref
    from adapters.data.images import open_image

    check_drawing(out, "--out")
    ref = image_ref(image)
    picture = open_image(ref)  # mistakes are reported before anything is loaded
    if not phrase.strip():
        raise UserError("PHRASE: it is empty; say what to look for, such as the man in red")
    from serve.looking.grounding import describe_found, load_grounder

    (found,) = load_grounder(adapter, device=device, offline=offline).find(ref, [phrase])
    if out is not None:
        save_drawing(picture, [found], out, "--out")
    values = {"image": image, **as_values(found)} | ({"out": str(out)} if out is not None else {})
    report(values, as_json, describe_found(found))


def as_values(found: Grounding) -> dict[str, Any]:
    """What was found, for JSON: fractions of the picture, and pixels."""
    return {
        "phrase": found.phrase,
        "box": list(found.box) if found.box is not None else None,
        "pixels": list(pixels) if (pixels := found.pixels()) is not None else None,
        "point": list(found.point),
        "heat": [[round(float(value), 5) for value in row] for row in found.heat],
    }


def show_answer(adapter: LoadedAdapter, image: str, answer: str, out: Path | None) -> tuple[dict[str, Any], str]:
    """Draw where the things are that an answer names; what was found, for JSON, and a line for people.

    Args:
        adapter: what answered.
        image: the picture.
        answer: what it said.
        out: the drawing's file; None does nothing.

    Raises:
        UserError: the adapter cannot look for phrases, or the file cannot be written.
    """
    if out is None:
        return {}, ""
    from adapters.data.image_ref import image_ref
    from adapters.data.images import open_image
    from serve.looking.grounding import NO_HEAD, Grounder
    from serve.looking.named_things import things_named

    names = things_named(answer)
    if not names:
        return {"shown": []}, f"\nThe answer names nothing that could be shown, so {out} was not written."
    grounder = Grounder(adapter.assembly.vision_side)
    found = grounder.find(image, names)
    save_drawing(open_image(image_ref(image)), found, out, "--show")
    line = f"\n{out}: {', '.join(one.phrase for one in found)}"
    return {"show": str(out), "shown": [as_values(one) for one in found]}, line + (
        "" if grounder.has_head else f". {NO_HEAD}"
    )


def check_drawing(out: Path | None, flag: str) -> None:
    """Raise a UserError if a drawing could not be written under this name."""
    if out is not None and out.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise UserError(f"{flag} {out}: name a .png or .jpg file")


def save_drawing(picture: Any, found: Sequence[Grounding], out: Path, flag: str) -> None:
    """Draw what was found over an opened picture, into a file.

    Raises:
        UserError: it cannot be written.
    """
    from serve.looking.grounding import draw_found

    try:
        draw_found(picture, found).save(out)
    except OSError as error:
        raise UserError(f"{flag} {out}: cannot be written ({error.strerror or error}); name another file") from error
