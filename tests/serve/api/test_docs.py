"""docs/serving.md tells the truth: its commands start, its requests are answered, its tables are complete."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from api_server import PNG, served
from command import Call

from serve.engine.engine import Engine
from serve.limits import Limits

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "serving.md").read_text(encoding="utf-8")
ADDRESS = "http://127.0.0.1:8000"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, flags=re.MULTILINE | re.DOTALL)


LINES = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]
SERVERS = [line for line in LINES if line.startswith("querybridge ")]
REQUESTS = [line for line in LINES if line.startswith(("curl ", "printf "))]


@pytest.fixture
def workplace(run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("quickstart", "mine", "scenes"):
        shutil.copytree(run_folder, tmp_path / "runs" / name)
    _teach_reasons(tmp_path / "runs" / "scenes")
    for picture in ("runs/quickstart/pictures/1.png", "data/scenes/images/test_00001.png"):
        (tmp_path / picture).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / picture).write_bytes(PNG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def address(workplace: Path) -> Iterator[str]:
    """The adapter behind the server that the page's clients talk to."""
    names = [workplace / "runs" / name for name in ("quickstart", "mine", "scenes")]
    with Engine(names, device="cpu", dtype="float32", offline=True) as engine, served(engine, api_key=None) as url:
        yield url


@pytest.mark.usefixtures("workplace")
@pytest.mark.parametrize("command", SERVERS)
def test_every_server_starts(command: str, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serve.api.server.serve", lambda app, listener: listener.socket.close())
    monkeypatch.setattr("serve.page.app.launch", lambda *_, **__: None)
    monkeypatch.setenv("QUERYBRIDGE_API_KEY", "sesame")
    name, *flags = command.split()[1:]

    assert call(name, *flags, "--port", 0, "--device", "cpu", "--offline").code == 0


def test_every_request_is_answered(address: str) -> None:
    if not all(map(shutil.which, ("bash", "curl", "base64"))):
        pytest.skip("there is no curl on this machine")
    assert len(REQUESTS) >= 4
    said = []
    for line in REQUESTS:
        run = subprocess.run(
            ["bash", "-c", line.replace(ADDRESS, address)], capture_output=True, text=True, timeout=60,
            env=os.environ | {"no_proxy": "*", "QUERYBRIDGE_API_KEY": "sesame"},
        )  # fmt: skip
        assert run.returncode == 0, run.stderr
        said.append(run.stdout)
    _, answer, models, metrics = said

    documented = json.loads(blocks("json")[0].replace("…", ""))
    assert documented.keys() == json.loads(answer).keys()
    assert documented["choices"][0].keys() == json.loads(answer)["choices"][0].keys()
    assert [model["id"] for model in json.loads(models)["data"]] == ["quickstart", "mine", "scenes"]
    named = re.findall(r"querybridge_\w+", PAGE)
    assert named and all(name in metrics for name in named)


def test_the_python_example_runs(
    workplace: Path, address: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    example = "\n".join(blocks("python"))  # each goes on from the one before
    (workplace / "example.py").write_text(example.replace(ADDRESS, address), encoding="utf-8")
    monkeypatch.setenv("NO_PROXY", "*")
    message = runpy.run_path("example.py")["message"]
    out = capfd.readouterr().out
    reasons, answer = message.reasoning_content, message.content
    thoughts = f"{reasons} so: {answer}\n{reasons}{answer}\n"  # what a tiny model writes may have line ends in it

    whole, streamed, _, closed = out.removesuffix(thoughts).rstrip().rsplit("\n", 3)
    assert whole.rpartition(" ")[0] == streamed
    assert "'rectangle':" in closed
    assert reasons and answer and out.endswith(thoughts)


def test_every_limit_stands_on_the_page() -> None:
    assert "--max-waiting" in PAGE
    assert all(f"--{field.name.replace('_', '-')}" in PAGE for field in fields(Limits))


def _teach_reasons(run: Path) -> None:
    """Have a run's recipe say that it learned both stages; what it answers is no matter here."""
    for file in run.rglob("recipe.yaml"):
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
        values |= {"task": "reason", "reason": {"rationale_tokens": 8}}
        file.write_text(yaml.safe_dump(values), encoding="utf-8")


@pytest.mark.slow
def test_the_measurement_runs(run_folder: Path, cache_folder: Path) -> None:
    (command,) = [line for line in LINES if "bench_serving" in line]
    words = command.replace("runs/quickstart", str(run_folder)).split()[1:]
    run = subprocess.run(
        [sys.executable, *words, "--seconds", "0.6", "--clients", "3", "--tokens", "4"],
        cwd=ROOT, env=os.environ | {"QUERYBRIDGE_CACHE": str(cache_folder)},
        capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    found = json.loads(run.stdout)

    assert run.returncode == (0 if found["as_promised"] else 1)
    for kind in ("shared", "different"):
        assert found[kind]["answers"] > 0
        assert (found[kind]["errors"], found[kind]["wrong"]) == (0, 0), found[kind]["first_error"]
