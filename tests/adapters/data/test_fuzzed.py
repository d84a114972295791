"""Readers and picture loader on rows and bytes that Hypothesis makes up: an answer or one clear line, never a crash.

Small, and always the same, in a usual run. To try more, at random:
`QUERYBRIDGE_FUZZ=1000 pytest tests/adapters/data/test_fuzzed.py`.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from adapters.data.images import open_image
from adapters.data.reading import read_rows
from qformer.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:PIL")  # Pillow's own, of damaged pictures

MORE = int(os.environ.get("QUERYBRIDGE_FUZZ", "0"))
FUZZED = settings(
    max_examples=MORE or 60,
    derandomize=not MORE,
    deadline=5000,  # milliseconds: no input may hang
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)

# -- rows --------------------------------------------------------------------------------------------------------------

NAMES = (
    "image", "images", "file_name", "question", "answer", "answers", "caption", "captions", "choices", "context",
    "rationale", "kind", "id", "language", "messages", "conversations", "texts", "instruction", "output", "history",
    "system", "input", "steps",
)  # fmt: skip
words = st.one_of(
    st.sampled_from(
        ["a.png", "../a.png", "/etc/passwd", "<image>", "<image> what?", "yes", "", " ", "data:image/png;base64,AAAA",
         "data:", "http://a/b.png", "~x", "NaN", "[1", '["a", "b"]', "\ud83d", "\x00", "=1+1", "x" * 5000]
    ),
    st.text(max_size=12),
)  # fmt: skip
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), words)
turns = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "role": st.sampled_from(["user", "assistant", "system", "tool"]) | scalars,
            "from": st.sampled_from(["human", "gpt"]),
            "content": words | st.lists(st.dictionaries(st.sampled_from(["type", "text", "image_url"]), words)),
            "value": words,
            "weight": scalars,
        },
    ),
    max_size=4,
)
values = st.one_of(scalars, st.lists(scalars, max_size=4), turns, st.dictionaries(words, scalars, max_size=3))
likely = {name: values for name in NAMES} | {
    "image": st.just("a.png") | values,
    "question": st.just("what is it?") | values,
    "answer": st.just("a cat") | values,
    "messages": turns | values,
}
rows = st.lists(st.fixed_dictionaries({}, optional=likely) | values, max_size=4)


def as_lines(made: list[Any]) -> bytes:
    return "\n".join(map(json.dumps, made)).encode()


def as_list(made: list[Any]) -> bytes:
    return json.dumps(made).encode()


def as_table(made: list[Any]) -> bytes:
    file = io.StringIO()
    table = csv.writer(file, delimiter=";")
    names = sorted({name for row in made if isinstance(row, dict) for name in row if name in NAMES}) or ["image"]
    table.writerow(names)
    for row in made:
        if isinstance(row, dict):
            table.writerow(
                [value if isinstance(value := row.get(name, ""), str) else json.dumps(value) for name in names]
            )
    return file.getvalue().encode(errors="replace")


def as_archive(made: list[Any]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for number, row in enumerate(made):
            for ending, content in (("json", json.dumps(row).encode()), ("png", PICTURES["PNG"])):
                member = tarfile.TarInfo(f"{number}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


WRITTEN: dict[str, Callable[[list[Any]], bytes]] = {
    "r.jsonl": as_lines,
    "r.jsonl.gz": lambda made: gzip.compress(as_lines(made)),
    "r.json": as_list,
    "r.csv": as_table,
    "r.tar": as_archive,
}


def answered_or_refused(path: Path, **how: Any) -> None:
    """Read a file; what is wrong with it, or with a row, is one line that names the file."""
    try:
        found = read_rows(path, **how)
    except UserError as error:
        assert "\n" not in str(error) and str(path) in str(error), error
        return
    assert found.rows >= len(found.faults)
    for fault in found.faults:
        assert "\n" not in str(fault) and str(path) in str(fault)
        str(fault).encode()
    for example in found.examples:
        assert example.images and all(answer == answer.strip() for answer in example.answers)


@pytest.mark.parametrize("name", WRITTEN)
@FUZZED
@given(made=rows, need_answers=st.booleans(), task=st.sampled_from([None, "vqa", "caption", "reason"]))
def test_rows_of_any_kind(name: str, made: list[Any], need_answers: bool, task: str | None, folder: Path) -> None:
    path = folder / name
    path.write_bytes(WRITTEN[name](made))
    answered_or_refused(path, need_answers=need_answers, task=task)


# -- bytes -------------------------------------------------------------------------------------------------------------


def picture(kind: str, mode: str = "RGB", **how: Any) -> bytes:
    file = io.BytesIO()
    Image.effect_noise((12, 9), 60).convert(mode).save(file, kind, **how)
    return file.getvalue()


PICTURES = {
    "PNG": picture("PNG"),
    "JPEG": picture("JPEG"),
    "GIF": picture("GIF", "P", save_all=True, append_images=[Image.new("P", (12, 9))]),
    "WEBP": picture("WEBP"),
    "TIFF": picture("TIFF", compression="tiff_lzw"),
    "BMP": picture("BMP"),
    "PPM": picture("PPM"),
}


@st.composite
def damaged(draw: st.DrawFn, content: bytes) -> bytes:
    """A file cut off, with bytes changed, put in, left out or doubled."""
    changed = bytearray(content)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(0, len(changed) - 1)))
        way = draw(st.sampled_from(["change", "change", "cut", "insert", "leave out", "double", "large"]))
        if way == "change" and changed:
            changed[place] = draw(st.integers(0, 255))
        elif way == "cut":
            del changed[place:]
        elif way == "insert":
            changed[place:place] = draw(st.binary(min_size=1, max_size=20))
        elif way == "leave out":
            del changed[place : place + draw(st.integers(1, 30))]
        elif way == "double":
            changed[place:place] = changed[place : place + 40]
        else:
            changed[place : place + 4] = draw(st.sampled_from([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4)]))
    return bytes(changed)


@pytest.mark.parametrize("kind", PICTURES)
@FUZZED
@given(data=st.data())
def test_damaged_pictures(kind: str, data: st.DataObject) -> None:
    content = data.draw(damaged(PICTURES[kind]))
    try:
        opened = open_image(content)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert opened.mode == "RGB" and min(opened.size) > 0


ROW = {"image": "a.png", "question": "what?", "answers": ["a", "b"]}


def written_by_libraries(folder: Path) -> dict[str, bytes]:
    import pandas

    frame = pandas.DataFrame([{"image": "a.png", "question": f"what {n}?", "answer": "x"} for n in range(4)])
    frame.to_excel(folder / "r.xlsx", index=False)
    frame.assign(image=[PICTURES["PNG"]] * 4).to_parquet(folder / "r.parquet")
    frame.to_feather(folder / "r.arrow")
    frame.to_json(folder / "r.jsonl.zst", orient="records", lines=True)
    found = {name: (folder / name).read_bytes() for name in ("r.xlsx", "r.parquet", "r.arrow", "r.jsonl.zst")}
    return found | {name: write([ROW, ROW | {"id": 7}]) for name, write in WRITTEN.items()}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return written_by_libraries(tmp_path_factory.mktemp("originals"))


@pytest.mark.parametrize("name", ["r.xlsx", "r.parquet", "r.arrow", "r.jsonl.zst", *WRITTEN])
@FUZZED
@given(data=st.data())
def test_damaged_files(name: str, data: st.DataObject, originals: dict[str, bytes], folder: Path) -> None:
    path = folder / name
    path.write_bytes(data.draw(damaged(originals[name])))
    answered_or_refused(path)


# -- bombs -------------------------------------------------------------------------------------------------------------

READ_IT = """
import sys
from pathlib import Path
from adapters.data.reading import read_rows
from qformer.errors import UserError
try:
    read_rows(sys.argv[1])
