"""The feature cache: encoded once, whole under interruption and company, bounded, and never confused."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections import namedtuple
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from adapters import feature_files
from adapters.data.images import ImageRef
from adapters.features import FeatureCache, clear_features, encoder_key, features_info
from qformer.errors import UserError

IDENTITY: dict[str, object] = {
    "fingerprint": "sha256:0",
    "architecture": "fake",
    "layer": -2,
    "class_token": True,
    "transform": {"size": 4, "mean": [0.5, 0.5, 0.5]},
    "dtype": "float32",
}


class FakeEncoder:
    """Three tokens of five numbers that are the picture's mean colour, times `scale`; counts its pictures."""

    def __init__(self, scale: float = 1.0, **changes: object) -> None:
        self.scale = scale
        self.changes = changes
        self.pictures = 0
        self.batches: list[int] = []

    def identity(self) -> dict[str, object]:
        return IDENTITY | self.changes

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        arrays = [np.asarray(image.resize((4, 4)), dtype=np.float32) / 255 for image in images]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)  # [B, 3, 4, 4]

    def __call__(self, pixels: Tensor) -> Tensor:
        self.pictures += len(pixels)
        self.batches.append(len(pixels))
        mean = pixels.mean(dim=(2, 3))  # [B, 3]
        return self.scale * mean[:, :, None].expand(-1, -1, 5)  # [B, 3, 5]


class RedOnly(FakeEncoder):
    """A million times the red channel: beyond float16 for all but black."""

    def __call__(self, pixels: Tensor) -> Tensor:
        return 1e6 * pixels[:, 0].mean(dim=(1, 2))[:, None, None].expand(-1, 3, 5)


