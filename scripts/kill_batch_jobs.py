"""Kill a batch job at random moments and go on with it each time: the file must end with the bytes of an unbroken job.

    .venv/bin/python scripts/kill_batch_jobs.py --kills 50 --rows 2000 --workers 1
    .venv/bin/python scripts/kill_batch_jobs.py --kills 50 --rows 2000 --workers 2 --ending parquet

The predictor is the tests' stub, whose answers tell what was asked together. Each time the job starts anew, is killed
once with SIGKILL (its workers live a moment longer), and goes on to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def main() -> None:
    """Read the command line, kill, compare, print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--ending", default="jsonl", choices=("jsonl", "csv", "parquet"))
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    draw = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = write_rows(folder, chosen.rows)
        whole = folder / f"whole.{chosen.ending}"
        begun = time.monotonic()
        start(source, whole, chosen.workers).wait()
        usual = time.monotonic() - begun
        killed = same = 0
        for number in range(chosen.kills):
            out = folder / f"{number}.{chosen.ending}"
            job = start(source, out, chosen.workers)
            try:
                job.wait(draw.uniform(0, usual))
            except subprocess.TimeoutExpired:
                job.send_signal(signal.SIGKILL)
                job.wait()
            killed += job.returncode == -signal.SIGKILL
            start(source, out, chosen.workers).wait()
            same += out.read_bytes() == whole.read_bytes()
            for file in folder.glob(f"{number}.*"):
                if file.suffix != ".png":
                    file.unlink()
        print(f"{killed} of {chosen.kills} jobs of {chosen.rows} rows killed before their end ({usual:.1f} s)")
        print(f"{same} of {chosen.kills} ended with the same bytes")
        sys.exit(same < chosen.kills)


def write_rows(folder: Path, count: int) -> Path:
    """Questions about ten files, every 97th bad."""
    for number in range(10):
        (folder / f"p{number}.png").write_bytes(b"no picture is opened")
    rows = [
        {"image": f"p{n % 10}.png", "question": f"{'what' if n % 97 else 'bad'} {n}?", "part": n}
        for n in range(1, count + 1)
    ]
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return source


def start(source: Path, out: Path, workers: int) -> subprocess.Popen[bytes]:
    """Begin a job, or go on with it."""
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}",
        "OMP_NUM_THREADS": "1",
        "STUB_SECONDS": "0.0005",
    }
    command = [sys.executable, str(ROOT / "tests" / "stub_predictor.py"), str(source), str(out), str(workers)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


if __name__ == "__main__":
    main()
