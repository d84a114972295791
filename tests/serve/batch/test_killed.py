"""Batch jobs that are killed at any moment, or find the disk full: gone on with, they end with the same bytes."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from data_rows import write_jsonl
from PIL import Image
from stub_predictor import StubPredictor, make_stub

from qformer.errors import UserError
from serve.batch.asking import Facts
from serve.batch.ordered_lines import BatchReport
from serve.batch.run import run_batch
from serve.batch.workers import Workers, agreed

ROOT = Path(__file__).resolve().parents[3]
JOB = [sys.executable, str(ROOT / "tests" / "stub_predictor.py")]


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else a worker loads torch to set its threads


@pytest.fixture
def many(tmp_path: Path) -> Path:
    """400 questions about five pictures, every 57th bad."""
    for number in range(5):
        Image.new("RGB", (4, 4), (50 * number, 0, 0)).save(tmp_path / f"{number}.png")
    rows = [
        {"image": f"{n % 5}.png", "question": f"{'bad' if n % 57 == 0 else 'what'} {n}?", "part": f"p{n}"}
        for n in range(1, 401)
    ]
    return write_jsonl(tmp_path / "rows.jsonl", rows)


def started(source: Path, out: Path, workers: int, seconds: float = 0.0) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "STUB_SECONDS": str(seconds)}
    return subprocess.Popen(
        [*JOB, str(source), str(out), str(workers)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_a_job_that_is_killed_ends_with_the_same_bytes(many: Path, tmp_path: Path, ending: str) -> None:
    whole, cut = tmp_path / f"whole.{ending}", tmp_path / f"cut.{ending}"
    report = run_batch(many, whole, StubPredictor(), chunk=16, write_every=0, skip_bad_rows=True)
    assert report == BatchReport(393, 0, 7)
    lines = cut if ending == "jsonl" else cut.with_name(cut.name + ".rows.jsonl")
    draw = random.Random(ending)
    for kill in range(2):
        before = lines.stat().st_size if lines.exists() else 0
        job = started(many, cut, 1, seconds=0.002)
        until = time.monotonic() + 30
        while job.poll() is None and time.monotonic() < until:
            if lines.exists() and lines.stat().st_size > before + draw.randrange(1, 9000):
                break
            time.sleep(0.002)
        job.send_signal(signal.SIGKILL)
        job.communicate()
        assert job.returncode == -signal.SIGKILL, f"kill {kill} came too late"
        if kill:  # as if the kill had come within a line
            os.truncate(lines, lines.stat().st_size - draw.randrange(1, 60))
    report = run_batch(many, cut, StubPredictor(), chunk=16, write_every=0, skip_bad_rows=True)
    assert report.already > 0 and report.answered > 0
    assert cut.read_bytes() == whole.read_bytes()


def test_every_cut_within_a_file_is_gone_on_from(many: Path, tmp_path: Path) -> None:
    """A kill leaves some first bytes of the file: any number of them will do."""
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    run_batch(many, whole, StubPredictor(), chunk=16, write_every=0, skip_bad_rows=True)
    content = whole.read_bytes()
    draw = random.Random(0)
    for _ in range(30):
        cut.write_bytes(content[: draw.randrange(len(content))])
        cut.with_name("cut.jsonl.job.json").write_bytes(whole.with_name("whole.jsonl.job.json").read_bytes())
        run_batch(many, cut, StubPredictor(), chunk=16, skip_bad_rows=True)
        assert cut.read_bytes() == content


def test_two_processes_write_the_bytes_of_one(many: Path, tmp_path: Path) -> None:
    alone, two = tmp_path / "alone.jsonl", tmp_path / "two.jsonl"
    run_batch(many, alone, StubPredictor(), chunk=16, skip_bad_rows=True)
    with Workers(make_stub, 2) as workers:
        assert run_batch(many, two, workers, chunk=16, skip_bad_rows=True) == BatchReport(393, 0, 7)
    assert two.read_bytes() == alone.read_bytes()


def test_pictures_inside_a_parquet_file_reach_the_workers(many: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in many.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        row["image"] = {"bytes": (tmp_path / row["image"]).read_bytes(), "path": row["image"]}
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    alone, two = tmp_path / "alone.parquet", tmp_path / "two.parquet"
    run_batch(tmp_path / "rows.parquet", alone, StubPredictor(), chunk=16, skip_bad_rows=True)
    with Workers(make_stub, 2) as workers:
        run_batch(tmp_path / "rows.parquet", two, workers, chunk=16, skip_bad_rows=True)
    assert two.read_bytes() == alone.read_bytes()
    assert pyarrow.parquet.read_table(two)["part"].to_pylist() == [row["part"] for row in rows]


def test_a_worker_that_dies_is_told_and_the_job_goes_on(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone, two = tmp_path / "alone.jsonl", tmp_path / "two.jsonl"
    run_batch(many, alone, StubPredictor(), chunk=16, skip_bad_rows=True)
    monkeypatch.setenv("STUB_DIES_AT", f"what 200?|{tmp_path / 'died'}")
    with Workers(make_stub, 2) as workers, pytest.raises(UserError, match=r"worker \d was killed by signal 9"):
        run_batch(many, two, workers, chunk=16, skip_bad_rows=True)
    assert alone.read_bytes().startswith(two.read_bytes())
    with Workers(make_stub, 2) as workers:
        run_batch(many, two, workers, chunk=16, skip_bad_rows=True)
    assert two.read_bytes() == alone.read_bytes()


def test_workers_that_would_answer_differently_are_refused() -> None:
    one = Facts("a", "sha256:0", {}, "float32")
    assert agreed([one, one]) == one
    with pytest.raises(UserError, match=r"--workers: their dtype differs \(float32, bfloat16\); give all one adapter"):
        agreed([one, replace(one, dtype="bfloat16")])


def test_workers_end_with_their_parent(many: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    job = started(many, out, 2, seconds=0.01)
    until = time.monotonic() + 30
    while not (out.exists() and out.stat().st_size) and time.monotonic() < until:
        time.sleep(0.02)
    children = Path(f"/proc/{job.pid}/task/{job.pid}/children")
    if not children.exists():
        job.kill()
        pytest.skip("this system does not list a process's children")
    workers = children.read_text().split()
    job.kill()
    job.communicate()
    until = time.monotonic() + 20
    while (alive := [pid for pid in workers if Path(f"/proc/{pid}").exists()]) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(workers) >= 2 and not alive


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_a_full_disk_is_told_and_the_job_goes_on(many: Path, tmp_path: Path, ending: str) -> None:
    whole, out = tmp_path / f"whole.{ending}", tmp_path / f"out.{ending}"
    run_batch(many, whole, StubPredictor(), chunk=16, skip_bad_rows=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (5_003, 20_011):  # bytes that a file may have: within a line
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(UserError, match=r"cannot be written .*; free space or name another file"):
                run_batch(many, out, StubPredictor(), chunk=16, write_every=0, skip_bad_rows=True)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    run_batch(many, out, StubPredictor(), chunk=16, skip_bad_rows=True)
    assert out.read_bytes() == whole.read_bytes()
