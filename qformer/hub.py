"""A model of a hub as a local folder: which revision, which of its files, and what is said if it cannot be had.

What a repository holds is asked first, so that one without safetensors is refused before anything is fetched, and of a
published BLIP-2 in shards only the files with the tensors that are needed come.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from qformer import wheels
from qformer.errors import UserError
from qformer.published import FAMILY, needed_files
from qformer.wheels import PYPI_SOURCES

HUB_ID = re.compile(r"(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>\w[\w./-]*))?")
"""`org/name` or `org/name@revision`; a revision is a branch, a tag or a commit."""

_INDEX = "model.safetensors.index.json"
# weights, configuration and tokenizers; not the same weights again for other runtimes
_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja")
_IGNORED = ("*.fp16.safetensors", "*.fp16-*.safetensors", "consolidated*", "flax_*", "tf_*")
_FOLDERS = ("qformer_tokenizer",)  # InstructBLIP's second tokenizer; other folders are other models
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.h5", "*.msgpack")


def hub_folder(source: str, offline: bool, parts: Sequence[str] = ()) -> Path:
    """The folder of a model of a hub, fetched if it is not there.

    Args:
        source: `org/name` or `org/name@revision`.
        offline: take it from the hub's cache only.
        parts: beginnings of the names of the tensors that are needed; () for all.

    Raises:
        UserError: it is not there, holds no safetensors, or cannot be fetched.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    found = HUB_ID.fullmatch(source)
    assert found is not None
    name, revision = found["name"], found["revision"]
    local = ", ".join(f"pypi:{known}" for known, entry in PYPI_SOURCES.items() if entry.kind != "data")
    try:
        chosen = None if offline else _files_to_fetch(name, revision, source, parts)
        return Path(
            snapshot_download(
                name,
                revision=revision,
                allow_patterns=chosen or list(_FILES),
                ignore_patterns=None if chosen else ["*/*", *_IGNORED],
                local_files_only=offline,
            )
        )
    except HFValidationError as error:
        raise UserError(f"source {source!r} is neither a folder nor a hub id: give 'org/name'") from error
    except GatedRepoError as error:
        raise UserError(
            f"source {source!r}: the hub asks to accept this model's terms; do so there, then `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise UserError(f"source {source!r}: the hub has {name}, but no revision {revision!r}; mind it") from error
    except RepositoryNotFoundError as error:
        raise UserError(
            f"source {source!r}: neither a folder here nor a model on the hub; mind the spelling"
        ) from error
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        if offline:
            raise UserError(
                f"source {source!r} is not in the hub's cache and --offline was asked: run once without it"
            ) from error
        with wheels.write_errors(_hub_cache()):
            if isinstance(error, OSError) and not isinstance(error, HfHubHTTPError) and error.errno is not None:
                raise error
        raise UserError(
            f"source {source!r}: no folder of that name, and the hub cannot be reached; give a local folder, "
            f"set HF_ENDPOINT to a mirror, or use what needs no hub ({local})"
        ) from error


def _files_to_fetch(name: str, revision: str | None, source: str, parts: Sequence[str]) -> list[str] | None:
    """Names of the files to fetch; None if the hub cannot be asked now: a copy in its cache may do.

    Raises:
        UserError: there are no safetensors among them.
    """
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError

    try:
        listed = list_repo_files(name, revision=revision)
    except RepositoryNotFoundError:  # gated ones too
        raise
    except OfflineModeIsEnabled:
        return None
    except HfHubHTTPError as error:
        if error.response is not None and error.response.status_code == 404:
            raise
        return None
    except Exception as error:
        if not cannot_be_reached(error):
            raise
        return None
    files = [file for file in listed if _is_wanted(file)]
    if not any(file.endswith(".safetensors") for file in files):
        pickles = sorted(file for file in listed if any(fnmatchcase(file, pattern) for pattern in _PICKLES))
        holds = f"only {pickles[0]}, a pickle, which is never read" if pickles else "no *.safetensors"
        raise UserError(
            f"source {source!r}: the repository holds {holds}; nothing was fetched: name a revision that has them"
            f" ({name}@REVISION), or convert it once (from_pretrained and save_pretrained of transformers) and name the"
            " folder"
        )
    if parts and _INDEX in files and "config.json" in files:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=["config.json", _INDEX]))
        if json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type") in FAMILY:
            shards = needed_files(folder / _INDEX, parts)
            files = [file for file in files if not file.endswith(".safetensors") or file in shards]
    return files


def cannot_be_reached(error: Exception) -> bool:
    """Whether an error says that there is no way to the hub: one of the HTTP library's own, whichever that is."""
    return type(error).__module__.partition(".")[0].startswith("httpx")  # httpx2 in newer versions


def _is_wanted(file: str) -> bool:
    folder, _, name = file.rpartition("/")
    if folder and folder not in _FOLDERS:
        return False
    return any(fnmatchcase(name, pattern) for pattern in _FILES) and not any(
        fnmatchcase(name, pattern) for pattern in _IGNORED
    )


def _hub_cache() -> Path:
    from huggingface_hub.constants import HF_HUB_CACHE

    return Path(HF_HUB_CACHE)
