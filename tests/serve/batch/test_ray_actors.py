"""Batch jobs on a Ray cluster of two actors on this machine, one of which is killed in the middle."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from data_rows import write_jsonl
from PIL import Image
from stub_predictor import StubPredictor, make_stub

from qformer.errors import UserError
from serve.batch.asking import Asking
from serve.batch.ordered_lines import BatchReport
from serve.batch.ray_actors import RayActors
from serve.batch.run import run_batch

ray = pytest.importorskip("ray")
ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def died(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file that an actor leaves when it dies."""
    return tmp_path_factory.mktemp("ray") / "died"


@pytest.fixture(scope="module")
def actors(died: Path) -> Iterator[RayActors]:
    """Two actors on a cluster of this machine, which the whole module shares: to start one is what takes time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
        patch.setenv("STUB_DIES_AT", f"what 100?|{died}")
        patch.setenv("RAY_USAGE_STATS_ENABLED", "1")
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        with RayActors(make_stub, 2) as found:
            assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"
            yield found
        assert not ray.is_initialized()


def test_an_actor_that_is_killed_changes_nothing(actors: RayActors, died: Path, tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "0.png")
    source = write_jsonl(tmp_path / "rows.jsonl", [{"image": "0.png", "question": f"what {n}?"} for n in range(1, 201)])
    out, limited = tmp_path / "out.parquet", tmp_path / "limited.parquet"
    before = ray.get([actor.process.remote() for actor in actors.actors])
    assert run_batch(source, out, actors, chunk=16, limit=150) == BatchReport(150, 0, 0)
    assert died.exists()
    after = ray.get([actor.process.remote() for actor in actors.actors])
    assert len(set(before) | set(after)) == 3  # one process was started anew
    assert run_batch(source, out, actors, chunk=16) == BatchReport(50, 150, 0)
    # 150 is no multiple of 16: the rows beside the limit are planned with others, as in any job with a limit
    run_batch(source, limited, StubPredictor(), chunk=16, limit=150)
    run_batch(source, limited, StubPredictor(), chunk=16)
    assert out.read_bytes() == limited.read_bytes()


def test_a_mistake_that_an_actor_finds_is_told_as_here(actors: RayActors) -> None:
    with pytest.raises(UserError, match="--task caption: the stub writes none"):
        actors.facts(Asking("caption"))
