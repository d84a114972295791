"""An adapter on its way to a hub, for which a small server stands in."""

from __future__ import annotations

import base64
import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from command import Call
from huggingface_hub import HfApi
from safetensors.torch import load_file

from adapters.artefact.exporting import export_adapter
from qformer.errors import UserError
from serve.push import push


class Hub(BaseHTTPRequestHandler):
    """Takes a repository's files as huggingface_hub sends them."""

    files: dict[str, bytes]
    asked: list[tuple[str, Any]]
    refuse = 0

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kind = self.path.rpartition("/")[0].rpartition("/")[2]
        if self.refuse:
            self.answer({"error": "no"}, self.refuse)
        elif self.path.endswith("/repos/create"):
            self.asked.append(("create", json.loads(body)))
            self.answer({"url": f"http://{self.headers['Host']}/me/mine"})
        elif kind == "preupload":
            wanted = [{"path": one["path"], "uploadMode": "regular"} for one in json.loads(body)["files"]]
            self.answer({"files": [one | {"shouldIgnore": False} for one in wanted]})
        elif self.path.endswith("validate-yaml"):
            self.asked.append(("card", json.loads(body)["content"]))
            self.answer({"errors": [], "warnings": []})
        elif kind == "commit":
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            self.answer({"commitUrl": f"http://{self.headers['Host']}/me/mine/commit/1", "commitOid": "1"})
        else:
            self.answer({"error": self.path}, 404)

    def do_GET(self) -> None:
        self.answer({"sha": "0", "id": "me/mine", "siblings": []}, self.refuse or 200)

    def answer(self, value: object, status: int = 200) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    handler = type("OneHub", (Hub,), {"files": {}, "asked": [], "refuse": 0})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint=address, token="hf_none"))
    yield handler
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def bundle(run_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle: its models are folders of this machine no more."""
    folder = tmp_path_factory.mktemp("push") / "bundle"
    export_adapter(str(run_folder), "bundle", folder)
    return folder


def test_all_files_arrive_with_a_card_that_can_be_read(bundle: Path, hub: type[Hub], call: Call) -> None:
    done = call(
        "push", bundle, "me/mine", "--license", "mit", "--dataset", "me/squares", "--private", "--json"
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.values["url"].endswith("/me/mine/commit/1")
    assert set(hub.files) == set(done.values["files"]) >= {"bridge.safetensors", "models/0/model.safetensors"}
    assert hub.files["bridge.safetensors"] == (bundle / "bridge.safetensors").read_bytes()
    created = next(value for kind, value in hub.asked if kind == "create")
    assert created["name"] == "mine" and created["organization"] == "me"
    card = hub.files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert metadata == {
        "license": "mit", "library_name": "querybridge", "pipeline_tag": "visual-question-answering",
        "datasets": ["me/squares"], "tags": ["querybridge", "vision-language", "q-former"],
    }  # fmt: skip
    assert "| bridge, trained |" in card and ("card", card) in hub.asked
    recipe = yaml.safe_load(hub.files["recipe.yaml"])
    assert recipe["data"]["train"] == "data.jsonl"  # no folder of this machine


def test_base_models_are_those_of_the_hub(run_folder: Path, tmp_path: Path, hub: type[Hub]) -> None:
    shutil.copytree(run_folder / "best", tmp_path / "run")
    file = tmp_path / "run" / "recipe.yaml"
    values = yaml.safe_load(file.read_text())
    values["vision"]["towers"][0]["source"] = "openai/clip@main"
    values["language"]["source"] = "pypi:smollm2-135m-instruct"
    file.write_text(yaml.safe_dump(values))
    push(str(tmp_path / "run"), "me/mine")
    metadata = yaml.safe_load(hub.files["README.md"].decode().split("---\n")[1])
    assert metadata["base_model"] == ["openai/clip"]
    assert (metadata["license"], metadata["license_name"]) == ("other", "see-terms-below")
    assert load_file(tmp_path / "run" / "bridge.safetensors")  # and it is as it was


@pytest.mark.parametrize(
    ("repository", "options", "says"),
    [
        ("mine", {}, "REPOSITORY mine: give 'org/name'"),
        ("me/mine@main", {}, "REPOSITORY me/mine@main: give 'org/name'"),
        ("me/mine", {"datasets": ["squares"]}, "--dataset squares: give 'org/name'"),
        ("me/mine", {"license": "My own!"}, "--license My own!: give the hub's short name"),
    ],
)
def test_a_wrong_name_is_one_line(
    bundle: Path, hub: type[Hub], repository: str, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        push(str(bundle), repository, **options)
    assert not hub.files and not hub.asked


def test_a_folder_of_this_machine_is_not_pushed(run_folder: Path, hub: type[Hub]) -> None:
    with pytest.raises(UserError, match="is a folder of this machine, which others do not have; export it with"):
        push(str(run_folder), "me/mine")
    assert not hub.files


@pytest.mark.parametrize(("status", "says"), [(401, "hf auth login"), (500, "try again")])
def test_a_hub_that_refuses_is_one_line(bundle: Path, hub: type[Hub], status: int, says: str) -> None:
    hub.refuse = status
    with pytest.raises(UserError, match=says) as error:
        push(str(bundle), "me/mine")
    assert "\n" not in str(error.value)


def test_a_hub_that_is_not_there_is_one_line(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: HfApi(endpoint="http://127.0.0.1:1", token="hf_none"))
    with pytest.raises(UserError, match="push me/mine: the hub cannot be reached") as error:
        push(str(bundle), "me/mine")
    assert "\n" not in str(error.value)
