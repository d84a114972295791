"""What is remembered of pictures between runs: nothing is hashed twice, and nothing that changed is taken for known."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from adapters.data import image_ref as image_refs
from adapters.data.image_ref import ImageRef
from adapters.data.known_pictures import KnownPictures


def digest_of(known: KnownPictures, file: Path) -> str:
    """As `ImageRef` asks: the remembered digest, else the file is read."""
    if (found := known.digest(file)) is not None:
        return found
    with file.open("rb") as opened:
        return known.read(file, opened)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "a.png"
    path.write_bytes(b"one")
    return path


def test_a_later_run_hashes_nothing(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = KnownPictures(tmp_path / "cache" / "known", settled_ns=0)
    assert digest_of(first, file) == hashlib.sha256(b"one").hexdigest()
    first.flush()
    later = KnownPictures(tmp_path / "cache" / "known", settled_ns=0)

    def fail(*_: object) -> None:
        raise AssertionError("hashed again")

    monkeypatch.setattr(hashlib, "file_digest", fail)
    assert digest_of(first, file) == digest_of(later, file) == hashlib.sha256(b"one").hexdigest()


def test_pictures_of_training_go_through_it(tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = KnownPictures(tmp_path / "known", settled_ns=0)
    monkeypatch.setattr(image_refs, "known_pictures", lambda: known)
    assert ImageRef("a", path=file).digest() == hashlib.sha256(b"one").hexdigest()
    assert known.digest(file) == hashlib.sha256(b"one").hexdigest()
    assert ImageRef("a", data=b"one").digest() == hashlib.sha256(b"one").hexdigest()  # bytes have no place to know


def test_a_file_that_changed_is_read_again_though_size_and_time_are_the_same(tmp_path: Path, file: Path) -> None:
    known = KnownPictures(tmp_path / "known", settled_ns=0)
    digest_of(known, file)
    status = file.stat()
    file.write_bytes(b"two")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert digest_of(known, file) == hashlib.sha256(b"two").hexdigest()
    other = tmp_path / "b.png"
    other.write_bytes(b"six")
    os.utime(other, ns=(status.st_atime_ns, status.st_mtime_ns))
    os.replace(other, file)
    assert digest_of(known, file) == hashlib.sha256(b"six").hexdigest()


def test_a_file_written_just_now_is_not_remembered(tmp_path: Path, file: Path) -> None:
    known = KnownPictures(tmp_path / "known")
    digest_of(known, file)
    assert known.digest(file) is None


def test_what_is_no_file_is_not_known(tmp_path: Path) -> None:
    known = KnownPictures(tmp_path / "known", settled_ns=0)
    assert known.digest(tmp_path) is None
    assert known.digest(tmp_path / "absent.png") is None
    assert known.digest(Path("a\0b")) is None


def test_a_damaged_memory_is_begun_anew(tmp_path: Path, file: Path) -> None:
    place = tmp_path / "known"
    place.write_bytes(b"not a database" * 100)
    assert digest_of(KnownPictures(place, settled_ns=0), file) == hashlib.sha256(b"one").hexdigest()
    again = KnownPictures(place, settled_ns=0)
    digest_of(again, file)
    again.flush()
    assert KnownPictures(place).digest(file) == hashlib.sha256(b"one").hexdigest()


def test_without_room_it_does_without(tmp_path: Path, file: Path) -> None:
    (tmp_path / "cache").write_bytes(b"a file where the folder should be")
    known = KnownPictures(tmp_path / "cache" / "known", settled_ns=0)
    digest_of(known, file)
    known.flush()
    assert digest_of(known, file) == hashlib.sha256(b"one").hexdigest()


def test_looks_are_kept_by_digest(tmp_path: Path) -> None:
    known = KnownPictures(tmp_path / "known")
    known.remember_look("ab:1", b"look")
    assert known.look("ab:1") == b"look" and known.look("ab:2") is None
    known.flush()
    assert KnownPictures(tmp_path / "known").look("ab:1") == b"look"


def test_a_cleared_memory_is_made_again(tmp_path: Path, file: Path) -> None:
    known = KnownPictures(tmp_path / "known", settled_ns=0)
    digest_of(known, file)
    known.flush()
    (tmp_path / "known").unlink()
    known.remember_look("ab:1", b"look")
    known.flush()
    assert KnownPictures(tmp_path / "known").look("ab:1") == b"look"


def test_many_are_known_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [tmp_path / f"{number}.png" for number in range(1100)]  # more than one query may ask for
    for number, path in enumerate(files):
        path.write_bytes(str(number).encode())
    known = KnownPictures(tmp_path / "known", settled_ns=0)
    for path in files[:-1]:
        digest_of(known, path)
    known.flush()
    files[7].write_bytes(b"another")
    files[8].unlink()
    files[9].unlink()
    files[9].mkdir()
    whole = known.digests(files)
    assert set(whole) == {*files[:7], *files[10:-1]}
    assert whole[files[1000]] == hashlib.sha256(b"1000").hexdigest()
    assert KnownPictures(tmp_path / "nothing").digests(files) == {}

    monkeypatch.setattr(image_refs, "known_pictures", lambda: known)
    refs = [*(ImageRef(path.name, path=path) for path in files), ImageRef("b", data=b"bytes")]
    image_refs.recall_digests(refs)
    monkeypatch.setattr(known, "digest", lambda file: pytest.fail("asked alone"))
    assert refs[1000].digest() == whole[files[1000]]
    assert refs[-1].digest() == hashlib.sha256(b"bytes").hexdigest()
