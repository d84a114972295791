"""Kept on disk or encoded as needed: told with both costs, and the same run either way."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_encoder import FakeEncoder, files, pictures
from tiny import draw_captions, draw_data, save_tiny_bert, tiny_values

from adapters.features.cache import FeatureCache
from adapters.finetune import finetune
from adapters.pretrain import pretrain
from adapters.recipe import differing_keys, load_recipe, parse_recipe
from adapters.training.picture_features import choose
from qformer.errors import UserError

pytestmark = pytest.mark.usefixtures("cache_here")


@pytest.fixture
def values(vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path) -> Any:
    return tiny_values(vision_folder, language_folders["llama"], draw_data(tmp_path / "data"), max_steps=4)


def figures(folder: Path) -> list[dict[str, float]]:
    """All that a run measured, times and memory apart."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {name: value for name, value in line.items() if name not in ("samples_per_second", "peak_memory_gib")}
        for line in lines
    ]


def test_a_run_is_the_same_whether_features_are_kept_or_not(
    values: Any, tmp_path: Path, cache_here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    how: Any = {"device": "cpu", "dtype": "float32"}
    values["data"]["cache"] = False
    finetune(parse_recipe(values, "test"), tmp_path / "off", **how)
    said = capsys.readouterr().err
    assert re.search(r"12 pictures: encoded as they are needed, which takes about \d+ s an epoch; data.cache=off", said)
    assert files(cache_here) == []
    values["data"]["cache"] = True
    monkeypatch.setenv("QUERYBRIDGE_FEATURES_GIB", "0.0000001")
    finetune(parse_recipe(values, "test"), tmp_path / "bounded", **how)
    assert "but the cache is held to 0.00 GiB (QUERYBRIDGE_FEATURES_GIB)" in capsys.readouterr().err
    assert files(cache_here) == []
    monkeypatch.delenv("QUERYBRIDGE_FEATURES_GIB")
    finetune(parse_recipe(values, "test"), tmp_path / "kept", **how)
    assert re.search(
        r"12 pictures: features are kept on disk, 0\.00 GiB of at most 20\.00 GiB", capsys.readouterr().err
    )
    assert len(files(cache_here)) == 13  # and the blank picture of validation
    assert figures(tmp_path / "kept") == figures(tmp_path / "off") == figures(tmp_path / "bounded")


def test_the_first_stage_too(
    vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path, cache_here: Path
) -> None:
    values: Any = tiny_values(
        vision_folder, language_folders["llama"], draw_captions(tmp_path / "data"), max_steps=2, batch_size=4
    )
    values["task"] = "caption"
    values["bridge"] |= {"start": str(save_tiny_bert(tmp_path / "bert")), "text_branch": True}
    for cache in (False, True):
        values["data"]["cache"] = cache
        pretrain(parse_recipe(values, "test"), tmp_path / f"run{cache}", device="cpu", dtype="float32", quiet=True)
        assert bool(files(cache_here)) == cache
    assert figures(tmp_path / "runTrue") == figures(tmp_path / "runFalse")


def test_a_picture_that_cannot_be_decoded_is_told_before_the_first_step(values: Any, tmp_path: Path) -> None:
    (tmp_path / "data" / "red1.png").write_bytes(b"no picture")
    values["data"]["cache"] = False
    with pytest.raises(UserError, match=r"red1\.png.* is not a picture"):
        finetune(parse_recipe(values, "test"), tmp_path / "run", device="cpu", dtype="float32", quiet=True)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_run_may_go_on_the_other_way(values: Any) -> None:
    kept = parse_recipe(values, "test")
    values["data"]["cache"] = False
    assert differing_keys(kept, parse_recipe(values, "test")) == []
    values["data"]["views"] = 2
    assert differing_keys(kept, parse_recipe(values, "test")) == ["data.views"]


def test_off_is_a_word_for_it() -> None:
    assert load_recipe("domain_cpu", ["data.cache=off"]).data.cache is False


def test_the_choice_goes_by_bound_and_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refs = pictures(*range(10))  # 3 x 5 float16 and a header are 162 bytes each
    cache = FeatureCache(FakeEncoder(), tmp_path, max_bytes=10 * 162)
    assert choose([cache], refs, keep=True).kept
    assert not choose([cache], [*refs, *pictures(10)], keep=True).kept
    assert not choose([cache, cache], refs, keep=True).kept  # two towers share the bound
    cache.fill(refs)
    assert choose([cache], refs, keep=True).said == ""
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=100))
    full = choose([FeatureCache(FakeEncoder(), tmp_path / "other")], refs, keep=True)
    assert not full.kept and "GiB free (QUERYBRIDGE_CACHE names another folder)" in full.said
    torch.manual_seed(0)
    before = torch.get_rng_state()
    choose([FeatureCache(FakeEncoder(), tmp_path / "third")], refs, keep=False)
    assert torch.equal(before, torch.get_rng_state())  # the run's draws do not depend on it
