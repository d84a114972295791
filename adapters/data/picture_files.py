"""The pictures that rows name, as files: found, and refused where they lie outside the data's own folder."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from adapters.data.bad_row import BadRow
from adapters.data.formats.raw_rows import shorten
from adapters.data.image_ref import ImageRef, image_ref, windows_hint
from qformer.errors import UserError

_LONGEST_PATH = 200  # characters; what is longer is probably a picture itself
_BASE64 = " (a base64 picture begins with 'data:image/png;base64,')"
ALLOW_OUTSIDE = "--allow-outside (in a recipe, data.allow_outside: true)"
"""What messages say of pictures that lie elsewhere."""


class MissingImage(BadRow):
    """The row names a picture that is not there."""

    def __init__(self, label: str, path: Path) -> None:
        advice = "correct the path or add the file"
        super().__init__(f"image '{label}' is not there (looked for {path}): {windows_hint(label) or advice}")
        self.label = label


class Pictures:
    """The pictures that rows name: each file looked up once and one reference kept for all its rows.

    A data file may come from anybody. What it names outside its own folder, by `..`, by an absolute path or through a
    link, is therefore refused unless it is allowed: pages, reports and converted files hold copies of pictures.

    Args:
        base: the folder that relative paths start from, and that pictures must lie in.
        also: other folders that they may lie in.
        allow_outside: they may lie anywhere.
    """

    def __init__(self, base: Path, *, also: Iterable[Path] = (), allow_outside: bool = False) -> None:
        self._base = base
        self._allow_outside = allow_outside
        self._folders = frozenset(os.path.realpath(folder) for folder in (base, *also))
        self._found: dict[str, ImageRef | MissingImage] = {}
        self._marks: dict[str, str] = {}

    def find(self, text: str | ImageRef, where: str, within: Path | None = None) -> ImageRef:
        """Return the reference; BadRow if nothing can be there, MissingImage if the file is not.

        Args:
            text: a path or a data URI; a picture that lies inside the data file is a reference already.
            where: file and row.
            within: another folder that it may lie in.
        """
        if isinstance(text, ImageRef):
            return text.found_at(where)
        if text.startswith("data:"):
            return _reference(text, self._base)
        found = self._found.get(text)
        if found is None:
            found = self._found[text] = self._look_up(text, where, within)
        if isinstance(found, MissingImage):
            raise found
        return found

    def mark(self, image: ImageRef) -> str:
        """Tell a picture from another cheaply: its name and size, or the digest of its bytes."""
        return image.mark() or self._marks.get(image.label) or image.digest()

    def _look_up(self, text: str, where: str, within: Path | None) -> ImageRef | MissingImage:
        found = _reference(text, self._base)
        assert found.path is not None  # not a data URI
        try:
            if not self._allow_outside:
                self._check_inside(text, found.path, within)
            status = os.stat(found.path)
        except (FileNotFoundError, NotADirectoryError):
            return MissingImage(text, found.path)
        except (OSError, ValueError) as error:
            hint = _BASE64 if len(text) > _LONGEST_PATH else ""
            raise BadRow(f"image '{shorten(text)}' is not a usable path: {_cause(error)}{hint}") from None
        if not stat.S_ISREG(status.st_mode):
            raise BadRow(f"image '{text}' is not a file: give the path of a picture")
        self._marks[text] = f"{text} {status.st_size}"
        return ImageRef(text, path=found.path, where=where)

    def _check_inside(self, text: str, path: Path, within: Path | None) -> None:
        """See, before anything is looked for there, that a path leads nowhere else; BadRow if it does."""
        real = os.path.realpath(path)
        folders = self._folders if within is None else {*self._folders, os.path.realpath(within)}
        if not any(is_in(real, folder) for folder in folders):
            lexical = os.path.abspath(path)
            leads = f" (it is, or lies behind, a link to {real})" if is_in(lexical, os.path.abspath(self._base)) else ""
            raise BadRow(
                f"image '{shorten(text, 200)}' lies outside the data's own folder, {self._base.absolute()}{leads}: put"
                f" it there, or add {ALLOW_OUTSIDE} if you trust the data{_BASE64 if len(text) > _LONGEST_PATH else ''}"
            )


def is_in(path: str, folder: str) -> bool:
    """Whether a path is a folder's or lies in it, as they are written; links are not followed."""
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _reference(text: str, base: Path) -> ImageRef:
    try:
        return image_ref(text, base=base)
    except UserError as error:  # here it is the row's fault, and can be skipped with it
        raise BadRow(str(error)) from None


def _cause(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
