"""The frozen encoder's features, computed once for each distinct picture and kept on disk for all later runs.

`<root>/features/<encoder>/<ab>/<digest>.npy` holds the features of the picture whose bytes have that SHA-256. The
encoder's folder is named by a hash of its identity (weights, layer, transform, dtype, …), which lies inside in clear
as `identity.json`. Any number of processes may use the folder at once: files appear whole, and two processes that
encode the same picture at the same time write the same file twice, which does no harm.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import shutil
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from adapters.data.image_ref import ImageRef
from adapters.features import files as feature_files
from adapters.features.files import EncoderFiles
from adapters.features.prefetch import decoded_batches
from qformer.errors import UserError

_LIMIT_VARIABLE = "QUERYBRIDGE_FEATURES_GIB"
_DEFAULT_LIMIT = 20  # GiB

# Part of every key: raise it when pictures are decoded or encoded otherwise or the files' format changes.
_VERSION = 2
_TOGETHER_ON_GPU = 16
_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}  # Windows has no quota error


def _configured_bytes() -> int:
    """The bound on the features of all encoders: `$QUERYBRIDGE_FEATURES_GIB`, or 20 GiB.

    Raises:
        UserError: the variable is not a number above 0.
    """
    text = os.environ.get(_LIMIT_VARIABLE, str(_DEFAULT_LIMIT))
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 0 < gib < math.inf:
        raise UserError(f"{_LIMIT_VARIABLE}={text}: give a number of GiB above 0, such as 100")
    return int(gib * 2**30)


class Encoder(Protocol):
    """What the cache asks of an image encoder."""

    def identity(self) -> Mapping[str, object]:
        """All that the features depend on, JSON-able."""
        ...

    def preprocess(self, images: Sequence[Image]) -> Tensor:
        """Pictures → pixels [B, 3, H, W]; called from several threads."""
        ...

    def __call__(self, pixels: Tensor) -> Tensor:
        """Pixels → features [B, P, D]."""
        ...


class FeatureCache:
    """Features of one encoder, from disk if they are there, else computed and stored.

    Args:
        encoder: frozen; asked only for pictures that the cache does not have.
        root: the cache folder; None takes `$QUERYBRIDGE_CACHE` or the user's cache folder.
        max_bytes: the most that the features of all encoders under `root` may take together; None takes
            `_configured_bytes()`. Beyond it the least
            recently used go, but never those that a live cache of this process was asked to `fill`.
        together: pictures for each call of the encoder, always as many: a matrix product may round otherwise in another
            shape, and a picture's features must not depend on what was encoded with it. Fewer are filled up with the
            last one. On a CPU take 1: there the place in a batch counts too.
        half: keep features in float16 where they fit into its range; False keeps float32, of which nothing is rounded.
    """

    _live: ClassVar[weakref.WeakSet[FeatureCache]] = weakref.WeakSet()

    def __init__(
        self,
        encoder: Encoder,
        root: Path | None = None,
        max_bytes: int | None = None,
        *,
        together: int = 1,
        half: bool = True,
    ) -> None:
        self.encoder = encoder
        self.root = feature_files.features_root(root)
        self.identity = dict(encoder.identity())
        self.half = half
        if not half:  # other files, so another key; that of half precision stays as it was
            self.identity["features"] = "float32"
        self.key = encoder_key(self.identity)
        self.folder = self.root / self.key
        self.together = together
        self.max_bytes = max_bytes if max_bytes is not None else _configured_bytes()
        self._filled: set[str] = set()  # what `fill` was asked for: this run's data
        self._file_bytes = 0  # the size of one file, once known
        self._total: int | None = None  # bytes under root when last counted
        self._written = 0  # bytes written since
        self._live.add(self)

    def fill(
        self,
        refs: Sequence[ImageRef],
        *,
        batch_size: int = 16,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> int:
        """Encode those of the pictures that are missing, and hold all of them while this cache lives.

        To be called with a run's whole data before its first epoch. Batches that were finished stay when the rest
        is interrupted.

        Args:
            refs: pictures; the same bytes twice count once.
            batch_size: pictures decoded and kept together; the features do not depend on it.
            on_progress: called with (done, missing) before the first batch and after each.

        Returns:
            How many pictures were encoded here.

        Raises:
            UserError: a picture cannot be read, the disk is full, or the bound is too small for the data.
        """
        wanted = _distinct(refs)
        before = self._filled
        self._filled = before | wanted.keys()
        try:
            return self._encode_missing(wanted, batch_size, on_progress)
        except UserError:
            self._filled = before
            raise

    def hold(self, refs: Iterable[ImageRef]) -> None:
        """Keep what is there of these pictures from being evicted while this cache lives, as `fill` does."""
        self._filled = self._filled.union(ref.digest() for ref in refs)

    def missing(self, refs: Iterable[ImageRef]) -> list[ImageRef]:
        """Those of the pictures that are not in the cache, each once."""
        seen = {digest: ref for digest, ref in _distinct(refs).items() if not self._is_there(digest)}
        return list(seen.values())

    def load(self, refs: Sequence[ImageRef]) -> Tensor:
        """Return features [B, P, D] on the CPU, in float16, or float32 if that is kept or a picture's exceed its range.

        What is missing is encoded first, in batches of 16. A damaged file is encoded again, with one warning.

        Raises:
            UserError: as in `fill`.
        """
        if not refs:
            raise ValueError("load: no pictures")
        wanted = _distinct(refs)
        features: Tensor | None = None
        # Another process with a smaller bound may evict between encoding and reading, so try again, but not for ever.
        for _ in range(3):
            features, lost = self._read(refs)
            if not lost:
                break
            self._encode_missing({digest: wanted[digest] for digest in lost}, 16, None, needed=wanted)
        if features is None:
            raise UserError(
                f"{self.folder}: features vanish as they are written: another process holds the cache to a smaller "
                "bound; stop it, or set QUERYBRIDGE_CACHE to a folder of this process's own"
            )
        return features

    def info(self) -> list[EncoderFiles]:
        """Tell what lies under the root, for each encoder."""
        return feature_files.inventory(self.root)

    def clear(self) -> int:
        """Remove this encoder's features. Returns the bytes freed."""
        self._total = None
        return feature_files.remove(self.folder)

    def _path(self, digest: str) -> Path:
        return self.folder / digest[:2] / f"{digest}{feature_files.SUFFIX}"

    def _read(self, refs: Sequence[ImageRef]) -> tuple[Tensor | None, list[str]]:
        """Read all, or name the digests that are lost."""
        out: np.ndarray | None = None
        lost: dict[str, bool] = {}  # damaged?
        for row, ref in enumerate(refs):
            path = self._path(ref.digest())
            try:
                with self._disk_errors():
                    features = feature_files.read(path)  # [P, D]
            except FileNotFoundError:
                lost[ref.digest()] = False
                continue
            except feature_files.DamagedFile:
                lost[ref.digest()] = True
                continue
            if lost:
                continue
            if out is None:
                out = np.empty((len(refs), *features.shape), features.dtype)
            elif out.dtype != np.result_type(out, features):
                out = out.astype(np.float32)
            out[row] = features  # copied at once: a mapped file holds a file handle
        damaged = [digest for digest, is_damaged in lost.items() if is_damaged]
        if damaged:
            example = self._path(damaged[0])
            warnings.warn(f"{len(damaged)} damaged feature file(s), encoded again; the first: {example}", stacklevel=3)
            for digest in damaged:
                self._path(digest).unlink(missing_ok=True)
        return (None if lost or out is None else torch.from_numpy(out)), list(lost)

    def _encode_missing(
        self,
        wanted: Mapping[str, ImageRef],
        batch_size: int,
        on_progress: Callable[[int, int], None] | None,
        needed: Iterable[str] = (),
    ) -> int:
        missing = [ref for digest, ref in wanted.items() if not self._is_there(digest)]
        if not missing:
            return 0
        protected = {*wanted, *needed}
        with self._disk_errors(len(missing)):
            feature_files.write_identity(self.folder, self.identity)
        if self._file_bytes:
            self._check_room(len(missing), protected)
        encoded = done = 0
        if on_progress is not None:
            on_progress(0, len(missing))
        with contextlib.closing(decoded_batches(missing, self.encoder.preprocess, batch_size)) as batches:
            for batch, pixels in batches:
                # Another process may have encoded some of them since.
                rows = [row for row, ref in enumerate(batch) if not self._is_there(ref.digest())]
                if rows:
                    refs = [batch[row] for row in rows]
                    arrays = self.encode(refs, pixels[rows] if len(rows) < len(batch) else pixels)
                    if not self._file_bytes:
                        self._file_bytes = feature_files.size_on_disk(arrays[0])
                        self._check_room(len(missing), protected)
                    with self._disk_errors(len(missing) - done):
                        written = sum(
                            feature_files.write(self._path(ref.digest()), array)
                            for ref, array in zip(refs, arrays, strict=True)
                        )
                        self._hold_bound(written, protected)
                    encoded += len(rows)
                done += len(batch)
                if on_progress is not None:
                    on_progress(done, len(missing))
        return encoded

    def _is_there(self, digest: str) -> bool:
        path = self._path(digest)
        try:
            with self._disk_errors():
                status = path.stat()
        except FileNotFoundError:
            return False
        feature_files.note_use(path, status)
        self._file_bytes = max(self._file_bytes, status.st_size)
        return True  # what is inside is checked when it is read

    def encode(self, refs: Sequence[ImageRef], pixels: Tensor) -> list[np.ndarray]:
        """Encode b pictures' pixels [b, 3, H, W]; each one's features [P, D] in the smallest type that holds them.

        Nothing is read or kept.

        Raises:
            UserError: features are not finite.
        """
        with torch.no_grad():
            parts = [self.encoder(part)[:count].detach().float().cpu() for part, count in self._equal_parts(pixels)]
        features = torch.cat(parts)  # [b, P, D]
        if features.ndim != 3 or len(features) != len(refs):
            raise ValueError(f"the encoder made {tuple(features.shape)} of {len(refs)} pictures, not [B, P, D]")
        half = features.half()
        arrays = []
        for row, ref in enumerate(refs):
            if self.half and half[row].isfinite().all():
                arrays.append(half[row].numpy())
            elif features[row].isfinite().all():
                arrays.append(features[row].numpy())
            else:
                raise UserError(
                    f"{ref.where or 'image'}: '{ref.label}': the image encoder's features are not finite numbers: "
                    "run it on the CPU (--device cpu), where it computes in float32"
                )
        return arrays

    def _equal_parts(self, pixels: Tensor) -> Iterator[tuple[Tensor, int]]:
        """Cut pixels [b, 3, H, W] into parts of `together` pictures; with each, how many of it are not repeated.

        Each part is a copy: a library's sums may also depend on how memory is aligned.
        """
        for start in range(0, len(pixels), self.together):
            part = pixels[start : start + self.together]
            rows = torch.arange(self.together).clamp(max=len(part) - 1)
            yield part[rows], len(part)

    def _check_room(self, missing: int, protected: set[str]) -> None:
        """Fail before the hours of encoding, not after: against the bound and against the disk."""
        need = len(protected | self._filled) * self._file_bytes
        need += sum(len(cache._filled) * cache._file_bytes for cache in self._same_root() if cache is not self)
        if need > self.max_bytes:
            raise UserError(
                f"the features of this data take {need:,} bytes, but the cache is held to {self.max_bytes:,}: "
                f"set {_LIMIT_VARIABLE} to more GiB, take fewer pictures, or a smaller encoder"
            )
        if missing * self._file_bytes > shutil.disk_usage(self.folder).free:
            raise UserError(self._no_room(missing))

    def _no_room(self, missing: int) -> str:
        need = f" need {missing * self._file_bytes:,} bytes" if self._file_bytes else " have no room"
        return (
            f"no space left in {self.folder}: the features of {missing} pictures{need}: free some, or set "
            "QUERYBRIDGE_CACHE to a folder on a larger disk"
        )

    @contextlib.contextmanager
    def _disk_errors(self, missing: int = 0) -> Iterator[None]:
        """Turn the disk's errors into the user's, but for a file that is not there."""
        try:
            yield
        except FileNotFoundError:
            raise
        except OSError as error:
            if error.errno in _FULL:
                raise UserError(self._no_room(missing)) from error
            raise UserError(
                f"cannot use {self.folder} ({error.strerror or error}): mend its rights, or set "
                "QUERYBRIDGE_CACHE to another folder"
            ) from error

    def _hold_bound(self, written: int, protected: set[str]) -> None:
        """Count and evict, seldom enough to cost nothing, often enough to see what other processes write."""
        self._written += written
        known = self._total is not None and self._written < self.max_bytes // 20
        if known and (self._total or 0) + self._written <= self.max_bytes:
            return
        caches = self._same_root()

        def keep(path: Path) -> bool:
            key, digest = path.parent.parent.name, path.stem
            filled = any(cache.key == key and digest in cache._filled for cache in caches)
            return filled or (key == self.key and digest in protected)

        self._total = feature_files.bound(self.root, self.max_bytes, keep)
        self._written = 0

    def _same_root(self) -> list[FeatureCache]:
        """The caches of this process whose files share the bound: two towers' do."""
        return [cache for cache in list(self._live) if cache.root == self.root]


def pictures_together(device: str) -> int:
    """How many pictures a cache's encoder takes at a time: one on a CPU, a fixed number on a GPU."""
    return 1 if torch.device(device).type == "cpu" else _TOGETHER_ON_GPU


def encoder_key(identity: Mapping[str, object]) -> str:
    """Return the folder's name for an encoder: 32 hex digits of SHA-256 over its identity as canonical JSON."""
    content = {"version": _VERSION, "identity": identity}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _distinct(refs: Iterable[ImageRef]) -> dict[str, ImageRef]:
    """Return one reference for each distinct picture, by digest, in the order given."""
    distinct: dict[str, ImageRef] = {}
    for ref in refs:
        distinct.setdefault(ref.digest(), ref)
    return distinct
