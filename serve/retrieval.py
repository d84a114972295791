"""Search a folder of pictures by words or by a picture, and name what a picture shows, with the first stage alone.

An index is kept in the cache folder, one for each (folder, adapter): what has not changed is not encoded again.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from adapters.artefact.artefact import load_vision_side_artefact, vision_side_fingerprint
from adapters.data.image_ref import ImageRef
from adapters.data.images import open_image
from adapters.inference.retrieval import RERANKED, Retriever
from adapters.loading.assembly import chosen_dtype
from adapters.loading.vision_side import default_device
from qformer.atomic import whole_file
from qformer.errors import UserError
from qformer.sources import cache_root
from serve.adapter import ImageInput, default_adapter, picture_ref

SUFFIXES = (
    ".jpg", ".jpeg", ".jfif", ".png", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2",
)  # fmt: skip
_NOT_READ = (".heic", ".heif", ".svg", ".jxl", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raw")
TEMPLATES = ("a photo of {label}", "a picture of {label}", "{label}")
_FORMAT = 2  # raised when pictures are read or encoded otherwise
_LISTED = 10  # unreadable files that are named
_KEEP_EVERY = 30  # seconds between two writes while pictures are encoded


@dataclass(frozen=True)
class Hit:
    """A picture that was found: `score` is the cosine of ITC, `match` ITM's probability if it was asked."""

    path: str
    score: float
    match: float | None = None


@dataclass(frozen=True)
class IndexReport:
    """What an update of an index did: counts, and one line for each file that is no readable picture."""

    pictures: int
    encoded: int
    removed: int
    unreadable: tuple[str, ...]

    def left_out(self) -> list[str]:
        """What to tell of the unreadable files: the first few by name."""
        lines = [f"left out: {line}" for line in self.unreadable[:_LISTED]]
        if len(self.unreadable) > _LISTED:
            lines.append(f"left out: {len(self.unreadable)} files in all")
        return lines


@dataclass(frozen=True)
class _Entry:
    path: str  # relative to the folder
    size: int
    changed: int  # ns


