"""The pages of docs/ tell the truth: each of their commands runs, on tiny models and a few drawn pictures."""

from __future__ import annotations

import re
import runpy
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import draw_captions, save_tiny_bert, tiny_values

from adapters import recipe as recipe_module
from adapters.finetune import finetune
from adapters.pretrain import pretrain
from adapters.recipe import Recipe, load_recipe, parse_recipe

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
COMMANDS = [
    line
    for page in PAGES
    for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
    if line.strip()
]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, vision_folder: Path, language_folders: dict[str, Path]) -> Path:
    """A folder with captions and photos, and a run of each stage on tiny models."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("captions_train.jsonl", "captions_val.jsonl"):
        draw_captions(folder, name)
    draw_captions(folder / "my_photos")
    for name in ("photo.jpg", "like_this.jpg"):
        shutil.copy(folder / "red0.png", folder / name)
    bert = save_tiny_bert(folder / "bert")
    values: Any = tiny_values(vision_folder, language_folders["llama"], folder / "captions_train.jsonl", max_steps=2)
    values["task"] = "caption"
    values["bridge"] |= {"start": str(bert), "text_branch": True}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(values))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(folder / "cache"))
        recipe = parse_recipe(values, "test")
        pretrain(recipe, folder / "runs" / "stage1", device="cpu", dtype="float32", quiet=True)
        finetune(recipe, folder / "runs" / "stage2", device="cpu", dtype="float32", quiet=True)
    return folder


@pytest.fixture
def in_workplace(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stand in that folder, with tiny models in the place of the recipes'."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("QUERYBRIDGE_CACHE", str(workplace / "cache"))
    tiny = yaml.safe_load((workplace / "tiny.yaml").read_text())

    def load_tiny(name: str | Path, overrides: Any = ()) -> Recipe:
        values = load_recipe(name, overrides).model_dump(mode="json")  # recipe and overrides are read for real
        kept = {key: values["train"][key] for key in ("text_side_every", "captions", "pair_share")}
        values |= {key: tiny[key] for key in ("vision", "bridge", "language")} | {"train": tiny["train"] | kept}
        values["data"]["val_fraction"] = 0.25
        return parse_recipe(values, str(name))

    monkeypatch.setattr(recipe_module, "load_recipe", load_tiny)
    return workplace


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command: str, in_workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if out := re.search(r"--out (\S+)", command):
        command = command.replace(out[0], f"--out made/{Path(out[1]).name}")  # the runs that other commands name stay
        shutil.rmtree(in_workplace / "made", ignore_errors=True)
    words = shlex.split(command)
    monkeypatch.setattr("sys.argv", words)
    if words[0] == "python":
        asked: list[Any] = []

        def train_tower(*arguments: Any, **options: Any) -> dict[str, float]:
            asked.append(arguments)
            return {}

        monkeypatch.setattr("adapters.contrastive.train_tower", train_tower)  # it has tests of its own
        monkeypatch.setattr("sys.argv", words[1:])
        with pytest.raises(SystemExit) as stopped:
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        assert stopped.value.code == 0 and len(asked) == 1
        return
    from serve import cli

    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert not stopped.value.code


def test_comparisons_name_recipes_and_keys_that_are_there() -> None:
    for path in sorted((ROOT / "docs" / "comparisons").glob("*.yaml")):
        plan = yaml.safe_load(path.read_text(encoding="utf-8"))
        for setting in plan["settings"].values():
            own = setting["set"] if isinstance(setting, dict) else setting
            load_recipe(plan["recipe"], [*plan["common"], *own])
