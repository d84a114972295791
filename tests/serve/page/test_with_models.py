"""Every endpoint of the page over a real engine with tiny models: the answers are those it gives without a page."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from page_client import PageClient
from page_server import get, served
from PIL import Image
from tiny import COLOURS, draw_captions, draw_data, save_tiny_bert, tiny_values
from torch import Tensor

from adapters.data.image_ref import ImageRef
from adapters.data.prompts import Turn
from adapters.finetune import finetune
from adapters.inference.retrieval import Retriever
from adapters.recipe import parse_recipe
from qformer.decoding import Decoding
from serve.adapter import picture_ref
from serve.engine.engine import Engine
from serve.engine.pending import Busy, PendingAnswer
from serve.looking.attention import CAVEAT
from serve.page.tabs.search import ImageFinder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("page")


@pytest.fixture(scope="module")
def pictures(folder: Path) -> Path:
    """The pictures that may be searched; not where uploads may lie."""
    draw_captions(folder / "mine")
    (folder / "mine" / "deeper").mkdir()
    shutil.move(folder / "mine" / "red1.png", folder / "mine" / "deeper" / "red1.png")
    (folder / "mine" / "broken.png").write_text("not a picture")
    return folder / "mine"


@pytest.fixture(scope="module")
def engine(
    folder: Path, vision_folder: Path, language_folders: dict[str, Path], cache_folder: Path
) -> Iterator[Engine]:
    """Two adapters over the same models: one with its text side, the other without."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(cache_folder))
        values: Any = tiny_values(vision_folder, language_folders["llama"], draw_data(folder / "data"), max_steps=2)
        finetune(parse_recipe(values, "test"), folder / "plain", device="cpu", dtype="float32", quiet=True)
        values["bridge"] |= {"start": str(save_tiny_bert(folder / "bert")), "text_branch": True}
        finetune(parse_recipe(values, "test"), folder / "finds", device="cpu", dtype="float32", quiet=True)
        with Engine((folder / "finds", folder / "plain"), device="cpu", dtype="float32", offline=True) as engine:
            yield engine


@pytest.fixture(scope="module")
def address(engine: Engine, folder: Path, pictures: Path, cache_folder: Path) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(cache_folder))
        with served(engine, folder / "uploads", search_folder=pictures) as url:
            yield url


@pytest.fixture
def client(address: str) -> Client:
    return PageClient(address, verbose=False)


@pytest.fixture(scope="module")
def red(folder: Path, engine: Engine) -> Path:
    return folder / "data" / "red0.png"


def test_a_conversation_is_the_engines(client: Client, engine: Engine, red: Path) -> None:
    first = client.predict({"text": "what?", "files": [handle_file(red)]}, longest=16, api_name="/chat")
    second = client.predict({"text": "sure?", "files": []}, longest=16, adapter="plain", api_name="/chat")
    asked = [Turn("user", "what?", (picture_ref(red),)), Turn("assistant", first), Turn("user", "sure?")]
    settings = Decoding(max_new_tokens=16)

    assert first == engine.chat(asked[:1], adapter="finds", decoding=settings).result().text
    assert second == engine.chat(asked, adapter="plain", decoding=settings).result().text


def test_answers_and_choices_are_the_engines(client: Client, engine: Engine, red: Path) -> None:
    open_one, closed = client.predict(
        handle_file(red), "what colour?\nwhat colour? | red, blue", longest=8, api_name="/vqa"
    )
    turn = Turn("user", "what colour?", (picture_ref(red),))
    expected = engine.choose([turn], ["red", "blue"]).result()

    assert open_one["answer"] == engine.adapter().ask(red, "what colour?", decoding=Decoding(max_new_tokens=8))
    assert 0 < open_one["confidence"] <= 1
    assert closed["answer"] == expected.text
    assert closed["choices"] == pytest.approx(expected.choices)


def test_a_caption_is_the_engines(client: Client, engine: Engine, red: Path) -> None:
    said = client.predict(handle_file(red), "greedy", longest=8, api_name="/caption")

    assert said == engine.adapter().caption(red, decoding=Decoding(max_new_tokens=8))
    assert len(client.predict(handle_file(red), "varied", longest=8, api_name="/caption").splitlines()) >= 1


def test_a_thought_and_its_answer(client: Client, red: Path) -> None:
    found = client.predict(handle_file(red), "why?", "red, blue", longest=12, api_name="/reason")

    assert found.keys() == {"rationale", "answer", "confidence", "choices"}
    assert found["rationale"] and 0 < found["confidence"] <= 1
    assert found["choices"].keys() == {"red", "blue"} and found["choices"][found["answer"]] == found["confidence"]


def test_the_folder_is_searched_by_words_and_by_a_picture(client: Client, red: Path) -> None:
    by_words = client.predict("a red square", where="folder", most=12, api_name="/search")
    by_picture = client.predict(like=handle_file(red), where="folder", most=3, api_name="/search")

    assert {hit["picture"] for hit in by_words} == {
        "deeper/red1.png" if (name, n) == ("red", 1) else f"{name}{n}.png" for name in COLOURS for n in range(3)
    }
    assert all(0 <= hit["match"] <= 1 for hit in by_words)
    assert by_picture[0]["picture"] == "red0.png" and by_picture[0]["score"] == pytest.approx(1, abs=1e-2)
    assert [hit["match"] for hit in by_picture] == [None] * 3


