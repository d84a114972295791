"""Pictures that come inside a data file: their bytes lie on disk, not in memory, each content once."""

from __future__ import annotations

import atexit
import hashlib
import os
import tempfile
from pathlib import Path

from adapters.data.image_ref import ByteRange, ImageRef
from qformer.errors import UserError


class PictureStore:
    """A temporary file that pictures are copied to, deleted when the program ends. It lies where `TMPDIR` says."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._known: dict[bytes, ImageRef] = {}
        self._end = 0

    def keep(self, content: bytes, label: str) -> ImageRef:
        """Keep a picture; one that is there already is not kept again, and has its first label.

        Raises:
            UserError: there is no room.
        """
        sha = hashlib.sha256(content)
        known = self._known.get(sha.digest())
        if known is not None:
            return known
        try:
            if self._path is None:
                descriptor, name = tempfile.mkstemp(prefix="querybridge-", suffix=".pictures")
                os.close(descriptor)
                self._path = Path(name)
                atexit.register(self._path.unlink, missing_ok=True)
            with self._path.open("ab") as file:
                file.write(content)
        except OSError as error:
            raise UserError(
                f"no room for the pictures of a data file in {tempfile.gettempdir()} ({error.strerror}): set TMPDIR to"
                " a folder with more"
            ) from error
        ref = ImageRef(label, part=ByteRange(self._path, self._end, len(content)))
        ref.__dict__["_content_digest"] = sha.hexdigest()  # known without reading it again
        self._end += len(content)
        self._known[sha.digest()] = ref
        return ref