def picture(number: int) -> ImageRef:
    """A one-coloured picture: red channel `number`."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 255)).save(file, "PNG")
    return ImageRef(f"{number}.png", data=file.getvalue(), where=f"data.jsonl row {number} (line {number})")


def pictures(*numbers: int) -> list[ImageRef]:
    return [picture(number) for number in numbers]


def files(root: Path) -> list[Path]:
    return sorted((root / "features").rglob("*.npy"))


def expected(refs: Sequence[ImageRef]) -> Tensor:
    reds = torch.tensor([float(ref.label.removesuffix(".png")) for ref in refs]) / 255
    colours = torch.stack([reds, torch.zeros(len(refs)), torch.ones(len(refs))], dim=1)  # [B, 3]
    return colours[:, :, None].expand(-1, -1, 5).half()


# -- encoded once ------------------------------------------------------------------------------------------------


def test_each_picture_is_encoded_once(tmp_path: Path) -> None:
    encoder = FakeEncoder()
    cache = FeatureCache(encoder, tmp_path)
    refs = pictures(1, 2, 3, 1, 2)
    assert cache.fill(refs, batch_size=2) == 3
    assert encoder.batches == [2, 1]
    assert cache.fill(refs) == 0
    for _ in range(3):  # epochs
        assert torch.equal(cache.load(refs), expected(refs))
    assert encoder.pictures == 3
    later = FakeEncoder()  # another run
    assert torch.equal(FeatureCache(later, tmp_path).load(refs[::-1]), expected(refs[::-1]))
    assert later.pictures == 0


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


# -- damage ------------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-10] ^= 1
    path.write_bytes(content)


def zero(path: Path) -> None:
    path.write_bytes(bytes(path.stat().st_size))


def replace_by_another(path: Path) -> None:
    np.save(path, np.zeros((3, 5), np.float16))


@pytest.mark.parametrize("damage", [cut, empty, flip, zero, replace_by_another])
def test_damaged_files_are_encoded_again_with_one_warning(damage: object, tmp_path: Path) -> None:
    refs = pictures(1, 2, 3, 4)
    encoder = FakeEncoder()
    cache = FeatureCache(encoder, tmp_path)
    cache.fill(refs)
    for path in files(tmp_path)[:2]:
        damage(path)  # type: ignore[operator]
    with pytest.warns(UserWarning, match=r"^2 damaged feature file") as caught:
        assert torch.equal(cache.load(refs), expected(refs))
    assert len(caught) == 1
    assert encoder.pictures == 6
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.load(refs)


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


# -- the bound ---------------------------------------------------------------------------------------------------

SIZE = feature_files.size_on_disk(np.zeros((3, 5), np.float16))


def used_at(path: Path, seconds_ago: float) -> None:
    status = path.stat()
    os.utime(path, ns=(time.time_ns() - int(seconds_ago * 1e9), status.st_mtime_ns))


def test_the_least_recently_used_go_down_to_ninety_per_cent(tmp_path: Path) -> None:
    old = FeatureCache(FakeEncoder(layer=-3), tmp_path, max_bytes=10 * SIZE)
    refs = pictures(*range(10))
    old.load(refs)  # `load` alone holds nothing for good
    for age, ref in enumerate(refs):
        used_at(old._path(ref.digest()), 10_000 - 100 * age)
    FeatureCache(FakeEncoder(layer=-3), tmp_path).load(refs[:3])  # used again: now the youngest
    new = FeatureCache(FakeEncoder(), tmp_path, max_bytes=10 * SIZE)
    new.load(pictures(100))
    left = {ref.label for ref in refs if old._path(ref.digest()).exists()}
    assert left == {"0.png", "1.png", "2.png", "5.png", "6.png", "7.png", "8.png", "9.png"}
    assert len(files(tmp_path)) == 9
    assert new._path(picture(100).digest()).exists()


def test_what_the_run_needs_is_never_evicted(tmp_path: Path) -> None:
    first_tower, second_tower = FakeEncoder(), FakeEncoder(layer=-1)
    first = FeatureCache(first_tower, tmp_path, max_bytes=20 * SIZE)
    second = FeatureCache(second_tower, tmp_path, max_bytes=20 * SIZE)
    FeatureCache(FakeEncoder(layer=-9), tmp_path).load(pictures(*range(100, 115)))  # of an older run
    train, val = pictures(*range(8)), pictures(8, 9)
    for cache in (first, second):
        cache.fill(train)
        cache.fill(val)
    for _ in range(3):
        for start in (0, 4):
            for cache in (first, second):
                cache.load(train[start : start + 4])
                cache.load(val)
    assert first_tower.pictures == second_tower.pictures == 10
    assert len(files(tmp_path)) <= 20


def test_a_bound_below_the_data_is_one_error_before_the_work(tmp_path: Path) -> None:
    encoder = FakeEncoder()
    cache = FeatureCache(encoder, tmp_path, max_bytes=10 * SIZE)
    with pytest.raises(
        UserError, match=f"take {11 * SIZE:,} bytes.*held to {10 * SIZE:,}: set QUERYBRIDGE_FEATURES_GIB"
    ):
        cache.fill(pictures(*range(11)), batch_size=2)
    assert encoder.pictures == 2
    cache.fill(pictures(*range(10)))  # the failed call holds nothing
    with pytest.raises(UserError, match="held to"):
        cache.fill(pictures(200))
    other = FeatureCache(FakeEncoder(layer=0), tmp_path, max_bytes=10 * SIZE)
    with pytest.raises(UserError, match="held to"):  # both towers' features count
        other.fill(pictures(1))
    del cache
    assert other.fill(pictures(1)) == 1  # a cache that is gone holds nothing


def test_left_over_parts_are_swept_up(tmp_path: Path) -> None:
    cache = FeatureCache(FakeEncoder(), tmp_path)
    cache.fill(pictures(1))
    young, old = cache.folder / "aa.1-x.partial", cache.folder / "bb.1-x.partial"
    young.touch()
    old.touch()
    os.utime(old, (0, 0))
    FeatureCache(FakeEncoder(), tmp_path).fill(pictures(2))
    assert young.exists() and not old.exists()


def test_info_and_clear(tmp_path: Path) -> None:
    assert features_info(tmp_path) == [] and clear_features(tmp_path) == 0
    one, two = FeatureCache(FakeEncoder(), tmp_path), FeatureCache(FakeEncoder(layer=-1), tmp_path)
    one.fill(pictures(1, 2))
    two.fill(pictures(1))
    found = {line.key: line for line in one.info()}
    assert (found[one.key].files, found[one.key].bytes, found[one.key].identity) == (2, 2 * SIZE, IDENTITY)
    assert (found[two.key].files, found[two.key].bytes) == (1, SIZE)
    assert one.clear() > 2 * SIZE
    assert [line.key for line in features_info(tmp_path)] == [two.key]
    assert one.fill(pictures(1)) == 1
    assert clear_features(tmp_path) > 2 * SIZE
    assert features_info(tmp_path) == []


def test_eviction_by_another_process_while_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = FakeEncoder()
    cache = FeatureCache(encoder, tmp_path)
    refs = pictures(1, 2)
    cache.fill(refs)
    real, gone = feature_files.read, []

    def evicted_once(path: Path) -> np.ndarray:
        if not gone:
            gone.append(path)
            path.unlink()
        return real(path)

    monkeypatch.setattr(feature_files, "read", evicted_once)
    assert torch.equal(cache.load(refs), expected(refs))
    assert encoder.pictures == 3

    def always_evicted(path: Path) -> np.ndarray:
        raise FileNotFoundError(path)

    monkeypatch.setattr(feature_files, "read", always_evicted)
    with pytest.raises(UserError, match="features vanish"):
        cache.load(refs)


# -- several processes, Ctrl-C and kill --------------------------------------------------------------------------

WORKER = """
import sys, time
sys.path[:0] = {paths!r}
from pathlib import Path
from test_features import FakeEncoder, FeatureCache, pictures
class Slow(FakeEncoder):
    def __call__(self, pixels):
        time.sleep({pause})
        return super().__call__(pixels)
