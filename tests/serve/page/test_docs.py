"""docs/demo.md tells the truth: its commands start the page as they say, its programs run against one with models."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from command import Call
from page_server import served
from tiny import draw_captions, save_tiny_bert, tiny_values

from adapters.finetune import finetune
from adapters.recipe import parse_recipe
from serve.engine.engine import Engine

PAGE = (Path(__file__).parents[3] / "docs" / "demo.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


@pytest.fixture(scope="module")
def workplace(
    tmp_path_factory: pytest.TempPathFactory, vision_folder: Path, language_folders: dict[str, Path], cache_folder: Path
) -> Path:
    """A folder with photos and runs, as the page's reader has them."""
    folder = tmp_path_factory.mktemp("docs")
    data = draw_captions(folder)
    draw_captions(folder / "my_photos")
    for name in ("photo.jpg", "like_this.jpg"):
        shutil.copy(folder / "red0.png", folder / name)
    values: Any = tiny_values(vision_folder, language_folders["llama"], data, max_steps=2)
    values["task"] = "caption"
    values["bridge"] |= {"start": str(save_tiny_bert(folder / "bert")), "text_branch": True}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(cache_folder))
        finetune(parse_recipe(values, "test"), folder / "runs" / "stage2", device="cpu", dtype="float32", quiet=True)
    for name in ("quickstart", "mine"):
        shutil.copytree(folder / "runs" / "stage2", folder / "runs" / name)
    return folder


@pytest.fixture(scope="module")
def address(workplace: Path, cache_folder: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(cache_folder))
        with (
            Engine((workplace / "runs" / "stage2",), device="cpu", dtype="float32", offline=True) as engine,
            served(engine, workplace / "uploads", search_folder=workplace / "my_photos") as url,
        ):
            yield url


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_runs(command: str, workplace: Path, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(workplace)
    started: list[Any] = []
    monkeypatch.setattr("serve.page.app.launch", lambda engine, **options: started.append((engine.names, options)))
    _, *words = shlex.split(command)
    outcome = call(*words)

    assert outcome.code == 0, outcome.err
    assert len(started) == (words[0] == "demo")
    if started:
        names, options = started[0]
        assert names == [Path(words[at + 1]).name for at, word in enumerate(words) if word == "--adapter"]
        assert options["port"] == (8080 if "--port" in words else 7860)
        assert options["auth"] == ("ada:lovelace" if "--auth" in words else None)
        assert options["search_folder"] == (Path("my_photos") if "--search-folder" in words else None)


@pytest.mark.parametrize("program", blocks("python"))
def test_programs_run(
    program: str, address: str, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(workplace)
    program = program.replace("http://127.0.0.1:7860", address)
    program = program.replace('api_name="/chat"', 'longest=8, api_name="/chat"')  # tiny models know no end
    exec(compile(program, "docs/demo.md", "exec"), {})

    assert capsys.readouterr().out.strip()
