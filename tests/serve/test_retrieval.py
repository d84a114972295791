"""Search over a folder's index and naming by labels, with a trained tiny first stage."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import COLOURS, draw_captions, save_tiny_bert, tiny_values

from adapters.data.image_ref import ImageRef
from adapters.inference.retrieval import CLASSES_READ
from adapters.pretrain import pretrain
from adapters.recipe import parse_recipe
from qformer.class_reader import Classifier
from qformer.errors import UserError
from serve.retrieval import IndexReport, PictureIndex, classify, load_retriever


@pytest.fixture(scope="module")
def adapter(vision_folder: Path, language_folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first stage that has learned the colours of squares."""
    folder = tmp_path_factory.mktemp("adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QUERYBRIDGE_CACHE", str(folder / "cache"))
        settings = {"max_steps": 150, "batch_size": 9, "learning_rate": 5e-3, "warmup_steps": 5, "validate_every": 150}
        values: Any = tiny_values(vision_folder, language_folders["llama"], draw_captions(folder / "data"), **settings)
        values["task"] = "caption"
        values["bridge"] |= {"start": str(save_tiny_bert(folder / "bert")), "dropout": 0.0, "text_branch": True}
        pretrain(parse_recipe(values, "test"), folder / "run", device="cpu", dtype="float32", quiet=True)
    return folder / "run" / "last"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    draw_captions(tmp_path / "pictures")
    (tmp_path / "pictures" / "deeper").mkdir()
    shutil.move(tmp_path / "pictures" / "red1.png", tmp_path / "pictures" / "deeper" / "red1.png")
    return tmp_path / "pictures"


@pytest.fixture
def index(adapter: Path, pictures: Path, cache_here: Path) -> PictureIndex:
    retriever, key = load_retriever(adapter, device="cpu")
    return PictureIndex(pictures, retriever, key=key)


def test_words_find_pictures_and_the_index_is_kept(index: PictureIndex, adapter: Path) -> None:
    report = index.update()
    assert (report.pictures, report.encoded, report.removed, report.unreadable) == (12, 12, 0, ())
    for rerank in (True, False):
        hits = index.search("a red square", most=3, rerank=rerank)
        assert [hit.match is not None for hit in hits] == [rerank] * 3
        assert {Path(hit.path).name for hit in hits} == {"red0.png", "red1.png", "red2.png"}
    again = PictureIndex(index.folder, index.retriever, key=load_retriever(adapter, device="cpu")[1])
    assert again.update().encoded == 0
    kept, fresh = (
        again.search("a blue square", most=12, rerank=False),
        index.search("a blue square", most=12, rerank=False),
    )
    assert kept == fresh


def test_the_index_follows_the_folder(index: PictureIndex) -> None:
    index.update()
    (index.folder / "red0.png").unlink()
    Image.new("RGB", (40, 40), COLOURS["blue"]).save(index.folder / "new.png")
    Image.new("RGB", (40, 40), COLOURS["red"]).save(index.folder / "blue0.png")  # changed
    (index.folder / "broken.jpg").write_bytes(b"not a picture")
    report = index.update()
    assert (report.pictures, report.encoded, report.removed) == (12, 2, 1)
    assert len(report.unreadable) == 1 and "broken.jpg" in report.unreadable[0]
    assert report.left_out() == [f"left out: {report.unreadable[0]}"]
    found = {hit.path for hit in index.search("a red square", most=3, rerank=False)}
    assert found == {"deeper/red1.png", "red2.png", "blue0.png"}