class PictureIndex:
    """The embedded pictures of a folder and the folders in it.

    Args:
        folder: where the pictures are.
        retriever: what embeds them.
        key: names the adapter: another one's index is another file.

    Raises:
        UserError: there is no such folder.
    """

    def __init__(self, folder: str | Path, retriever: Retriever, *, key: str) -> None:
        self.folder = find_folder(folder)
        self.retriever = retriever
        name = hashlib.sha256(f"{_FORMAT}|{self.folder}|{key}".encode(errors="surrogateescape")).hexdigest()[:32]
        self._file = cache_root() / "indexes" / f"{name}.safetensors"
        self._entries: list[_Entry] = []
        self._embeddings = torch.empty(0)  # [N, Q, E] half precision

    def update(
        self,
        on_progress: Callable[[int, int], None] | None = None,
        *,
        embed: Callable[[Sequence[ImageRef]], Tensor] | None = None,
    ) -> IndexReport:
        """Bring the index up to date: new and changed files are encoded, others kept, lost ones dropped.

        What was encoded stays when the rest is interrupted. Two processes wait for each other.

        Args:
            on_progress: called with (done, files to encode).
            embed: N pictures to their vectors [N, Q, E]; the retriever's own if left out.

        Raises:
            UserError: the folder cannot be read, or the index not written.
        """
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(self._file.with_suffix(".lock")):
                return self._update(on_progress, embed or self.retriever.embed_images)
        except OSError as error:
            named = error.filename or self.folder
            raise UserError(f"{named}: cannot be read or written ({error.strerror}); mend its rights") from error

    def _update(
        self, on_progress: Callable[[int, int], None] | None, embed: Callable[[Sequence[ImageRef]], Tensor]
    ) -> IndexReport:
        known = self._read()
        pictures, unreadable = self._pictures()
        found = {str(path.relative_to(self.folder)): path for path in pictures}
        kept: list[tuple[_Entry, Tensor]] = []
        waiting: list[tuple[str, os.stat_result]] = []
        for name, path in found.items():
            try:
                status = path.stat()
            except FileNotFoundError:  # deleted since it was listed
                continue
            entry = known.get(name)
            if entry and (entry[0].size, entry[0].changed) == (status.st_size, status.st_mtime_ns):
                kept.append(entry)
            else:
                waiting.append((name, status))
        encoded, written = 0, time.monotonic()
        for start in range(0, len(waiting), 64):
            good: list[tuple[_Entry, ImageRef]] = []
            for name, status in waiting[start : start + 64]:
                ref = ImageRef(name, path=found[name])
                try:
                    open_image(ref)
                except UserError as error:
                    unreadable.append(str(error))
                    continue
                good.append((_Entry(name, status.st_size, status.st_mtime_ns), ref))
            if good:
                vectors = embed([ref for _, ref in good]).half()
                kept += [(entry, vector) for (entry, _), vector in zip(good, vectors, strict=True)]
                encoded += len(good)
                if time.monotonic() - written > _KEEP_EVERY:  # the features themselves are kept as they come
                    self._write(kept)
                    written = time.monotonic()
            if on_progress:
                on_progress(min(start + 64, len(waiting)), len(waiting))
        kept.sort(key=lambda pair: pair[0].path)
        removed = len(known.keys() - found.keys())
        if encoded or removed:
            self._write(kept)
        self._entries = [entry for entry, _ in kept]
        self._embeddings = torch.stack([vector for _, vector in kept]) if kept else torch.empty(0)
        return IndexReport(len(kept), encoded, removed, tuple(unreadable))

    def search(self, query: str | ImageRef, *, most: int = 5, rerank: bool = True) -> list[Hit]:
        """The best pictures for words or for a picture.

        Args:
            query: words, or a picture whose likes are wanted.
            most: how many.
            rerank: let ITM rank the best 16 (or `most`) for words again.

        Raises:
            UserError: the words are empty, or the index is.
        """
        if isinstance(query, str) and not query.strip():
            raise UserError("TEXT: it is empty; say what to look for")
        refs = [ImageRef(entry.path, path=self.folder / entry.path) for entry in self._entries]
        there = [number for number, ref in enumerate(refs) if ref.path and ref.path.is_file()]  # not deleted since
        if not there:
            raise UserError(f"{self.folder}: no pictures in it ({', '.join(SUFFIXES)})")
        embeddings = self._embeddings[there].float()
        found = rank(self.retriever, [refs[n] for n in there], embeddings, query, most=most, rerank=rerank)
        return [hit for _, hit in found]

    def _pictures(self) -> tuple[list[Path], list[str]]:
        """The files by their endings, each folder's once: a linked one's too, unless it is here by itself.

        And what is said of pictures of other kinds, and of links that lead nowhere.
        """
        found: list[Path] = []
        left_out: list[str] = []
        waiting, seen = [self.folder], set[Path]()
        while waiting:
            top = waiting.pop(0)
            if top.resolve() in seen:  # found meanwhile, or a link in a circle
                continue
            for folder, inner, names in os.walk(top, onerror=_refuse):
                if Path(folder).resolve() in seen:
                    inner.clear()
                    continue
                seen.add(Path(folder).resolve())
                for path in (Path(folder) / name for name in names):
                    ending, name = path.suffix.lower(), path.relative_to(self.folder)
                    if path.is_symlink() and not path.exists():
                        left_out.append(f"'{name}' is a link to what is not there: mend or delete it")
                    elif ending in SUFFIXES:
                        found.append(path)
                    elif ending in _NOT_READ:
                        left_out.append(f"'{name}': pictures in {ending} are not read; save it as JPEG or PNG")
                waiting += [Path(folder) / name for name in sorted(inner) if (Path(folder) / name).is_symlink()]
        return sorted(path for path in found if path.is_file()), sorted(left_out)

    def _read(self) -> dict[str, tuple[_Entry, Tensor]]:
        """What an earlier update left; a damaged index is made again."""
        try:
            tensors = load_file(self._file)
            listed = json.loads(tensors["entries"].numpy().tobytes())
            entries = [_Entry(**values) for values in listed]
            return {e.path: (e, vector) for e, vector in zip(entries, tensors["embeddings"], strict=True)}
        except (OSError, SafetensorError, ValueError, KeyError, TypeError):
            return {}

    def _write(self, kept: Sequence[tuple[_Entry, Tensor]]) -> None:
        text = bytearray(json.dumps([asdict(entry) for entry, _ in kept]).encode())  # never empty: "[]" at the least
        vectors = torch.stack([vector for _, vector in kept]) if kept else torch.empty(0)
        try:
            with whole_file(self._file) as partial:
                save_file({"entries": torch.frombuffer(text, dtype=torch.uint8), "embeddings": vectors}, partial)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self._file}: the index cannot be written ({error}); free space, then go on") from error


