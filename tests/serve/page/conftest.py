"""A real browser, and a page in it over an engine without models, for the tests that use it as people do."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_engine import FakeAdapter, FakeEngine, make_recipe
from page_server import draw_data, served
from page_view import View
from tiny import draw_captions, save_tiny_bert, tiny_values

from adapters.loading.vision_side import load_vision_side
from adapters.recipe import parse_recipe

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return draw_data(tmp_path_factory.mktemp("shapes"))


@pytest.fixture(scope="module")
def engine(folder: Path, vision_folder: Path, language_folders: dict[str, Path], cache_folder: Path) -> FakeEngine:
    """Words are made up, but what is searched and looked at goes through a real bridge with its text side."""
    values: Any = tiny_values(vision_folder, language_folders["llama"], folder / "shapes.jsonl")
    values["bridge"] |= {"start": str(save_tiny_bert(folder / "bert")), "text_branch": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(cache_folder))
        recipe = parse_recipe(values, "test")
        vision_side = load_vision_side(recipe)
    for parameter in vision_side.bridge.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    described = make_recipe(folder, bridge=values["bridge"], vision=values["vision"])
    other = make_recipe(folder, description="Another one.", task="reason")
    without_text = replace(vision_side, recipe=other)
    return FakeEngine(FakeAdapter(described, "quickstart", vision_side), FakeAdapter(other, "other", without_text))


@pytest.fixture(scope="module")
def votes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("votes") / "votes.jsonl"


@pytest.fixture(scope="module")
def address(
    engine: FakeEngine, folder: Path, cache_folder: Path, votes: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[str]:
    draw_captions(folder / "mine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(cache_folder))
        options: dict[str, Any] = {"search_folder": folder / "mine", "votes": votes, "allow_training": True}
        with served(engine, tmp_path_factory.mktemp("uploads"), **options) as url:
            yield url


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("there is no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        camera = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--no-proxy-server", *camera])
        yield browser.new_context()  # all views fetch the page's scripts once
        browser.close()


@pytest.fixture
def open_view(browser: Any, address: str) -> Iterator[Callable[..., View]]:
    views: list[View] = []

    def make(size: str = "desk", scheme: str = "light") -> View:
        views.append(View(browser, address, size, scheme))
        return views[-1]

    yield make
    for view in views:
        view.close()
