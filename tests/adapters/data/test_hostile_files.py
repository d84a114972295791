"""Files that were made to do harm: each is refused in one line, at once, and nothing leaves its place."""

from __future__ import annotations

import io
import json
import struct
import tarfile
import time
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pytest
import torch
from data_rows import VQA
from PIL import Image
from pyarrow import parquet
from torch import nn

from adapters.data.formats import columnar
from adapters.data.formats.raw_rows import RawRow
from adapters.data.images import open_image
from adapters.data.reading import read_rows
from adapters.recipe import load_recipe
from adapters.training.checkpoint import RunState, load_state, save_state
from qformer.errors import UserError


def test_a_picture_that_would_fill_the_memory() -> None:
    """A PNG of a few hundred bytes says that it has 40 000 x 40 000 pixels, which is 4.8 GB of them."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    bomb = (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(10**5)))
        + chunk(b"IEND", b"")
    )
    began = time.process_time()
    with pytest.raises(UserError, match=r"has 40000 x 40000 = 1,600,000,000 pixels, over the cap"):
        open_image(bomb)
    assert time.process_time() - began < 1


@pytest.mark.parametrize("start", ["", '<?xml version="1.0"?>\n', "<!-- a picture -->"])
def test_a_drawing_that_could_fetch_or_run(start: str) -> None:
    drawing = f'{start}<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/><script/></svg>'
    with pytest.raises(UserError, match="save it as JPEG or PNG"):
        open_image(drawing.encode())


def test_an_archive_s_members_stay_inside(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), "red").save(buffer, "PNG")
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    path = folder / "slip.tar"
    row = json.dumps({"question": "?", "answer": "x"}).encode()
    with tarfile.open(path, "w") as archive:
        for name in ("../../out", f"{tmp_path}/there"):
            for ending, content in (("json", row), ("png", buffer.getvalue())):
                member = tarfile.TarInfo(f"{name}.{ending}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/hostname"
        archive.addfile(link)
    found = read_rows(path)
    assert len(found.examples) == 2  # the link is none
    for example in found.examples:
        (image,) = example.images
        assert image.path is None and image.part is not None and image.part.path == path
        assert open_image(image).size == (4, 4)
    assert [each.name for each in tmp_path.rglob("*") if each.is_file()] == ["slip.tar"]


@pytest.mark.parametrize(
    "header",
    [
        b"\xff" * 8 + b"{}",  # a header of 18 exabytes
        struct.pack("<Q", 2) + b"[]",
        *(
            struct.pack("<Q", len(text)) + text
            for text in (
                b'{"weight":{"dtype":"F32","shape":[2,3],"data_offsets":[0,9999999999]}}',
                b'{"weight":{"dtype":"F32","shape":[4294967296,4294967296],"data_offsets":[0,24]}}',
                b'{"weight":{"dtype":"F32","shape":[2,3],"data_offsets":[24,0]}}',
                b'{"weight":' * 2000,
            )
        ),
    ],
)
def test_weights_that_say_what_they_are_not(header: bytes, tmp_path: Path) -> None:
    model = nn.Linear(3, 2)
    optimiser = torch.optim.AdamW(model.parameters())
    save_state(tmp_path / "state", model, optimiser, RunState(step=1), {"0.cpu": torch.get_rng_state()})
    (tmp_path / "state" / "weights.safetensors").write_bytes(header + bytes(24))
    with pytest.raises(UserError, match="the state is damaged"):
        load_state(tmp_path / "state", model, optimiser)


def test_parquet_that_says_what_it_is_not(folder: Path) -> None:
    import pandas

    path = folder / "rows.parquet"
    pandas.DataFrame([VQA] * 3).to_parquet(path)
    content = path.read_bytes()
    footer = struct.unpack("<I", content[-8:-4])[0]
    for hostile in (
        content[:-8] + struct.pack("<I", 2**31 - 1) + b"PAR1",  # a footer of 2 GiB
        content[: -8 - footer] + b"\xff" * footer + content[-8:],
        b"PAR1" + b"\x00" * 64 + struct.pack("<I", 64) + b"PAR1",
    ):
        path.write_bytes(hostile)
        with pytest.raises(UserError, match="cannot be read as Parquet"):
            read_rows(path)


def test_parquet_that_unpacks_to_far_more_than_it_is(tmp_path: Path) -> None:
    """Text that Zstandard makes a thousandth of, in pages of its own and as one value of a dictionary for all rows."""
    text = "?" * (9 * 2**20)
    for number, (values, dictionary) in enumerate((([f"{n}{text}" for n in range(8)], False), ([8 * text] * 9, True))):
        path = tmp_path / f"{number}.parquet"
        table = pa.table({"image": ["a.png"] * len(values), "question": values, "answer": ["red"] * len(values)})
        parquet.write_table(table, path, compression="zstd", use_dictionary=dictionary)
        with pytest.raises(UserError, match=r"column question unpacks from \d+ bytes to 72 MiB in one row"):
            read_rows(path)


def test_fewer_rows_of_large_values_are_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = [f"{n} " + "?" * 2**20 for n in range(40)]
    path = tmp_path / "rows.parquet"
    table = pa.table({"image": ["a.png"] * 40, "question": values, "answer": ["red"] * 40})
    parquet.write_table(table, path, compression="none", use_dictionary=False)
    sizes = []
    original = columnar.typed_rows

    def watched(name: Path, schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Iterator[RawRow]:
        held = list(batches)
        sizes.extend(batch.num_rows for batch in held)
        return original(name, schema, held)

    monkeypatch.setattr(columnar, "typed_rows", watched)
    read = [row.fields["question"] for row in columnar.parquet_rows(path)]
    assert read == values
    assert max(sizes) == 31  # of a MiB and a few bytes each, at most 32 MiB


def laughs(last: str) -> str:
    """Ten lists of ten aliases each to the list before: ten billion values in half a kilobyte."""
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for name, before in zip("bcdefghij", "abcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]")
    return "\n".join([*lines, last])


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (laughs("data: {train: *j}"), "aliases make more than 10,000 values"),
        ("data: &data\n  train: [*data]", "it holds itself"),
        ("data: " + "[" * 5000, "nested too deeply"),
        ("data: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
    ],
)
def test_a_recipe_that_never_ends(text: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(UserError, match=told):
        load_recipe(path)
    assert time.process_time() - began < 5
