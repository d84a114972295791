"""What programs are told of malformed arguments, what two answer to the same question, and the votes on them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeAdapter, FakeEngine, make_recipe
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from page_client import PageClient
from page_server import served

from qformer.errors import UserError
from serve.page.votes import VoteFile


@pytest.fixture(scope="module")
def engine(folder: Path) -> FakeEngine:
    lettered = make_recipe(folder, task="reason", prompt={"letters": True})
    return FakeEngine(FakeAdapter(make_recipe(folder), "quickstart"), FakeAdapter(lettered, "other"))


@pytest.fixture(scope="module")
def address(engine: FakeEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with served(engine, tmp_path_factory.mktemp("uploads")) as url:
        yield url


@pytest.fixture
def client(address: str, engine: FakeEngine) -> Client:
    """A conversation of its own."""
    engine.decodings.clear()
    engine.pending.clear()
    return PageClient(address, verbose=False)


@pytest.mark.parametrize(
    ("name", "values", "says"),
    [("/caption", {"style": ["beam"]}, "style: it is list; send text"),
     ("/vqa", {"adapter": {}}, "adapter: it is dict"),
     ("/vqa", {"questions": 5}, "questions: it is int"), ("/chat", {"message": 3}, "An argument is malformed"),
     ("/chat", {"message": {"text": {"a": 1}, "files": []}}, "An argument is malformed: text"),
     ("/chat", {"message": {"text": "x", "files": 3}}, "An argument is malformed: files"),
     ("/look", {"query": "x"}, "no whole number"),
     ("/caption", {"picture": "photo.jpg"}, "An argument is malformed"),
     ("/reason", {"beams": True}, "True is no number")],
)  # fmt: skip
def test_malformed_arguments_are_told_and_leave_no_traceback(
    client: Client, folder: Path, capfd: pytest.CaptureFixture[str], name: str, values: dict[str, Any], says: str
) -> None:
    given = {"picture": handle_file(folder / "red.png")} if name not in ("/chat", "/search") else {}
    given |= {"questions": "what?"} if name == "/vqa" else {"question": "what?"} if name in ("/reason",) else {}
    with pytest.raises(AppError, match=says):
        client.predict(**(given | values), api_name=name)

    assert "Traceback" not in capfd.readouterr().err


def test_two_are_asked_the_same(client: Client, engine: FakeEngine, folder: Path) -> None:
    picture = handle_file(folder / "red.png")
    found = client.predict(picture, "which?", api_name="/compare")
    blind = client.predict(
        picture, "which?", "quickstart", "greedy", True, "quickstart", "greedy", False, api_name="/compare"
    )

    assert (found["left"]["adapter"], found["right"]["adapter"]) == ("quickstart", "other")
    assert found["picture"]["name"] == "red.png" and found["left"]["confidence"] == pytest.approx(0.87)
    assert "about red.png" in blind["left"]["answer"] and "about nothing" in blind["right"]["answer"]
    with pytest.raises(AppError, match="Left and right are the same"):
        client.predict(picture, "which?", "other", "usual", True, "other", "usual", True, api_name="/compare")
    with pytest.raises(AppError, match="decoding 'wild' is not known"):
        client.predict(picture, "which?", "other", "wild", api_name="/compare")


def test_votes_are_kept_and_counted(tmp_path: Path) -> None:
    votes = VoteFile(tmp_path / "new" / "votes.jsonl")
    assert votes.count() == {}
    for verdict in ("left", "left", "neither"):
        votes.add(verdict, {"question": "é?"})
    assert votes.count() == {"left": 2, "neither": 1}
    first = json.loads(votes.path.read_text(encoding="utf-8").splitlines()[0])
    assert first["vote"] == "left" and first["question"] == "é?" and first["time"].endswith("+00:00")
    with pytest.raises(UserError, match="vote 'best' is not known"):
        votes.add("best", {})
    votes.path.write_text('{"vote": "left"}\nno vote\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2: it is no vote"):
        votes.count()
