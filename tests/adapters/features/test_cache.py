"""The feature cache: each picture encoded once, encoders never confused, mistakes told, and quick to load."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_encoder import IDENTITY, FakeEncoder, expected, files, picture, pictures
from torch import Tensor

from adapters.data.image_ref import ImageRef
from adapters.features import files as feature_files
from adapters.features.cache import FeatureCache, encoder_key, pictures_together
from qformer.errors import UserError


class RedOnly(FakeEncoder):
    """A million times the red channel: beyond float16 for all but black."""

    def __call__(self, pixels: Tensor) -> Tensor:
        return 1e6 * pixels[:, 0].mean(dim=(1, 2))[:, None, None].expand(-1, 3, 5)


# -- encoded once ------------------------------------------------------------------------------------------------


def test_each_picture_is_encoded_once(tmp_path: Path) -> None:
    encoder = FakeEncoder()
    cache = FeatureCache(encoder, tmp_path)
    refs = pictures(1, 2, 3, 1, 2)
    assert cache.fill(refs, batch_size=2) == 3
    assert encoder.batches == [1, 1, 1]
    assert cache.fill(refs) == 0
    for _ in range(3):  # epochs
        assert torch.equal(cache.load(refs), expected(refs))
    assert encoder.pictures == 3
    later = FakeEncoder()  # another run
    assert torch.equal(FeatureCache(later, tmp_path).load(refs[::-1]), expected(refs[::-1]))
    assert later.pictures == 0


class Convolving(FakeEncoder):
    """A small network with a convolution and a product over all channels, whose sums round otherwise by shape."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.Sequential(
            torch.nn.Conv2d(3, 67, 3), torch.nn.GELU(), torch.nn.Flatten(), torch.nn.Linear(67 * 4, 301)
        )

    def __call__(self, pixels: Tensor) -> Tensor:
        self.batches.append(len(pixels))
        return 1e7 * self.layers(pixels)[:, None]  # beyond float16, so that no bit is lost


def test_features_do_not_depend_on_what_was_encoded_with_them(tmp_path: Path) -> None:
    refs = pictures(*range(11))
    encoder = Convolving()

    def fresh(name: str) -> FeatureCache:
        return FeatureCache(encoder, tmp_path / name)

    alone = torch.cat([fresh(f"alone{place}").load([ref]) for place, ref in enumerate(refs)])
    assert alone.dtype == torch.float32
    assert torch.equal(fresh("all").load(refs), alone)
    assert torch.equal(fresh("order").load(refs[::-1]), alone.flip(0))
    some = fresh("some")
    some.fill(refs[3:6], batch_size=2)
    some.fill(refs, batch_size=5)
    assert torch.equal(some.load(refs), alone)
    assert set(encoder.batches) == {1}


def test_parts_of_a_fixed_size_are_filled_up(tmp_path: Path) -> None:
    encoder, refs = FakeEncoder(), pictures(*range(7))
    cache = FeatureCache(encoder, tmp_path, together=4)
    assert cache.fill(refs) == 7
    assert encoder.batches == [4, 4]
    assert torch.equal(cache.load(refs), expected(refs))
    assert pictures_together("cpu") == 1 and pictures_together("cuda:1") == 16


def test_load_fills_what_is_missing(tmp_path: Path) -> None:
    encoder = FakeEncoder()
    cache = FeatureCache(encoder, tmp_path)
    assert cache.load(pictures(1, 2)).shape == (2, 3, 5)
    assert torch.equal(cache.load(pictures(3, 1, 3, 2)), expected(pictures(3, 1, 3, 2)))
    assert encoder.pictures == 3
    with pytest.raises(ValueError, match="no pictures"):
        cache.load([])


def test_the_same_bytes_under_two_names_are_one_picture(tmp_path: Path) -> None:
    data = picture(9).data
    assert data is not None
    (tmp_path / "one.png").write_bytes(data)
    (tmp_path / "two.png").write_bytes(data)
    encoder = FakeEncoder()
    refs = [ImageRef(name, path=tmp_path / name) for name in ("one.png", "two.png")]
    FeatureCache(encoder, tmp_path).load([*refs, ImageRef("inline", data=data)])
    assert encoder.pictures == 1


