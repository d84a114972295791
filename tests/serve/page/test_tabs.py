"""The page's endpoints over an engine without models: what each asks of it, gives back, and says of mistakes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from fake_engine import FakeAdapter, FakeEngine, make_recipe
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError
from page_client import PageClient
from page_server import served
from PIL import Image

from qformer.decoding import Decoding
from serve.engine.pending import Answer
from serve.page.inputs import Settings, plain_words
from serve.page.notes import about, footnote, head, how_it_went, look_note, reason_note, search_note
from serve.page.tabs.reason import ReasoningInProgress, as_messages
from serve.page.tabs.vqa import as_table, parse_line


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


def said(text: str, *pictures: Path) -> dict[str, Any]:
    return {"text": text, "files": [handle_file(path) for path in pictures]}


def test_a_conversation_goes_on_about_the_pictures_of_its_turns(client: Client, folder: Path) -> None:
    first = client.predict(said("which?", folder / "red.png", folder / "blue.png"), api_name="/chat")
    second = client.predict(said("and now?"), api_name="/chat")
    third = client.predict(said("with another?", folder / "green.png"), api_name="/chat")

    assert first == "asked 'which?' about red.png (40, 30), blue.png (40, 30) after 0 turns"
    assert second == "asked 'and now?' about red.png (40, 30), blue.png (40, 30) after 1 turns"
    assert third.endswith("about red.png (40, 30), blue.png (40, 30), green.png (40, 30) after 2 turns")


def test_conversations_of_two_clients_are_apart(client: Client, address: str, folder: Path) -> None:
    client.predict(said("mine", folder / "red.png"), api_name="/chat")

    assert "after 0 turns" in PageClient(address, verbose=False).predict(said("theirs"), api_name="/chat")


def test_an_answer_is_tried_again_taken_back_and_forgotten(client: Client, engine: FakeEngine, folder: Path) -> None:
    client.predict(said("one", folder / "red.png"), api_name="/chat")
    client.predict(said("two"), api_name="/chat")
    again = client.predict(api_name="/retry")
    back = client.predict(api_name="/undo")
    after = client.predict(said("three"), api_name="/chat")
    client.predict(api_name="/clear")
    anew = client.predict(said("four"), api_name="/chat")

    assert again == "asked 'two' about red.png (40, 30) after 1 turns"
    assert [decoding.temperature for decoding in engine.decodings] == [
        0,
        0,
        0.7,
        0,
        0,
    ]  # or the words would be the same
    assert back == "two"
    assert after == "asked 'three' about red.png (40, 30) after 1 turns"
    assert anew == "asked 'four' about nothing after 0 turns"


@pytest.mark.parametrize("name", ["/retry", "/undo"])
def test_before_a_question_there_is_nothing_to_try_again(client: Client, name: str) -> None:
    with pytest.raises(AppError, match="no question yet"):
        client.predict(api_name=name)


def test_an_answer_streams_and_is_stopped(client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "pause", 0.02)
    job = client.submit(said("count"), api_name="/chat")
    while len(job.outputs()) < 3:
        time.sleep(0.01)
    client.predict(api_name="/stop")
    last = job.result()
    monkeypatch.setattr(engine, "pause", 0.0)

    assert engine.pending[0].stopped
    assert last.startswith("0 1 2") and len(last.split()) < 1000
    assert job.outputs()[0] in last
    assert client.predict(said("and?"), api_name="/chat").endswith("after 1 turns")  # what was written stays


def test_who_leaves_stops_the_writing(client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "pause", 0.02)
    job = client.submit(said("count"), api_name="/chat")
    while not job.outputs():
        time.sleep(0.01)
    job.cancel()
    began = time.monotonic()
    while not engine.pending[0].stopped and time.monotonic() - began < 15:
        time.sleep(0.05)

    assert engine.pending[0].stopped


def test_one_answer_at_a_time_in_a_conversation(
    client: Client, engine: FakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "pause", 0.02)
    job = client.submit(said("count"), api_name="/chat")
    while not job.outputs():
        time.sleep(0.01)
    with pytest.raises(AppError, match="still being written"):
        client.predict(said("me too"), api_name="/chat")
    client.predict(api_name="/stop")
    job.result()


def test_what_is_cleared_while_it_is_written_stays_away(
    client: Client, engine: FakeEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client.predict(said("one", folder / "red.png"), api_name="/chat")
    monkeypatch.setattr(engine, "pause", 0.02)
    job = client.submit(said("count"), api_name="/chat")
    while not job.outputs():
        time.sleep(0.01)
    with pytest.raises(AppError, match="still being written"):
        client.predict(api_name="/undo")
    client.predict(api_name="/clear")
    job.result()
    monkeypatch.setattr(engine, "pause", 0.0)

    assert engine.pending[1].stopped
    assert client.predict(said("two"), api_name="/chat") == "asked 'two' about nothing after 0 turns"


def test_a_failed_turn_leaves_the_conversation_as_it_was(client: Client, engine: FakeEngine, folder: Path) -> None:
    client.predict(said("one", folder / "red.png"), api_name="/chat")
    with pytest.raises(AppError, match=r"'text\.jpg' is not a picture"):
        client.predict(said("two", folder / "text.jpg"), api_name="/chat")
    engine.busy = True
    with pytest.raises(AppError, match="Many questions are waiting: try again in a moment"):
        client.predict(api_name="/retry")
    engine.busy = False

    assert client.predict(said("three"), api_name="/chat") == "asked 'three' about red.png (40, 30) after 1 turns"


def test_marks_for_pictures_are_counted(client: Client, folder: Path) -> None:
    with pytest.raises(AppError, match="2 <image> marks but 1 pictures"):
        client.predict(said("<image> or <image>?", folder / "red.png"), api_name="/chat")


def test_questions_about_one_picture_are_asked_at_once(client: Client, engine: FakeEngine, folder: Path) -> None:
    rows = client.predict(handle_file(folder / "red.png"), "what?\n\nwhat colour? | red, green , blue", api_name="/vqa")

    assert rows == [
        {
            "question": "what?",
            "answer": "asked 'what?' about red.png (40, 30) after 0 turns",
            "confidence": pytest.approx(0.87),
        },
        {
            "question": "what colour?",
            "answer": "red",
            "confidence": pytest.approx(0.7),
            "choices": {"red": 0.7, "green": 0.2, "blue": 0.1},
        },
    ]
    assert len(engine.pending) == 2


def test_questions_are_answered_as_the_adapter_usually_does(
    client: Client, engine: FakeEngine, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(FakeAdapter, "default_decoding", lambda *_: Decoding.preset("likeliest"))
    (row,) = client.predict(handle_file(folder / "red.png"), "what?", api_name="/vqa")
    client.predict(handle_file(folder / "red.png"), "what?", beams=3, api_name="/vqa")

    assert engine.decodings == [Decoding.preset("likeliest"), replace(Decoding.preset("likeliest"), num_beams=3)]
    assert "87%" in as_table([row])


@pytest.mark.parametrize(
    ("questions", "says"),
    [("", "no question yet"), (" \n ", "no question yet"), ("what? | red", "name at least two"),
     ("| red, blue", "no question before the bar"), ("why?\n" * 25, "25 questions at once are too many")],
)  # fmt: skip
def test_questions_that_cannot_be_asked_are_told(client: Client, folder: Path, questions: str, says: str) -> None:
    with pytest.raises(AppError, match=says):
        client.predict(handle_file(folder / "red.png"), questions, api_name="/vqa")


def test_captions_in_three_styles_and_two_languages(client: Client, engine: FakeEngine, folder: Path) -> None:
    picture, default_decoding = handle_file(folder / "blue.png"), Decoding.preset("caption")
    assert default_decoding.num_beams > 1

    assert client.predict(picture, api_name="/caption") == "a caption (en) of blue.png"
    assert client.predict(picture, "greedy", "zh", api_name="/caption") == "a caption (zh) of blue.png"
    assert client.predict(picture, "varied", api_name="/caption").splitlines() == ["a caption (en) of blue.png"] * 3
    assert engine.decodings == [
        default_decoding,
        replace(default_decoding, num_beams=1),
        *[replace(default_decoding, num_beams=1, temperature=0.8, top_p=0.9)] * 3,
    ]


def test_the_beams_of_a_caption_may_be_set(client: Client, engine: FakeEngine, folder: Path) -> None:
    client.predict(handle_file(folder / "red.png"), longest=12, beams=3, api_name="/caption")

    assert engine.decodings == [replace(Decoding.preset("caption"), max_new_tokens=12, num_beams=3)]


def test_an_unknown_style_is_told(client: Client, folder: Path) -> None:
    with pytest.raises(AppError, match="style 'sonnet' is not known"):
        client.predict(handle_file(folder / "red.png"), "sonnet", api_name="/caption")


def test_a_thought_then_the_answer(client: Client, engine: FakeEngine, folder: Path) -> None:
    found = client.predict(handle_file(folder / "red.png"), "what may it do?", api_name="/reason")

    assert found == {
        "rationale": "It is round, so it may roll.", "answer": "a ball", "confidence": pytest.approx(0.87),
    }  # fmt: skip
    assert [decoding.max_new_tokens for decoding in engine.decodings] == [128, 32]


def test_an_answer_from_a_thought_is_one_of_the_choices(client: Client, engine: FakeEngine, folder: Path) -> None:
    found = client.predict(handle_file(folder / "red.png"), "which?", "a cube, a ball", "other", api_name="/reason")

    assert found["rationale"] == "It is round, so it may roll."
    assert (found["answer"], found["choices"]) == ("a cube", {"a cube": 0.7, "a ball": 0.2})
    assert [pending.choices for pending in engine.pending] == [(), ("a cube", "a ball")]


def test_a_format_that_only_our_opener_straightens_comes_upright(client: Client, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[274] = 6  # the camera was held on its side
    Image.new("CMYK", (40, 30)).save(tmp_path / "side.jpg", exif=exif)

    assert "side.jpg (30, 40)" in client.predict(said("which way?", tmp_path / "side.jpg"), api_name="/chat")


@pytest.mark.parametrize(
    ("name", "says"), [("text.jpg", "'text.jpg' is not a picture"), ("empty.png", "'empty.png' is empty (0 bytes)")]
)
@pytest.mark.parametrize("api", ["/vqa", "/caption", "/reason", "/look"])
def test_a_file_that_is_no_picture_is_told_in_one_line(
    client: Client, folder: Path, api: str, name: str, says: str
) -> None:
    words = {"/vqa": ["what?"], "/reason": ["what?"]}.get(api, [])
    with pytest.raises(AppError) as caught:
        client.predict(handle_file(folder / name), *words, api_name=api)

    assert says in str(caught.value)


def test_an_adapter_is_chosen_by_name(client: Client, engine: FakeEngine, folder: Path) -> None:
    client.predict(handle_file(folder / "red.png"), adapter="other", api_name="/caption")

    assert engine.pending[0].adapter.name == "other"


def test_an_adapter_without_a_text_side_cannot_search(client: Client, folder: Path) -> None:
    with pytest.raises(AppError, match="was trained without its text side"):
        client.predict("a cat", files=[handle_file(folder / "red.png")], api_name="/search")


@pytest.mark.parametrize(
    ("given", "says"),
    [({}, "nothing to look for"), ({"text": "a cat", "like": "red.png"}, "words and a picture"),
     ({"text": "a cat"}, "no pictures to search"), ({"text": "a cat", "where": "folder"}, "without its text side")],
)  # fmt: skip
def test_a_search_that_cannot_be_made_is_told(client: Client, folder: Path, given: dict[str, Any], says: str) -> None:
    values = {**given, **({"like": handle_file(folder / given["like"])} if "like" in given else {})}
    with pytest.raises(AppError, match=says):
        client.predict(**values, api_name="/search")


@pytest.mark.parametrize(
    ("values", "says"),
    [((-1, 0, 1, 0), "longest: -1 is outside"), ((0, "hot", 1, 0), "temperature: 'hot' is no number"),
     ((0, 0, 0, 0), "top_p: 0 is outside"), ((0, 0, 1, 99), "beams: 99 is outside"),
     ((0, 0.5, 1, 4), "temperature and beams do not go together"), ((0, float("nan"), 1, 0), "temperature: nan")],
)  # fmt: skip
def test_settings_out_of_bounds_are_told(values: tuple[Any, ...], says: str) -> None:
    with pytest.raises(Exception, match=says):
        Settings.of(values)


def test_settings_stand_in_the_place_of_the_usual_ones() -> None:
    default_decoding = Decoding.preset("caption")

    assert Settings().over(default_decoding) == default_decoding
    sampled = replace(default_decoding, num_beams=1, top_p=0.9)
    assert Settings.of((64, 0.5, 0.9, 0)).over(default_decoding) == replace(sampled, max_new_tokens=64, temperature=0.5)
    assert Settings.of((0, 0, 1, 2)).over(default_decoding).num_beams == 2
    assert Settings().sampled(0.7, 0.9).over(default_decoding) == replace(sampled, temperature=0.7)


def test_a_line_is_a_question_with_or_without_choices() -> None:
    assert parse_line("what is it?") == ("what is it?", ())
    assert parse_line(" is it red? | yes ,, no ") == ("is it red?", ("yes", "no"))


def test_words_of_anybody_are_shown_as_they_are() -> None:
    table = as_table([{"question": "<b>?", "answer": "<script>", "confidence": 0.5}])
    thought = as_messages(ReasoningInProgress("<img src=x>", "<b>", 1.0))

    assert "<script>" not in table and "&lt;script&gt;" in table and "&lt;b&gt;?" in table
    assert thought[0]["content"] == "&lt;img src=x&gt;" and thought[1]["content"] == "&lt;b&gt;"


def test_a_thought_stays_open_until_it_is_folded_by_hand() -> None:
    (growing,) = as_messages(ReasoningInProgress("It is"))
    thought, answer = as_messages(ReasoningInProgress("It is round.", "a ball", 2.31))

    assert growing["metadata"] == {"title": "Thinking", "status": "pending"}
    assert thought["metadata"] == {"title": "Thought", "duration": 2.3}  # "done" would fold it
    assert answer["content"] == "a ball"


def test_what_came_of_an_answer_is_told() -> None:
    assert how_it_went(Answer("x", "a", "stop", 0.874, 3, 9), 1.26) == "87% sure of its words · a · 1.3 s"
    assert how_it_went(Answer("x", "a", "stopped", None, 3, 9)) == "a · stopped"
    assert "cut off" in how_it_went(Answer("x", "a", "length", 0.5, 3, 9))
    assert how_it_went(Answer("x", "a", "stop", 0.7, 0, 9, {"x": 0.7, "<y>": 0.3})) == "x 70% · <y> 30% · a"
    assert "31% sure of its words · low confidence: check it" in how_it_went(Answer("x", "a", "stop", 0.31, 3, 9))
    assert footnote(Answer("x", "a_<b>", "stop", 0.9, 3, 9), 1.0) == "*90% sure of its words · a\\_&lt;b&gt; · 1.0 s*"


def test_an_adapter_is_introduced_with_what_it_learned(engine: FakeEngine) -> None:
    adapter: Any = engine.adapter()

    assert "quickstart" in head(adapter)
    assert "shapes &amp; &lt;colours&gt;" in head(adapter)
    assert "1,234 answers about 321 pictures" in about(adapter) and "96.2% right" in about(adapter)
    assert "MIT &lt;b&gt;or&lt;/b&gt; so" in about(adapter)


def test_messages_have_no_flags_and_no_bytes() -> None:
    words = plain_words("--adapter runs/x: 'a.png' is not a picture (it starts with b'\\x00\\'x'); use --offline")
    assert words == "adapter runs/x: 'a.png' is not a picture; use “offline”"
    assert plain_words("QUESTION: it is empty") == "it is empty"


def test_notes_are_honest_about_what_was_not_taught(folder: Path) -> None:
    plain: Any = FakeAdapter(make_recipe(folder), "plain")
    taught: Any = FakeAdapter(make_recipe(folder, task="reason"), "taught")
    direct: Any = FakeAdapter(make_recipe(folder, task="reason", reason={"stages": ["direct"]}), "direct")
    mean: Any = FakeAdapter(make_recipe(folder, bridge={"kind": "mean"}), "mean")
    text: Any = FakeAdapter(make_recipe(folder, bridge={"text_branch": True}), "text")

    assert "was not trained to give reasons" in reason_note(plain)
    assert "made from the thought" in reason_note(taught)
    assert "trained to answer directly" in reason_note(direct)
    assert "has no queries" in look_note(mean) and look_note(plain) == ""
    assert "text side" in search_note(plain) and search_note(text) == ""
