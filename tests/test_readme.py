"""The README tells the truth: each of its commands runs, on a tiny adapter and a few drawn pictures."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import draw_data, tiny_values

from adapters import recipe as recipe_module
from adapters.finetune import finetune
from adapters.recipe import parse_recipe

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")
FENCED = re.compile(r"^```.*?^```$", flags=re.MULTILINE | re.DOTALL)
# Run in a clean clone, by hand and by CI: one script takes minutes, the other runs this test.
SET_UP = {"./scripts/quickstart.sh", "./scripts/test.sh"}
CLONE = ["git clone --depth 1 https://github.com/querybridge/querybridge", "cd querybridge"]
MOST_LINES = 130


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory, vision_folder: Path, language_folders: dict[str, Path]) -> Path:
    """A folder as a reader has it after the quick start, with data of their own."""
    folder = tmp_path_factory.mktemp("readme")
    data = draw_data(folder, "my_data.jsonl")
    recipe: Any = tiny_values(vision_folder, language_folders["llama"], data, max_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(folder / "cache"))
        finetune(parse_recipe(recipe, "test"), folder / "runs" / "quickstart", device="cpu", quiet=True)
    pictures = folder / "runs" / "quickstart" / "pictures"
    pictures.mkdir()
    shutil.copy(folder / "red0.png", pictures / "1.png")
    (folder / "docs").mkdir()
    shutil.copy(ROOT / "docs" / "photo.jpg", folder / "docs")
    row = {"image": "pictures/1.png", "question": "what colour?", "answer": "red"}
    (pictures.parent / "questions.jsonl").write_text(json.dumps(row) + "\n")
    return folder


@pytest.fixture
def in_workplace(
    workplace: Path, vision_folder: Path, language_folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> Path:
    """Stand in that folder, with tiny models in the place of the recipes' and of the packaged data."""
    monkeypatch.chdir(workplace)
    monkeypatch.setenv("QUERYBRIDGE_CACHE", str(workplace / "cache"))
    load = recipe_module.load_recipe
    tiny: Any = tiny_values(vision_folder, language_folders["llama"], workplace / "my_data.jsonl", max_steps=2)

    def load_tiny(name: str | Path, overrides: Any = ()) -> Any:
        recipe = load(name, overrides)  # the recipe and the overrides are read for real
        values = recipe.model_dump(mode="json") | {key: tiny[key] for key in ("vision", "bridge", "language", "train")}
        if not isinstance(recipe.data.train, str) or recipe.data.train.startswith("easy-vqa"):
            values["data"] = tiny["data"]
        return parse_recipe(values, str(name))

    monkeypatch.setattr(recipe_module, "load_recipe", load_tiny)
    monkeypatch.setattr("serve.adapter.default_adapter", lambda: "runs/quickstart")  # the shipped one has its own tests
    return workplace


def run(command: str, monkeypatch: pytest.MonkeyPatch) -> int:
    from serve.cli import command as cli

    monkeypatch.setattr("sys.argv", shlex.split(command))
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    return int(stopped.value.code or 0)


@pytest.fixture
def quiet_page(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """`demo` and `serve` come back at once; page and API have tests of their own."""
    ports: list[int] = []
    monkeypatch.setattr("serve.page.app.launch", lambda engine, port, **_: ports.append(port))

    def serve(app: Any, listener: Any) -> None:
        ports.append(int(listener.url.rpartition(":")[2]))
        listener.socket.close()

    monkeypatch.setattr("serve.api.server.serve", serve)
    return ports


def test_the_set_up_commands_are_scripts_that_are_there() -> None:
    assert set(COMMANDS) >= SET_UP
    assert all((ROOT / command).is_file() for command in SET_UP)


def test_the_clone_comes_first_and_names_the_project_address() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert COMMANDS[:2] == CLONE
    assert project["urls"]["Source"] == CLONE[0].split()[-1]


@pytest.mark.parametrize("text", [README, CHINESE], ids=["english", "chinese"])
def test_each_is_read_in_three_minutes(text: str) -> None:
    assert len(text.splitlines()) <= MOST_LINES


@pytest.mark.parametrize("command", [c for c in COMMANDS if c not in SET_UP and c not in CLONE])
def test_every_command_runs(
    command: str, in_workplace: Path, quiet_page: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert command.startswith("querybridge "), f"no test knows how to run: {command}"
    if out := re.search(r"--out (runs/\S+)", command):
        shutil.rmtree(in_workplace / out[1], ignore_errors=True)
    adapter = re.search(r"(?:--adapter|--start-from) (runs/\S+)", command)
    if adapter and not Path(adapter[1]).exists():
        shutil.copytree("runs/quickstart", adapter[1])
    assert run(command, monkeypatch) == 0
    served = {"demo": 7860, "serve": 8000}
    assert quiet_page == [port for name, port in served.items() if command.startswith(f"querybridge {name} ")]


def test_python_examples_run(in_workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (example,) = blocks("python")
    for made in ("runs/from_python", "answers_too.jsonl"):
        path = in_workplace / made
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    exec(compile(example, "README.md", "exec"), {})
    assert json.loads((in_workplace / "answers_too.jsonl").read_text())["reference"] == ["red"]


def test_the_example_row_is_read(tmp_path: Path, make_picture: Callable[[Path], None]) -> None:
    from adapters.data.reading import read_data

    row = blocks("json")[0]
    (tmp_path / "photos").mkdir()
    make_picture(tmp_path / json.loads(row)["image"])
    (tmp_path / "rows.jsonl").write_text(row)
    assert read_data(tmp_path / "rows.jsonl").examples[0].answers == ("bearing",)


@pytest.fixture
def make_picture() -> Callable[[Path], None]:
    from PIL import Image

    return lambda path: Image.new("RGB", (8, 8), "red").save(path)


def test_the_chinese_readme_has_the_same_code_blocks() -> None:
    assert FENCED.findall(README)
    assert FENCED.findall(CHINESE) == FENCED.findall(README)


def test_the_chinese_readme_has_the_same_headings_and_tables() -> None:
    def shape(text: str) -> tuple[list[str], list[int]]:
        """The levels of its headings and the bars in each row of its tables, in order."""
        prose = FENCED.sub("", text)
        rows = re.findall(r"^\|.*$", prose, flags=re.MULTILINE)
        return re.findall(r"^#+(?= )", prose, flags=re.MULTILINE), [row.count("|") for row in rows]

    levels, rows = shape(README)
    assert levels
    assert shape(CHINESE) == (levels, rows)


@pytest.mark.parametrize("text", [README, CHINESE], ids=["english", "chinese"])
def test_relative_links_lead_to_files_in_the_english_and_the_chinese_readme(text: str) -> None:
    targets = re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", text))
    relative = [target.partition("#")[0] for target in targets if "://" not in target]
    assert {"README.md", "README.zh-CN.md"} & set(relative), "each links to the other"
    assert [target for target in relative if not (ROOT / target).exists()] == []
