"""`querybridge import` and `export`: what they print, and what is one line with exit code 2."""

from __future__ import annotations

from pathlib import Path

import pytest
from command import Call
from published import draw_pictures, save_published


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published") / "blip2"
    save_published(folder, "blip2-opt")
    return folder


def test_what_is_imported_answers_at_once_and_goes_out_again(published: Path, call: Call, tmp_path: Path) -> None:
    done = call("import", published, "--out", tmp_path / "run", "--json")
    assert done.code == 0, done.err
    assert done.values == {
        "out": str(tmp_path / "run"), "class": "Blip2ForConditionalGeneration", "queries": 3, "language": "opt",
        "bridge_bytes": done.values["bridge_bytes"],
    }  # fmt: skip
    (picture,) = draw_pictures(tmp_path / "pictures", 1)
    asked = call("ask", picture, "what is it?", "--adapter", tmp_path / "run", "--max-new-tokens", 3, "--json")
    assert asked.code == 0 and 0 < asked.values["confidence"] <= 1, asked.err
    out = call("export", tmp_path / "run", "--to", "blip2", "--out", tmp_path / "out")
    assert out.code == 0, out.err
    assert out.out.startswith(f"{tmp_path / 'out'}: Blip2ForConditionalGeneration, ") and out.out.endswith(" MiB\n")
    assert (tmp_path / "out" / "config.json").is_file()


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (("import", "PUBLISHED", "--out", "OUT", "--quantize", "int4"), "--quantize int4: take none, nf4 or int8"),
        (("import", "nowhere", "--out", "OUT"), "source 'nowhere': there is no such folder"),
        (("export", "nowhere", "--to", "blip2", "--out", "OUT"), "nowhere"),
        (("export", "nowhere", "--to", "onnx", "--out", "OUT"), "--to onnx: take one of"),
        (("push", "nowhere", "me"), "REPOSITORY me: give 'org/name'"),
    ],
)
def test_a_mistake_is_one_line(
    published: Path, call: Call, tmp_path: Path, command: tuple[str, ...], says: str
) -> None:
    words = {"PUBLISHED": published, "OUT": tmp_path / "out"}
    done = call(*(words.get(word, word) for word in command))
    assert done.code == 2 and says in done.err and done.err.count("\n") == 1
    assert not (tmp_path / "out").exists()