except UserError as error:
    print(error)
print(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) >> 10)  # not what the parent held
"""


@pytest.mark.parametrize(
    "name", ["line.jsonl.gz", "line.jsonl.zst", "list.json.gz", "cell.csv.gz", "wide.csv.gz", "t.xlsx"]
)
def test_a_small_file_that_unpacks_to_a_gibibyte(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    write_bomb(path)
    assert path.stat().st_size < 4 * 2**20
    run = subprocess.run([sys.executable, "-c", READ_IT, str(path)], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    *said, peak = run.stdout.splitlines()
    assert len(said) == 1 and str(path) in said[0] and "MiB" in said[0]
    assert int(peak) < 500  # MiB


def write_bomb(path: Path) -> None:
    """A gibibyte of one letter in one line, in a list of lines or in a cell; or 300 MiB in a workbook's part."""
    block = b"a" * 2**20
    kind = path.name.partition(".")[0]
    if path.suffix == ".xlsx":
        with (
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
            archive.open("xl/sharedStrings.xml", "w") as file,
        ):
            for _ in range(300):
                file.write(block)
        return
    start = {"line": b'{"image": "', "list": b'["', "cell": b'image,question,answer\na.png,"'}
    first = b"\xff\xfe" + "image,question\n".encode("utf-16-le") if kind == "wide" else start[kind]
    # the parts of a packed file may follow each other, so each is packed once
    pack = zstandard.ZstdCompressor().compress if path.suffix == ".zst" else gzip.compress
    path.write_bytes(pack(first) + 2**10 * pack(block + (b"\n" if kind == "list" else b"")))
