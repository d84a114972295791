"""What the documentation names, in one place: `import querybridge`, then `querybridge.load_adapter()`.

A name is loaded when it is first used, so the import itself takes no time and loads no library. docs/python.md shows
each name with an example.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adapters.artefact.artefact import load_vision_side_artefact
    from adapters.artefact.averaging import average_artefacts
    from adapters.artefact.exporting import export_adapter
    from adapters.artefact.importing import import_published
    from adapters.finetune import finetune
    from adapters.inference.retrieval import Retriever
    from adapters.memory.estimate import estimate_memory
    from adapters.pretrain import pretrain
    from adapters.recipe import load_recipe
    from qformer.decoding import Decoding
    from qformer.errors import UserError
    from serve.adapter import LoadedAdapter, load_adapter, picture_ref
    from serve.batch.predictor import VQAPredictor
    from serve.batch.run import run_batch
    from serve.engine.engine import Engine
    from serve.evaluation.run import evaluate
    from serve.looking.attention import look
    from serve.looking.grounding import Grounder, ground, load_grounder
    from serve.push import push
    from serve.retrieval import PictureIndex, classify, load_retriever

    __version__: str

_MODULES = {
    "Decoding": "qformer.decoding",
    "Engine": "serve.engine.engine",
    "Grounder": "serve.looking.grounding",
    "LoadedAdapter": "serve.adapter",
    "PictureIndex": "serve.retrieval",
    "Retriever": "adapters.inference.retrieval",
    "UserError": "qformer.errors",
    "VQAPredictor": "serve.batch.predictor",
    "average_artefacts": "adapters.artefact.averaging",
    "classify": "serve.retrieval",
    "estimate_memory": "adapters.memory.estimate",
    "evaluate": "serve.evaluation.run",
    "export_adapter": "adapters.artefact.exporting",
    "finetune": "adapters.finetune",
    "ground": "serve.looking.grounding",
    "import_published": "adapters.artefact.importing",
    "load_adapter": "serve.adapter",
    "load_grounder": "serve.looking.grounding",
    "load_recipe": "adapters.recipe",
    "load_retriever": "serve.retrieval",
    "load_vision_side_artefact": "adapters.artefact.artefact",
    "look": "serve.looking.attention",
    "picture_ref": "serve.adapter",
    "pretrain": "adapters.pretrain",
    "push": "serve.push",
    "run_batch": "serve.batch.run",
}

__all__ = [
    "Decoding",
    "Engine",
    "Grounder",
    "LoadedAdapter",
    "PictureIndex",
    "Retriever",
    "UserError",
    "VQAPredictor",
    "__version__",
    "average_artefacts",
    "classify",
    "estimate_memory",
    "evaluate",
    "export_adapter",
    "finetune",
    "ground",
    "import_published",
    "load_adapter",
    "load_grounder",
    "load_recipe",
    "load_retriever",
    "load_vision_side_artefact",
    "look",
    "picture_ref",
    "pretrain",
    "push",
    "run_batch",
]


def __getattr__(name: str) -> Any:
    """Load a documented name from the file that defines it."""
    if name == "__version__":
        from importlib.metadata import version

        value: Any = version("querybridge")
    elif name in _MODULES:
        value = getattr(import_module(_MODULES[name]), name)
    else:
        raise AttributeError(f"module 'querybridge' has no attribute '{name}'")
    return value


def __dir__() -> list[str]:
    """Name what can be taken from here, loaded or not."""
    return sorted({*globals(), *__all__})
