"""What comes from people: uploaded files through our own opener, settings within their bounds; mistakes as messages."""

from __future__ import annotations

import inspect
import mimetypes
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from html import escape, unescape
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import LocalContext

from adapters.data.image_ref import ImageRef
from adapters.data.images import open_image
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.engine.pending import CLIENT, Busy
from serve.page.security import inside

MAX_TOKENS = 512
MAX_BEAMS = 8


_BYTES = re.compile(r" \(it starts with b(['\"]).*\1\)")
_NAME_FIRST = re.compile(r"^[A-Z]{4,}: ")
_FLAG_FIRST = re.compile(r"^--([a-z][\w-]*)")
_TITLE = re.compile(r"^<strong>[^<]*</strong> ")
_FLAG = re.compile(r"--([a-z][\w-]*)")


@contextmanager
def show_user_errors() -> Iterator[None]:
    """Show a user's mistake on the page, and to a program as its error; ours still reach the terminal."""
    as_visitor()
    try:
        yield
    except UserError as error:
        raise gr.Error(titled("That didn't work", error), duration=15, print_exception=False) from error
    except Busy as error:
        raise gr.Error(
            titled("Busy just now", "Many questions are waiting: try again in a moment."), duration=10,
            print_exception=False,
        ) from error  # fmt: skip


def as_visitor() -> None:
    """Have what is asked from here on count as this visitor's: the engine gives each of them a turn."""
    request = LocalContext.request.get(None)
    CLIENT.set(str(getattr(request, "session_hash", None) or ""))


def titled(title: str, message: UserError | str) -> str:
    """A message as the page shows it, under its title: as HTML, and a file's name is anybody's.

    The page's library shows no title of an error's own.
    """
    return f"<strong>{escape(title, quote=False)}</strong> {escape(plain_words(str(message)), quote=False)}"


def plain_words(text: str) -> str:
    """A message without what only a terminal's user knows: flags, and a file's first bytes."""
    plain = _NAME_FIRST.sub("", _BYTES.sub("", text))
    plain = _FLAG_FIRST.sub(lambda flag: flag[1].replace("-", " "), plain)
    return _FLAG.sub(lambda flag: f"“{flag[1].replace('-', ' ')}”", plain)


def for_programs(call: Callable[..., Any]) -> Callable[..., Any]:
    """An endpoint's function whose text parameters hold text, and whose messages are plain text, no HTML.

    Args:
        call: a function or a generator function; parameters that are annotated `str` or `str | None` are checked.
    """
    texts = {name for name, one in inspect.signature(call).parameters.items() if str(one.annotation).startswith("str")}

    def check(values: Sequence[Any]) -> None:
        for name, value in zip(inspect.signature(call).parameters, values, strict=False):
            if name in texts and value is not None and not isinstance(value, str):
                raise UserError(f"{name}: it is {type(value).__name__}; send text")

    @contextmanager
    def plainly() -> Iterator[None]:
        try:
            yield
        except gr.Error as error:
            error.message = unescape(_TITLE.sub("", str(error.message)))
            raise

    @wraps(call)
    def answer(*values: Any) -> Any:
        with plainly(), show_user_errors():
            check(values)
            return call(*values)

    @wraps(call)
    def stream(*values: Any) -> Iterator[Any]:
        with plainly(), show_user_errors():
            check(values)
            yield from call(*values)

    return stream if inspect.isgeneratorfunction(call) else answer


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
    if text is not None and not isinstance(text, str):
        raise UserError(f"{type(text).__name__} was sent in the place of words: send text")
    found = (text or "").strip()
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
            if isinstance(value, bool):
                raise UserError(f"{name}: {value} is no number")
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