encoder = Slow()
progress = lambda done, total: print(done, flush=True)
FeatureCache(encoder, Path({root!r})).fill(pictures(*range(40)), batch_size=2, on_progress=progress)
print("encoded", encoder.pictures, flush=True)
"""


def start(root: Path, pause: float) -> subprocess.Popen[str]:
    here = Path(__file__).resolve()
    script = WORKER.format(paths=[str(here.parent), str(here.parents[2])], pause=pause, root=str(root))
    return subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )


def wait_for(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    for seen in process.stdout:
        if seen.strip() == line:
            return
    raise AssertionError(process.communicate()[1])


def assert_all_whole(root: Path) -> int:
    for path in files(root):
        assert feature_files.read(path).shape == (3, 5)
    return len(files(root))


@pytest.mark.skipif(os.name == "nt", reason="signals are POSIX")
def test_ctrl_c_and_kill_leave_whole_files_and_the_next_run_goes_on(tmp_path: Path) -> None:
    interrupted, killed = tmp_path / "interrupted", tmp_path / "killed"
    processes = [start(interrupted, 0.05), start(killed, 0.05)]
    for process, number in zip(processes, (signal.SIGINT, signal.SIGKILL), strict=True):
        wait_for(process, "6")
        process.send_signal(number)
    errors = [process.communicate(timeout=20)[1] for process in processes]
    assert errors[0].rstrip().endswith("KeyboardInterrupt")
    assert processes[0].returncode != 0 and processes[1].returncode == -signal.SIGKILL
    assert list(interrupted.rglob("*.partial")) == []
    for root in (interrupted, killed):
        done = assert_all_whole(root)
        assert 6 <= done < 40
        encoder = FakeEncoder()
        refs = pictures(*range(40))
        assert FeatureCache(encoder, root).fill(refs) == 40 - done
        assert torch.equal(FeatureCache(encoder, root).load(refs), expected(refs))
        assert encoder.pictures == 40 - done


def test_two_processes_at_once(tmp_path: Path) -> None:
    processes = [start(tmp_path, 0.01), start(tmp_path, 0.01)]
    results = [process.communicate(timeout=30) for process in processes]
    for process, (_, error) in zip(processes, results, strict=True):
        assert process.returncode == 0, error
    assert assert_all_whole(tmp_path) == 40
    encoder = FakeEncoder()
    refs = pictures(*range(40))
    assert torch.equal(FeatureCache(encoder, tmp_path).load(refs), expected(refs))
    assert encoder.pictures == 0


# -- speed -------------------------------------------------------------------------------------------------------


def test_a_batch_is_loaded_quickly(tmp_path: Path) -> None:
    class Wide(FakeEncoder):
        def __call__(self, pixels: Tensor) -> Tensor:
            return torch.rand(len(pixels), 81, 1280)

    cache = FeatureCache(Wide(), tmp_path)
    refs = pictures(*range(64))
    cache.fill(refs)
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        features = cache.load(refs)
        times.append(time.perf_counter() - begin)
    assert features.shape == (64, 81, 1280) and features.dtype == torch.float16
    print(f"64 x 81 x 1280 float16: {min(times) * 1e3:.1f} ms")
    assert min(times) < 0.030


def test_the_bound_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QUERYBRIDGE_FEATURES_GIB", "0.5")
    assert FeatureCache(FakeEncoder(), tmp_path).max_bytes == 2**29
    for wrong in ("lots", "0", "-1", "nan", "inf"):
        monkeypatch.setenv("QUERYBRIDGE_FEATURES_GIB", wrong)
        with pytest.raises(UserError, match=f"QUERYBRIDGE_FEATURES_GIB={wrong}: give a number"):
            FeatureCache(FakeEncoder(), tmp_path)
