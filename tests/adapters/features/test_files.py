"""The files of the feature cache: whole under damage, interruption and company, and bounded as a whole."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from fake_encoder import IDENTITY, FakeEncoder, expected, files, picture, pictures

from adapters.features import files as feature_files
from adapters.features.cache import FeatureCache
from adapters.features.files import clear_features, features_info
from qformer.errors import UserError

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
from fake_encoder import FakeEncoder, pictures
from adapters.features.cache import FeatureCache
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
    script = WORKER.format(paths=[str(here.parents[2]), str(here.parents[3])], pause=pause, root=str(root))
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
    errors = [process.communicate(timeout=120)[1] for process in processes]
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
    results = [process.communicate(timeout=120) for process in processes]
    for process, (_, error) in zip(processes, results, strict=True):
        assert process.returncode == 0, error
    assert assert_all_whole(tmp_path) == 40
    encoder = FakeEncoder()
    refs = pictures(*range(40))
    assert torch.equal(FeatureCache(encoder, tmp_path).load(refs), expected(refs))
    assert encoder.pictures == 0
