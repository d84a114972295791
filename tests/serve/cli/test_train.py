"""The commands that train: which recipe a bare data file is learned by."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import FAST, Call
from tiny import draw_captions

from adapters.recipe import Recipe, differing_keys, load_recipe
from adapters.training.run_data import Result


def test_a_bare_file_of_captions_is_pretrained_on_by_the_free_recipe(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Recipe] = []

    def pretrain(recipe: Recipe, out: Path, **_: object) -> Result:
        asked.append(recipe)
        return Result(out, out / "best", 1, {}, finished=True)

    monkeypatch.setattr("adapters.pretrain.pretrain", pretrain)
    captions = draw_captions(tmp_path)
    done = call("pretrain", captions, "--stage", 1, "--json", "--out", tmp_path / "run", *FAST)

    assert done.values["steps"] == 1
    assert differing_keys(asked[0], load_recipe("captions_stage1")) == ["data.train"]
    assert asked[0].vision.towers[0].difference is None
