"""An adapter to a hub's repository: a clean copy of its artefact, with a card whose metadata the hub can read."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adapters.artefact.artefact import find_artefact, read_recipe
from adapters.artefact.facts import Facts, read_facts
from adapters.artefact.publishing import publish
from adapters.loading.bundled import MODELS, SOURCES
from qformer.errors import UserError, first_line
from qformer.hub import HUB_ID, cannot_be_reached

_TAGS = ("querybridge", "vision-language", "q-former")
_PIPELINES = {"vqa": "visual-question-answering", "caption": "image-to-text"}
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def push(
    name: str, repository: str, *, license: str = "other", datasets: Sequence[str] = (), private: bool = False
) -> dict[str, Any]:
    """Upload an adapter or a bundle.

    What is uploaded names training files without their folders, and sources of weights as they are.

    Args:
        name: as `adapters.artefact.artefact.find_artefact` takes it.
        repository: `org/name`; made if it is not there.
        license: of the adapter, by the hub's short name; "other" points to the card's terms.
        datasets: of the hub, `org/name`, that it was trained on.
        private: make a new repository a private one.

    Returns:
        `repository`, `url` and `files`.

    Raises:
        UserError: a name is none, a source is a folder of this machine, or the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    for flag, given in (("REPOSITORY", repository), *(("--dataset", one) for one in datasets)):
        found = HUB_ID.fullmatch(given)
        if found is None or found["revision"]:
            raise UserError(f"{flag} {given}: give 'org/name'")
    if _LICENSE.fullmatch(license) is None:
        raise UserError(f"--license {license}: give the hub's short name, such as apache-2.0, mit or other")
    artefact = find_artefact(name)
    _check_sources(artefact)
    api = HfApi()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / repository.rpartition("/")[2]
        facts = publish(artefact, folder, read_facts(artefact).metrics)
        front = card_metadata(artefact, facts, license, datasets)
        card = folder / "README.md"
        card.write_text(f"---\n{front}\n---\n\n{card.read_text(encoding='utf-8')}", encoding="utf-8")
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        try:
            api.create_repo(repository, private=private, exist_ok=True)
            done = api.upload_folder(repo_id=repository, folder_path=folder, commit_message="querybridge push")
        except HfHubHTTPError as error:
            status = error.response.status_code if error.response is not None else None
            hint = "log in with `hf auth login`, or name a repository of yours" if status in (401, 403) else "try again"
            raise UserError(f"push {repository}: the hub refuses ({first_line(error)}); {hint}") from error
        except (OSError, ValueError) as error:
            raise UserError(f"push {repository}: {first_line(error)}; check the connection, or HF_ENDPOINT") from error
        except Exception as error:
            if not cannot_be_reached(error):
                raise
            raise UserError(f"push {repository}: the hub cannot be reached ({first_line(error)})") from error
    return {"repository": repository, "url": str(done.commit_url), "files": files}


def card_metadata(artefact: Path, facts: Facts, license: str, datasets: Sequence[str]) -> str:
    """The metadata in front of a card, as YAML: licence, base models, data sets, pipeline and tags."""
    from huggingface_hub import ModelCardData

    language = facts.kind == "language"
    task = read_recipe(artefact).task
    data = ModelCardData(
        license=license,
        license_name="see-terms-below" if license == "other" else None,
        library_name="querybridge",
        base_model=[source.partition("@")[0] for source in _sources(artefact) if HUB_ID.fullmatch(source)] or None,
        datasets=list(datasets) or None,
        pipeline_tag=_PIPELINES.get(task, _PIPELINES["vqa"]) if language else "zero-shot-image-classification",
        tags=list(_TAGS),
    )
    return str(data)


def _sources(artefact: Path) -> list[str]:
    recipe = read_recipe(artefact)
    named = [tower.source for tower in recipe.vision.towers]
    named += [recipe.bridge.start] if recipe.bridge.start is not None else []
    named += [recipe.language.source] if read_facts(artefact).kind == "language" else []
    return list(dict.fromkeys(named))


def _check_sources(artefact: Path) -> None:
    """Refuse what nobody else could load."""
    if (artefact / MODELS / SOURCES).is_file():
        return
    for source in _sources(artefact):
        if not source.startswith("pypi:") and (Path(source).expanduser().is_dir() or not HUB_ID.fullmatch(source)):
            raise UserError(
                f"push: its frozen model {source} is a folder of this machine, which others do not have; export it with"
                " --to bundle and push the bundle"
            )
