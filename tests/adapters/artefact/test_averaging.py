"""The mean of adapters, against the mean taken by hand."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import draw_data, tiny_values

from adapters.artefact.averaging import average_artefacts
from adapters.artefact.facts import read_facts, save_facts
from adapters.finetune import finetune
from adapters.loading.reader import FILE as READER
from adapters.recipe import parse_recipe
from qformer.errors import UserError
from serve.adapter import load_adapter

pytestmark = pytest.mark.usefixtures("cache_here")
_FILES = ("bridge.safetensors", "lora/adapter_model.safetensors")


@pytest.fixture
def two(vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path) -> tuple[Path, Path]:
    """An adapter, and one that went on from it."""
    values: Any = tiny_values(vision_folder, language_folders["llama"], draw_data(tmp_path / "data"), max_steps=2)
    recipe = parse_recipe(values, "test")
    options: Any = {"device": "cpu", "dtype": "float32", "quiet": True}
    finetune(recipe, tmp_path / "first", **options)
    finetune(recipe, tmp_path / "second", start_from=str(tmp_path / "first"), **options)
    return tmp_path / "first" / "last", tmp_path / "second" / "last"


def test_each_weight_is_the_mean_and_the_rest_the_first_ones(two: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = two
    save_facts(second, replace(read_facts(second), terms=("theirs - research",)))
    out = tmp_path / "mean"
    for _ in range(2):  # the second time it replaces what stands there
        average_artefacts({first: 0.75, second: 0.25}, out)

    changed = 0
    for name in _FILES:
        one, other, mean = (load_file(folder / name) for folder in (first, second, out))
        assert one.keys() == mean.keys()
        for key, tensor in mean.items():
            expected = (0.75 * one[key].double() + 0.25 * other[key].double()).to(tensor.dtype)
            torch.testing.assert_close(tensor, expected, rtol=1e-2, atol=1e-6)  # a step of bfloat16
            changed += not torch.equal(tensor, one[key])
    assert changed > 4
    assert (out / "recipe.yaml").read_bytes() == (first / "recipe.yaml").read_bytes()
    facts = read_facts(out)
    assert facts.averaged == {str(first): 0.75, str(second): 0.25}
    assert facts.fingerprints == read_facts(first).fingerprints
    assert set(facts.terms) == {*read_facts(first).terms, "theirs - research"} and not facts.metrics
    assert f"{second} (0.25)" in (out / "README.md").read_text()
    picture = tmp_path / "data" / "red0.png"
    assert isinstance(load_adapter(out, device="cpu", dtype="float32").ask(picture, "what colour?"), str)


def test_of_two_readers_the_first_ones_is_taken_if_asked_for(two: tuple[Path, Path], tmp_path: Path) -> None:
    for number, folder in enumerate(two):
        (folder / READER).write_bytes(bytes([number]))
    shares = {folder: 0.5 for folder in two}
    with pytest.raises(UserError, match="its closed-form reader is not that of"):
        average_artefacts(shares, tmp_path / "mean")
    average_artefacts(shares, tmp_path / "mean", first_reader=True)
    assert (tmp_path / "mean" / READER).read_bytes() == bytes([0])


def test_what_cannot_be_averaged_is_told(two: tuple[Path, Path], tmp_path: Path) -> None:
    first, second = two
    with pytest.raises(ValueError, match="do not add up to 1"):
        average_artefacts({first: 0.75, second: 0.5}, tmp_path / "mean")
    smaller = shutil.copytree(second, tmp_path / "smaller")
    tensors = load_file(smaller / _FILES[0])
    save_file(dict(list(tensors.items())[1:]), smaller / _FILES[0])
    with pytest.raises(UserError, match="its tensors are not those of"):
        average_artefacts({first: 0.5, smaller: 0.5}, tmp_path / "mean")
    other = shutil.copytree(second, tmp_path / "other")
    facts = (other / "artefact.json").read_text()
    (other / "artefact.json").write_text(facts.replace(read_facts(other).fingerprints["language"], "sha256:0"))
    with pytest.raises(UserError, match="frozen parts are not those of"):
        average_artefacts({first: 0.5, other: 0.5}, tmp_path / "mean")
    assert not (tmp_path / "mean").exists()
