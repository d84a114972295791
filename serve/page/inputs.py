"""What comes from people: uploaded files through our own opener, settings within their bounds; mistakes as messages."""

from __future__ import annotations

import mimetypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from adapters.data.image_ref import ImageRef
from adapters.data.images import open_image
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.page.security import inside
from serve.pending import Busy

MAX_TOKENS = 512
MAX_BEAMS = 8


@contextmanager
def show_user_errors() -> Iterator[None]:
    """Show a user's mistake on the page, and to a program as its error; ours still reach the terminal."""
    try:
        yield
    except UserError as error:
        raise gr.Error(toast(error), duration=15, title="That didn't work", print_exception=False) from error
    except Busy as error:
        raise gr.Error(
            "Many questions are waiting: try again in a moment.", duration=10, title="Busy just now",
            print_exception=False,
        ) from error  # fmt: skip


def toast(error: UserError) -> str:
    """A message as the page shows it: as HTML, and a file's name is anybody's."""
    return escape(str(error), quote=False)


def uploaded(file: Any, folder: Path) -> ImageRef:
    """The uploaded file under the name its owner knows it by, seen to be a picture.

    Args:
        file: as the page's components hand it over, unopened; a program may send anything.
        folder: where uploads lie.

    Raises:
        UserError: there is none, it was not uploaded, it has been deleted since, or it is no picture.
    """
    if not isinstance(file, Mapping) or not file.get("path"):
        raise UserError("There is no picture yet: drop one on the page, or press it to choose a file")
    path = Path(str(file["path"]))
    if not inside(str(path), folder):
        raise UserError("The picture was not uploaded: send the file itself, not a path on this machine")
    ref = ImageRef(Path(str(file.get("orig_name") or path.name)).name, path=path)
    check_kept(ref)
    open_image(ref)
    return ref


def check_kept(picture: ImageRef) -> None:
    """Raise a UserError if an uploaded picture has been deleted since."""
    if picture.path is not None and not picture.path.exists():
        raise UserError(f"'{picture.label}' was uploaded a while ago and has been deleted since: upload it again")


def file_data(picture: ImageRef) -> dict[str, Any]:
    """An uploaded picture for the page to show again under its own name."""
    kind = mimetypes.guess_type(picture.label)[0] or "image/png"
    return gr.FileData(path=str(picture.path), orig_name=picture.label, mime_type=kind).model_dump()


def words(text: object, ask: str) -> str:
    """A text field's content without blanks around it.

    Raises:
        UserError: it is empty; `ask` says what to do.
    """
    found = str(text or "").strip()
    if not found:
        raise UserError(ask)
    return found


def whole(value: Any, name: str) -> int:
    """A whole number that was sent.

    Raises:
        UserError: it is none.
    """
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise UserError(f"{name}: '{value}' is no whole number") from None


@dataclass(frozen=True)
class Settings:
    """How answers are made, as set under "Settings"; 0 leaves length and beams to the tab.

    Attributes:
        longest: of an answer, in tokens.
        temperature: above 0 samples.
        top_p: nucleus of the sampling.
        beams: of the search.
    """

    longest: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    beams: int = 0

    @classmethod
    def of(cls, values: Sequence[Any]) -> Settings:
        """Settings from what the page's sliders, or a program, sent, in the order of the attributes.

        Raises:
            UserError: one is out of its bounds, or two do not go together.
        """
        bounds = {"longest": (0, MAX_TOKENS), "temperature": (0, 2), "top_p": (0.05, 1), "beams": (0, MAX_BEAMS)}
        found: dict[str, float] = {}
        for (name, (low, high)), value in zip(bounds.items(), values, strict=True):
            try:
                found[name] = float(value)
            except (TypeError, ValueError):
                raise UserError(f"{name}: '{value}' is no number") from None
            if not low <= found[name] <= high:
                raise UserError(f"{name}: {value} is outside of {low} to {high}")
        if found["temperature"] > 0 and found["beams"] > 1:
            raise UserError("temperature and beams do not go together: set temperature to 0, or beams to 0 or 1")
        return cls(int(found["longest"]), found["temperature"], found["top_p"], int(found["beams"]))

    def over(self, default_decoding: Decoding) -> Decoding:
        """What a tab usually takes, with what is set in its place."""
        chosen = replace(default_decoding, top_p=self.top_p, temperature=self.temperature)
        if self.longest:
            chosen = replace(chosen, max_new_tokens=self.longest)
        if self.beams or self.temperature > 0:
            chosen = replace(chosen, num_beams=self.beams or 1)
        return chosen

    def sampled(self, temperature: float, top_p: float) -> Settings:
        """The same, but sampled: at the temperature set, or at the given one if none is."""
        if self.temperature > 0:
            return self
        return replace(self, temperature=temperature, top_p=min(self.top_p, top_p), beams=0)
