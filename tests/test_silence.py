"""From Python nothing is printed unasked: no progress bars and no remarks of the libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import draw_data, save_tiny_bert, tiny_values

from adapters.artefact.artefact import save_artefact
from adapters.artefact.facts import Facts
from adapters.loading.assembly import assemble
from adapters.recipe import parse_recipe

ROOT = Path(__file__).parents[1]
PROGRAM = """
import sys
import querybridge

adapter, picture = sys.argv[1:]
answer = querybridge.load_adapter(adapter).ask(picture, "what colour?")
retriever, key = querybridge.load_retriever(adapter)
vectors = retriever.embed_images([querybridge.picture_ref(picture)])
assert isinstance(answer, str) and vectors.shape[:2] == (1, 3), vectors.shape
"""


@pytest.mark.usefixtures("cache_here")
def test_python_prints_nothing_of_its_own(
    vision_folder: Path, language_folders: dict[str, Path], tmp_path: Path
) -> None:
    """The LLM's source is spelled otherwise than the folder that is loaded, as it is if it comes from an index."""
    (tmp_path / "llm").symlink_to(language_folders["llama"])
    values: Any = tiny_values(vision_folder, tmp_path / "llm", draw_data(tmp_path / "data"))
    values["language"]["quantize"] = "nf4"
    values["bridge"] |= {"text_branch": True, "start": str(save_tiny_bert(tmp_path / "bert"))}
    made = assemble(parse_recipe(values, "test"), dtype="float32")
    save_artefact(tmp_path / "adapter", made, Facts(made.fingerprints))
    silenced = ("TRANSFORMERS_", "HF_HUB_", "PYTHONWARNINGS")  # as a user has it who set none of these
    plain = {name: value for name, value in os.environ.items() if not name.startswith(silenced)}
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "adapter"), str(tmp_path / "data" / "red0.png")],
        cwd=ROOT, env=plain, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