def test_a_file_is_hashed_once_however_often_it_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = picture(9).data
    assert data is not None
    (tmp_path / "a.png").write_bytes(data)
    ref = ImageRef("a.png", path=tmp_path / "a.png")
    cache = FeatureCache(FakeEncoder(), tmp_path)
    cache.fill([ref])
    (tmp_path / "a.png").unlink()  # no more needed: neither to hash nor to decode
    for _ in range(3):
        assert cache.load([ref]).shape == (1, 3, 5)


def test_progress_counts_the_missing(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    cache = FeatureCache(FakeEncoder(), tmp_path)
    cache.fill(pictures(1))
    cache.fill(pictures(1, 2, 3, 4), batch_size=2, on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(0, 3), (2, 3), (3, 3)]


def test_features_are_half_precision_where_that_holds_them(tmp_path: Path) -> None:
    refs = pictures(0, 255)
    small = FeatureCache(FakeEncoder(), tmp_path).load(refs)
    assert small.dtype == torch.float16
    large = FeatureCache(FakeEncoder(scale=1e6, dtype="large"), tmp_path).load(refs)
    assert large.dtype == torch.float32 and large.max() == 1e6
    mixed = FeatureCache(RedOnly(dtype="mixed"), tmp_path).load(refs)
    assert mixed.dtype == torch.float32 and mixed[:, 0, 0].tolist() == [0.0, 1e6]
    stored = sorted(
        np.load(path).dtype.name
        for path in files(tmp_path)
        if path.parts[-3] == encoder_key(IDENTITY | {"dtype": "mixed"})
    )
    assert stored == ["float16", "float32"]
    with pytest.raises(UserError, match=r"data\.jsonl row 0 .*not finite.*float32"):
        FeatureCache(FakeEncoder(scale=float("nan"), dtype="nan"), tmp_path).load(refs)
    assert len(files(tmp_path)) == 6


@pytest.mark.parametrize(
    "change",
    [
        {"fingerprint": "sha256:1"},
        {"architecture": "other"},
        {"layer": -1},
        {"class_token": False},
        {"transform": {"size": 8, "mean": [0.5, 0.5, 0.5]}},
        {"transform": {"size": 4, "mean": [0.5, 0.5, 0.4]}},
        {"dtype": "bfloat16"},
        {"something_new": 1},
    ],
)
def test_another_encoder_is_never_confused(change: dict[str, object], tmp_path: Path) -> None:
    first, second = FakeEncoder(), FakeEncoder(scale=2.0, **change)
    FeatureCache(first, tmp_path).fill(pictures(10))
    assert torch.equal(FeatureCache(second, tmp_path).load(pictures(10)), 2 * expected(pictures(10)))
    assert second.pictures == 1


def test_the_key_depends_on_content_not_order_and_is_written_in_clear(tmp_path: Path) -> None:
    assert encoder_key({"a": 1, "b": [1, 2]}) == encoder_key({"b": [1, 2], "a": 1})
    assert encoder_key({"a": 1, "b": [1, 2]}) != encoder_key({"a": 1, "b": [2, 1]})
    cache = FeatureCache(FakeEncoder(), tmp_path)
    cache.fill(pictures(1))
    assert json.loads((cache.folder / "identity.json").read_text()) == IDENTITY
    assert cache.folder == tmp_path / "features" / encoder_key(IDENTITY)


def test_the_usual_root_is_the_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUERYBRIDGE_CACHE", str(tmp_path))
    FeatureCache(FakeEncoder()).fill(pictures(1))
    assert len(files(tmp_path)) == 1


def test_files_are_plain_npy_named_by_digest(tmp_path: Path) -> None:
    ref = picture(4)
    FeatureCache(FakeEncoder(), tmp_path).fill([ref])
    (path,) = files(tmp_path)
    assert (path.parent.name, path.name) == (ref.digest()[:2], f"{ref.digest()}.npy")
    assert np.array_equal(np.load(path, mmap_mode="r"), expected([ref])[0].numpy())


# -- mistakes and a full disk ------------------------------------------------------------------------------------


def test_an_unreadable_picture_names_its_row_and_keeps_the_others(tmp_path: Path) -> None:
    bad = ImageRef("bad.png", data=b"not a picture", where="data.jsonl row 9 (line 9)")
    encoder = FakeEncoder()
    cache = FeatureCache(encoder, tmp_path)
    with pytest.raises(UserError, match=r"^data\.jsonl row 9 \(line 9\): image 'bad\.png' is not a picture"):
        cache.fill([*pictures(1, 2), bad, *pictures(3)], batch_size=2)
    assert len(files(tmp_path)) == 2
    assert not any("decode" in thread.name for thread in threading.enumerate())


def test_a_picture_that_changes_underway_is_not_stored_under_its_old_name(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(picture(1).data or b"")
    ref = ImageRef("a.png", path=path)
    ref.digest()
    path.write_bytes(picture(2).data or b"")
    with pytest.raises(UserError, match="has changed"):
        FeatureCache(FakeEncoder(), tmp_path).fill([ref])
    assert files(tmp_path) == []


def test_no_space_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = FeatureCache(FakeEncoder(), tmp_path)
    size = feature_files.size_on_disk(np.zeros((3, 5), np.float16))

    # The disk says beforehand that it is too small …
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(100, 100, 3 * size - 1))
        with pytest.raises(UserError) as caught:
            cache.fill(pictures(1, 2, 3))
    for word in (str(cache.folder), f"{3 * size:,} bytes", "QUERYBRIDGE_CACHE"):
        assert word in str(caught.value)
    assert files(tmp_path) == []

    # … or fills up underway.
    real = os.replace

    def full(source: Path, target: Path) -> None:
        if len(files(tmp_path)) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match=r"no space left.*QUERYBRIDGE_CACHE"):
        cache.fill(pictures(1, 2, 3, 4), batch_size=2)
    assert len(files(tmp_path)) == 2
    assert list((tmp_path / "features").rglob("*.partial")) == []
    monkeypatch.undo()
    assert cache.fill(pictures(1, 2, 3, 4)) == 2


