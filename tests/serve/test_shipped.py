"""The adapter that ships: complete, small, honest about its terms, and sensible on a photo none has trained on."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from adapters.artefact.artefact import find_artefact, read_recipe
from adapters.artefact.facts import read_facts
from serve.adapter import LoadedAdapter, default_adapter, load_adapter
from serve.retrieval import classify, load_retriever

FOLDER = find_artefact("photo")
PACKAGE = find_spec("matplotlib")
assert PACKAGE is not None and PACKAGE.origin is not None
# Rear Admiral Grace Hopper in uniform, by the US Navy; in the public domain.
PORTRAIT = Path(PACKAGE.origin).parent / "mpl-data" / "sample_data" / "grace_hopper.jpg"
EVERYDAY = Path(__file__).parents[2] / "docs" / "photo.jpg"


@pytest.fixture(scope="module")
def photo() -> LoadedAdapter:
    return load_adapter()


def test_it_is_the_default_and_small() -> None:
    assert default_adapter() == "photo"
    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".yaml", ".md"}


def test_its_card_and_facts_say_what_it_learned_from() -> None:
    facts, card = read_facts(FOLDER), (FOLDER / "README.md").read_text()
    for source in ("Flickr8k", "Flickr8k-CN", "DAQUAR", "e-SNLI-VE"):
        assert any(source in term for term in facts.terms) and source in card
    assert "non-commercial research" in " ".join(facts.terms)
    for figure, value in facts.metrics.items():
        assert f"| {figure} | {value:.4g} |" in card
    assert read_recipe(FOLDER).bridge.text_branch, "search and naming need its text side"
    assert "/" not in json.dumps([facts.data["train"], read_recipe(FOLDER).data.model_dump(mode="json")])


def test_it_describes_a_photo_and_answers(photo: LoadedAdapter) -> None:
    caption = photo.caption(PORTRAIT)
    assert {"woman", "man", "person", "girl", "lady"} & set(caption.replace(".", "").lower().split()), caption
    assert photo.caption(PORTRAIT, language="zh") != caption
    shares = photo.choose(PORTRAIT, "who is in the picture?", ["a woman", "two dogs"])
    assert shares["a woman"] > shares["two dogs"]


def test_it_names_a_photo() -> None:
    retriever, _ = load_retriever(None)
    shares = classify(retriever, EVERYDAY, ["a dog", "a man with a camera", "a car"])
    assert next(iter(shares)) == "a man with a camera" and sum(shares.values()) == pytest.approx(1, abs=1e-4)