@pytest.mark.parametrize("together", [1, 16])
def test_uploaded_pictures_are_searched(
    client: Client, pictures: Path, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.page.tabs.search._TOGETHER", together)
    files = [handle_file(pictures / name) for name in ("blue0.png", "red0.png")]
    found = client.predict(like=handle_file(pictures / "red0.png"), where="uploads", files=files, api_name="/search")

    assert [hit["picture"] for hit in found] == ["red0.png", "blue0.png"]


def test_an_uploaded_file_that_is_no_picture_is_left_out_and_named(client: Client, pictures: Path) -> None:
    files = [handle_file(pictures / name) for name in ("blue0.png", "broken.png", "red0.png")]
    *found, left_out = client.predict("a red square", where="uploads", files=files, api_name="/search")

    assert {hit["picture"] for hit in found} == {"red0.png", "blue0.png"}
    assert left_out["picture"] == "broken.png" and left_out["score"] is None
    assert "'broken.png' is not a picture" in left_out["error"]
    with pytest.raises(AppError, match=r"None of the 2 files is a picture: .*broken\.png"):
        client.predict("red", where="uploads", files=[files[1], files[1]], api_name="/search")


def test_another_adapter_cannot_search(client: Client) -> None:
    with pytest.raises(AppError, match="plain was trained without its text side"):
        client.predict("red", where="folder", adapter="plain", api_name="/search")


def test_the_searched_folder_stays_out_of_reach(address: str, client: Client, pictures: Path) -> None:
    client.predict("a red square", where="folder", api_name="/search")
    with pytest.raises(Exception, match="403"):
        get(f"{address}gradio_api/file={pictures / 'red0.png'}")


def test_where_the_bridge_looks_is_drawn(client: Client, red: Path) -> None:
    every, words = client.predict(handle_file(red), api_name="/look")
    one, about_one = client.predict(handle_file(red), query=2, layer=1, api_name="/look")

    assert Image.open(every).size == Image.open(one).size == (512, 512)
    assert words.startswith("All 3 glances together.") and words.endswith(CAVEAT)
    assert about_one.startswith("Glance 2 of 3")


def test_a_query_that_is_none_is_told(client: Client, red: Path) -> None:
    with pytest.raises(AppError, match="take 1 to 3"):
        client.predict(handle_file(red), query=4, api_name="/look")


def test_the_folder_s_pictures_may_come_and_go(client: Client, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    client.predict("a red square", where="folder", most=1, api_name="/search")
    monkeypatch.setattr("serve.page.tabs.search._FRESH", 0.0)
    (pictures / "blue0.png").rename(pictures / "moved.png")
    try:
        found = client.predict("a blue square", where="folder", most=24, api_name="/search")
    finally:
        (pictures / "moved.png").rename(pictures / "blue0.png")
        client.predict("a blue square", where="folder", most=1, api_name="/search")  # the index follows back

    names = {hit["picture"] for hit in found}
    assert "moved.png" in names and "blue0.png" not in names


def test_others_have_a_turn_while_a_folder_is_encoded(
    engine: Engine, pictures: Path, red: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUERYBRIDGE_CACHE", str(tmp_path))  # no index yet
    monkeypatch.setattr("serve.page.tabs.search._TOGETHER", 1)
    pending_answers: list[PendingAnswer] = []
    answered: list[bool] = []
    embed_images = Retriever.embed_images

    def embed(retriever: Retriever, refs: Sequence[ImageRef]) -> Tensor:
        if not pending_answers:
            turn = Turn("user", "what?", (picture_ref(red),))
            pending_answers.append(engine.chat([turn], adapter="plain", decoding=Decoding(max_new_tokens=2)))
        answered.append(pending_answers[0].done)
        return embed_images(retriever, refs)

    monkeypatch.setattr(Retriever, "embed_images", embed)
    found = ImageFinder(engine, pictures).in_folder("a red square", 24, "finds")

    assert len(found) == len(COLOURS) * 3
    assert answered == [False] + [True] * (len(found) - 1)


def test_an_older_index_is_searched_while_another_visitor_brings_it_up_to_date(
    engine: Engine, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUERYBRIDGE_CACHE", str(tmp_path))
    monkeypatch.setattr("serve.page.tabs.search._FRESH", 0.0)
    finder = ImageFinder(engine, pictures)
    finder.index_folder()
    with finder._updating["finds"]:  # as it is while another visitor's request sees to it
        found = finder.in_folder("a red square", 24, "finds")

    assert len(found) == len(COLOURS) * 3


def test_a_full_queue_refuses_a_search_before_anything_is_encoded(
    engine: Engine, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QUERYBRIDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(Retriever, "embed_images", lambda *_: pytest.fail("it encodes"))
    monkeypatch.setattr(engine, "max_waiting", 0)
    with pytest.raises(Busy):
        ImageFinder(engine, pictures).in_folder("a red square", 24, "finds")