def test_a_root_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "features").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot use .*QUERYBRIDGE_CACHE"):
        FeatureCache(FakeEncoder(), tmp_path).load(pictures(1))


# -- speed -------------------------------------------------------------------------------------------------------


def test_a_batch_is_loaded_quickly(tmp_path: Path) -> None:
    class Wide(FakeEncoder):
        def __call__(self, pixels: Tensor) -> Tensor:
            return torch.rand(len(pixels), 81, 1280)

    cache = FeatureCache(Wide(), tmp_path)
    refs = pictures(*range(64))
    cache.fill(refs)
    np.zeros(64 * 81 * 1280, dtype=np.float16).tofile(tmp_path / "plain")
    ours, plain = [], []
    for _ in range(7):  # in turn: a busy machine slows both
        begin = time.perf_counter()
        features = cache.load(refs)
        ours.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        np.fromfile(tmp_path / "plain", dtype=np.float16)
        plain.append(time.perf_counter() - begin)
    assert features.shape == (64, 81, 1280) and features.dtype == torch.float16
    print(f"64 x 81 x 1280 float16: {min(ours) * 1e3:.1f} ms, a file of that size {min(plain) * 1e3:.1f} ms")
    assert min(ours) < 12 * min(plain)


def test_the_bound_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUERYBRIDGE_FEATURES_GIB", "0.5")
    assert FeatureCache(FakeEncoder(), tmp_path).max_bytes == 2**29
    for wrong in ("lots", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("QUERYBRIDGE_FEATURES_GIB", wrong)
        with pytest.raises(UserError, match=f"QUERYBRIDGE_FEATURES_GIB={wrong}: give a number"):
            FeatureCache(FakeEncoder(), tmp_path)