def rank(
    retriever: Retriever,
    refs: Sequence[ImageRef],
    embeddings: Tensor,
    query: str | ImageRef,
    *,
    most: int = 5,
    rerank: bool = True,
) -> list[tuple[int, Hit]]:
    """The best of some pictures for words or for a picture: each with its place among them.

    Args:
        retriever: what embedded them.
        refs: N pictures.
        embeddings: theirs, [N, Q, E].
        query: as in `PictureIndex.search`.
        most: as there.
        rerank: as there.
    """
    if isinstance(query, ImageRef):
        of_query = retriever.embed_images([query])[0]  # [Q, E]
        # the mean over the query's vectors of the nearest vector of each picture
        scores = torch.einsum("nqe,ke->nqk", embeddings, of_query).amax(dim=1).mean(dim=1)  # [N]
    else:
        scores = retriever.scores(embeddings, retriever.embed_texts([query]))[:, 0]
    count = min(max(most, RERANKED if rerank else most), len(scores))
    best = scores.topk(count).indices.tolist()
    matches: dict[int, float] = {}
    if rerank and isinstance(query, str):
        pairs = torch.tensor([[row, 0] for row in range(len(best))])
        odds = retriever.match([refs[index] for index in best], [query], pairs)
        matches = dict(zip(best, odds.sigmoid().tolist(), strict=True))
        order = retriever.combined(odds, scores[best]).argsort(descending=True).tolist()
        best = [best[place] for place in order]
    return [(index, Hit(refs[index].label, scores[index].item(), matches.get(index))) for index in best[:most]]


def _refuse(error: OSError) -> None:
    """Raise the error of a folder that cannot be listed: its pictures would count as removed."""
    raise error


def find_folder(folder: str | Path) -> Path:
    """A folder of pictures, made absolute.

    Raises:
        UserError: there is none.
    """
    found = Path(folder).expanduser().resolve()
    if not found.is_dir():
        raise UserError(f"FOLDER {folder}: {'this is a file' if found.exists() else 'there is no such folder'}")
    return found


def load_retriever(
    name: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    offline: bool = False,
) -> tuple[Retriever, str]:
    """Load what compares pictures and words, and the key of its weights. No language model is loaded.

    Args:
        name: a run's folder, an artefact's folder or a shipped adapter's name; left out, the default adapter.
        device: "cpu", "cuda", …; a GPU if there is one.
        dtype: "float32" or "bfloat16" for the computation; float32 if left out.
        offline: take frozen weights from the cache only.

    Raises:
        UserError: there is no such adapter, or it was trained without its text side.
    """
    chosen = name if name is not None else default_adapter()
    vision_side, _ = load_vision_side_artefact(chosen, device=device or default_device(), offline=offline)
    return Retriever(vision_side, compute_dtype=chosen_dtype(dtype) or torch.float32), vision_side_fingerprint(
        vision_side
    )


def classify(
    retriever: Retriever, picture: ImageInput, labels: Sequence[str], *, templates: Sequence[str] = TEMPLATES
) -> dict[str, float]:
    """Probabilities of labels for a picture, the likeliest first: a softmax over ITC's scores at its own temperature.

    If the image encoder was trained as a classifier, what it takes the picture for counts as much as ITC does
    (`adapters.inference.retrieval.Retriever.name`).

    Args:
        retriever: the loaded first stage.
        picture: what is to be named.
        labels: two or more; each goes into every template and the vectors are averaged (CLIP, arXiv 2103.00020).
        templates: sentences with `{label}`.

    Raises:
        UserError: fewer than two labels, one twice, a template without `{label}`, or a picture that cannot be read.
    """
    names = [label.strip() for label in labels if label.strip()]
    if len(names) < 2:
        raise UserError(f"--labels: {len(names)} given; name at least two, with commas between them")
    if len(set(names)) < len(names):
        raise UserError("--labels: one is there twice; name each once")
    for template in templates:
        if "{label}" not in template:
            raise UserError(f"--template '{template}': put {{label}} where the label goes")
    shares = retriever.name(picture_ref(picture), retriever.name_texts(names, templates), templates).tolist()
    return dict(sorted(zip(names, shares, strict=True), key=lambda pair: -pair[1]))
