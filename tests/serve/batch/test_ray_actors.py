"""Batch jobs on a Ray cluster of two actors on this machine, one of which is killed in the middle."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from data_rows import write_jsonl
from PIL import Image
from stub_predictor import StubPredictor, make_stub

from qformer.errors import UserError
from serve.batch.ray_actors import RayActors
from serve.batch.run import run_batch
from serve.batch.writing import BatchReport

ray = pytest.importorskip("ray")
ROOT = Path(__file__).resolve().parents[3]


def refuse(number: int) -> StubPredictor:
    raise UserError("--adapter: there is no such adapter")


def test_an_actor_that_is_killed_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    source = write_jsonl(tmp_path / "rows.jsonl", [{"image": "0.png", "question": f"what {n}?"} for n in range(1, 201)])
    alone, out = tmp_path / "alone.parquet", tmp_path / "out.parquet"
    run_batch(source, alone, StubPredictor(), chunk=16)
    died = tmp_path / "died"
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    monkeypatch.setenv("STUB_DIES_AT", f"what 100?|{died}")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "1")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)

    with RayActors(make_stub, 2) as actors:
        assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
        before = ray.get([actor.process.remote() for actor in actors.actors])
        assert run_batch(source, out, actors, chunk=16, limit=150) == BatchReport(150, 0, 0)
        assert died.exists()
        after = ray.get([actor.process.remote() for actor in actors.actors])
        assert len(set(before) | set(after)) == 3  # one process was started anew
        assert run_batch(source, out, actors, chunk=16) == BatchReport(50, 150, 0)
        with pytest.raises(UserError, match="--adapter: there is no such adapter"):
            actors._get(ray.remote(num_cpus=0)(refuse).remote(0))

    assert not ray.is_initialized()
    # 150 is no multiple of 16: the rows beside the limit are planned with others, as in any job with a limit
    limited = tmp_path / "limited.parquet"
    run_batch(source, limited, StubPredictor(), chunk=16, limit=150)
    run_batch(source, limited, StubPredictor(), chunk=16)
    assert out.read_bytes() == limited.read_bytes()