def test_linked_folders_and_further_endings_are_listed_once(index: PictureIndex, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    for name in ("a.jfif", "b.avif"):
        Image.new("RGB", (40, 40), "red").save(outside / name, "AVIF" if name.endswith("avif") else "JPEG")
    (index.folder / "linked").symlink_to(outside, target_is_directory=True)
    (index.folder / "linked_again").symlink_to(outside, target_is_directory=True)
    (outside / "circle").symlink_to(index.folder, target_is_directory=True)
    report = index.update()
    assert (report.pictures, report.unreadable) == (14, ())
    paths = {hit.path for hit in index.search("a red square", most=14, rerank=False)}
    assert {"linked/a.jfif", "linked/b.avif"} <= paths and len(paths) == 14


def test_what_is_not_searched_is_told(index: PictureIndex) -> None:
    for name in ("phone.HEIC", "drawing.svg", "notes.txt"):
        (index.folder / name).write_bytes(b"x")
    (index.folder / "lost.png").symlink_to(index.folder / "nowhere.png")
    (index.folder / "lost").symlink_to(index.folder / "nowhere", target_is_directory=True)
    report = index.update()
    assert report.pictures == 12
    assert report.unreadable == (
        "'drawing.svg': pictures in .svg are not read; save it as JPEG or PNG",
        "'lost' is a link to what is not there: mend or delete it",
        "'lost.png' is a link to what is not there: mend or delete it",
        "'phone.HEIC': pictures in .heic are not read; save it as JPEG or PNG",
    )


def test_what_was_deleted_since_is_not_found(index: PictureIndex) -> None:
    index.update()
    (index.folder / "red0.png").unlink()
    names = {hit.path for hit in index.search("a red square", most=12)}
    assert len(names) == 11 and "red0.png" not in names
    for path in index.folder.rglob("*.png"):
        path.unlink()
    with pytest.raises(UserError, match="no pictures in it"):
        index.search("a red square")


def test_of_many_files_that_are_left_out_some_are_named() -> None:
    lines = IndexReport(0, 0, 0, tuple(f"file {n}" for n in range(12))).left_out()
    assert lines == [*(f"left out: file {n}" for n in range(10)), "left out: 12 files in all"]


def test_a_damaged_index_is_made_anew(index: PictureIndex) -> None:
    index.update()
    index._file.write_bytes(index._file.read_bytes()[:50])
    assert index.update().encoded == 12


def test_a_picture_finds_its_like(index: PictureIndex) -> None:
    index.update()
    hits = index.search(ImageRef("query", path=index.folder / "blue1.png"), most=3)
    assert hits[0].path == "blue1.png"
    assert {Path(hit.path).name for hit in hits} == {"blue0.png", "blue1.png", "blue2.png"}


def test_another_adapter_has_another_index(index: PictureIndex) -> None:
    index.update()
    assert PictureIndex(index.folder, index.retriever, key="other").update().encoded == 12


def test_labels_are_named(index: PictureIndex) -> None:
    for colour in COLOURS:
        shares = classify(
            index.retriever, index.folder / f"{colour}2.png", list(COLOURS), templates=["a {label} square"]
        )
        assert next(iter(shares)) == colour
        assert sum(shares.values()) == pytest.approx(1.0, abs=1e-5)
    image = index.retriever.embed_images([ImageRef("x", path=index.folder / "red2.png")])
    texts = index.retriever.embed_texts(["a red square", "a blue square"])
    expected = (index.retriever.scores(image, texts)[0] / index.retriever.model.heads.temperature.item()).softmax(0)
    found = classify(index.retriever, index.folder / "red2.png", ["red", "blue"], templates=["a {label} square"])
    assert torch.allclose(torch.tensor([found["red"], found["blue"]]), expected, atol=1e-5)


def test_mistakes_are_one_clear_line(index: PictureIndex, tmp_path: Path) -> None:
    picture = index.folder / "red2.png"
    for labels, said in ((["one"], "at least two"), (["a", "a"], "twice")):
        with pytest.raises(UserError, match=said):
            classify(index.retriever, picture, labels)
    with pytest.raises(UserError, match="label"):
        classify(index.retriever, picture, ["a", "b"], templates=["a photo"])
    with pytest.raises(UserError, match="no such folder"):
        PictureIndex(tmp_path / "nowhere", index.retriever, key="k")
    (tmp_path / "empty").mkdir()
    empty = PictureIndex(tmp_path / "empty", index.retriever, key="k")
    assert empty.update().pictures == 0
    with pytest.raises(UserError, match="no pictures"):
        empty.search("red")
    index.update()
    with pytest.raises(UserError, match="empty"):
        index.search("  ")


def test_the_encoders_own_classes_count_where_it_has_them(
    adapter: Path, pictures: Path, cache_here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An encoder that is sure of "black", whatever it sees, makes black likelier and leaves the others' order."""
    retriever, _ = load_retriever(adapter, device="cpu")
    labels = ["red", "blue", "black"]
    before = classify(retriever, pictures / "red0.png", labels)
    encoder = retriever.vision_side.encoders[0]
    assert encoder.classifier is None
    names = ("black", *(f"colour {place}" for place in range(CLASSES_READ)))
    bias = torch.tensor([50.0] + [0.0] * CLASSES_READ)
    monkeypatch.setattr(encoder, "classifier", Classifier(torch.zeros(len(names), encoder.width), bias, names))
    after = classify(retriever, pictures / "red0.png", labels)
    assert after["black"] > before["black"] and sum(after.values()) == pytest.approx(1, abs=1e-5)
