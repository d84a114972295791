"""One writer at a time: another process's lock is seen, and ends with it, however it ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from qformer.file_lock import lock

HOLD = """
import sys
from qformer.file_lock import lock
file = open(sys.argv[1], "a")
print(lock(file), flush=True)
sys.stdin.read()
"""


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "True\n"
        with path.open("a") as file:
            assert not lock(file)
        other.kill()  # as kill -9 does
        other.wait()
        with path.open("a") as file:
            assert lock(file)


def test_a_lock_is_of_one_open_file_and_ends_when_it_is_closed(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    with path.open("a") as first:
        assert lock(first)
        with path.open("a") as second:
            assert not lock(second)
        assert path.read_text() == ""  # others may read
    with path.open("a") as third:
        assert lock(third)
