"""`querybridge cache`: what it prints, and that nothing goes without a yes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from command import Call
from fake_encoder import FakeEncoder, pictures

from adapters.features.cache import FeatureCache


@pytest.fixture
def size(cache_here: Path) -> int:
    """Bytes of the features of two pictures."""
    FeatureCache(FakeEncoder()).fill(pictures(1, 2))
    return files(cache_here)


def files(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())


def answering(monkeypatch: pytest.MonkeyPatch, answer: str) -> None:
    """Somebody at a terminal."""
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr("typer.confirm", lambda text, **_: answer == "y" if "of " in text else pytest.fail(text))


def test_info_lists_the_folder(call: Call, size: int, cache_here: Path) -> None:
    assert call("cache", "info", "--json").values["features"][0]["pictures"] == 2
    assert call("cache", "info").out.startswith(f"{cache_here}: ")


def test_clear_asks_first(call: Call, size: int, cache_here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    said = call("cache", "clear").mistake()
    assert said == "cache clear: there is no terminal to ask on; add --yes to remove without being asked"
    answering(monkeypatch, "n")
    assert call("cache", "clear").out == "freed 0 B\n"
    assert files(cache_here) == size
    answering(monkeypatch, "y")
    assert call("cache", "clear", "--json").values == {"freed": {"models": 0, "features": size}}
    assert files(cache_here) == 0


def test_clear_can_be_limited(call: Call, size: int, cache_here: Path) -> None:
    assert call("cache", "clear", "--models", "--yes", "--json").values == {"freed": {"models": 0, "features": 0}}
    assert files(cache_here) == size
    assert call("cache", "clear", "--features", "--yes", "--json").values["freed"]["features"] == size
    assert call("cache", "info", "--json").values["bytes"] == 0
