"""What earlier starts worked out of the very same rows: tokenised questions, and what a run is compared with.

`<cache>/starts/` holds a file for each. Its name is a hash of all that its content depends on: every row with the
bytes of its pictures, the tokenizer and the wording, the image encoders, the libraries' versions, and the source code
of this package. So nothing in it can be out of date; without it, or if it is damaged, it is worked out again.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from adapters.data.batches import tokenise
from adapters.data.examples import DataSet, Example
from adapters.data.image_ref import ImageRef, recall_digests
from adapters.data.prompts import PromptBuilder
from adapters.data.tokenised import TokenisedPictures
from adapters.loading.assembly import Assembly
from adapters.tasks import Stage
from qformer.atomic import whole_file
from qformer.sources import cache_root

FEWEST_ROWS = 1000  # of fewer, all is worked out in a moment
_LARGEST = 256 * 2**20  # bytes that are kept of one start
_MOST_FILES = 16
_DIGEST = 32  # bytes
_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy")


class StartMemory:
    """The memory of one start.

    Args:
        assembly: its prompts and towers are used.
        max_tokens: as `adapters.data.batches.tokenise` takes it.
        stages: likewise.
        folder: where the files lie; None takes the cache folder.
    """

    def __init__(
        self, assembly: Assembly, *, max_tokens: int, stages: Sequence[Stage], folder: Path | None = None
    ) -> None:
        self.prompts = assembly.prompts
        self.depends = [assembly.recipe.task, *(cache.key for cache in assembly.caches)]
        self.max_tokens = max_tokens
        self.stages = tuple(stages)
        self.folder = folder or cache_root() / "starts"
        self._sets: list[str] = []  # hashes of the data sets so far
        self._wording = ""  # "" if nothing is remembered

    def tokenise(self, data: DataSet) -> TokenisedPictures:
        """As `adapters.data.batches.tokenise`.

        Raises:
            UserError: likewise.
        """
        how: Any = {"max_tokens": self.max_tokens, "stages": self.stages}
        is_large = len(data.examples) >= FEWEST_ROWS
        if is_large and not self._wording:
            self._wording = _wording(self.prompts)
        if not self._wording:
            return tokenise(data, self.prompts, **how)
        recall_digests(data.images)
        rows, pictures = _rows(data)
        self._sets.append(rows)
        if not is_large:
            return tokenise(data, self.prompts, **how)
        key = _hash("tokenised", rows, self._wording, repr(how), _code())
        if (known := self._read(key)) is not None:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return TokenisedPictures.restored(known, pictures)
        found = tokenise(data, self.prompts, **how)
        self._write(key, found.stored)
        return found

    def controls(self, compute: Callable[[], dict[str, float]], **options: object) -> dict[str, float]:
        """The scores of what a run does not change, over the data sets that were tokenised here.

        Args:
            compute: works them out.
            options: what they depend on besides.
        """
        if len(self._sets) < 2:  # training and validation data, the first of them large
            return compute()
        how = repr((self.max_tokens, self.stages, sorted(options.items())))
        key = _hash("controls", *self._sets, self._wording, *self.depends, how, _code())
        if (known := self._read(key)) is not None:
            with contextlib.suppress(ValueError):
                return {str(name): float(value) for name, value in json.loads(known).items()}
        found = compute()
        self._write(key, lambda: json.dumps(found).encode())
        return found

    def _read(self, key: str) -> bytes | None:
        """What is known under a key; None if nothing is, or it is damaged."""
        path = self.folder / key
        try:
            content = path.read_bytes()
            os.utime(path)
        except OSError:
            return None
        known = content[_DIGEST:]
        return known if hashlib.sha256(known).digest() == content[:_DIGEST] else None

    def _write(self, key: str, make: Callable[[], bytes]) -> None:
        """Keep it, and let the files go that were used the longest ago; a full disk costs the memory only."""
        with contextlib.suppress(OSError):
            content = make()
            if len(content) > _LARGEST:
                return
            self.folder.mkdir(parents=True, exist_ok=True)
            with whole_file(self.folder / key) as partial:
                partial.write_bytes(hashlib.sha256(content).digest() + content)
            newest = sorted(self.folder.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)
            for path in newest[_MOST_FILES:]:
                path.unlink(missing_ok=True)


def start_files(root: Path) -> list[Path]:
    """The files that earlier starts left in a cache folder, half-written ones included."""
    kept = re.compile(r"[0-9a-f]{64}(\..*)?")
    folder = root / "starts"
    return [path for path in folder.iterdir() if kept.fullmatch(path.name)] if folder.is_dir() else []


def _rows(data: DataSet) -> tuple[str, dict[str, ImageRef]]:
    """A hash of all that is learned from rows, with their pictures' bytes; and the pictures by digest."""
    sha = hashlib.sha256(str(data.task).encode())
    pictures: dict[str, ImageRef] = {}
    for example in data.examples:
        digests = []
        for image in example.images:
            digests.append(image.digest())
            pictures.setdefault(digests[-1], image)
        sha.update(repr((digests, _said(example))).encode())
    return sha.hexdigest(), pictures


def _said(example: Example) -> tuple[object, ...]:
    turns = [(turn.role, turn.text, [image.digest() for image in turn.images]) for turn in example.history]
    one = example
    asked = (one.question, one.answers, one.language, one.task, one.context, one.choices)
    return (*asked, one.rationale, one.stages, one.turn, turns)


def _wording(prompts: PromptBuilder) -> str:
    """A hash of all that makes tokens of words; "" if the tokenizer cannot be told from another."""
    backend = getattr(prompts.tokenizer, "backend_tokenizer", None)
    if backend is None or not hasattr(backend, "to_str"):
        return ""
    given = {name: value for name, value in vars(prompts).items() if name not in ("tokenizer", "_control")}
    special = (prompts.tokenizer.special_tokens_map, getattr(prompts.tokenizer, "chat_template", None))
    return _hash(backend.to_str(), type(prompts.tokenizer).__name__, repr(special), repr(sorted(given.items())))


@lru_cache(maxsize=1)
def _code() -> str:
    """A hash of this package's source and of the libraries' versions: other code may come to another result."""
    sha = hashlib.sha256(repr([version(name) for name in _LIBRARIES]).encode())
    rooms = Path(__file__).parents[1]
    for room in (rooms, rooms.with_name("qformer")):
        for path in sorted(room.rglob("*.py")):
            sha.update(f"{path.relative_to(rooms.parent)}\n".encode() + path.read_bytes())
    return sha.hexdigest()


def _hash(*parts: str) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(f"{len(part)} {part}\n".encode())
    return sha.hexdigest()
