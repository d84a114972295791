"""The engine behind the command, the page and batch jobs: load an adapter once, answer about pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

from PIL import Image

from adapters.answering import answer_examples
from adapters.artefact import Facts, adapter_fingerprint, find_artefact, load_artefact, shipped_adapters
from adapters.assembly import Assembly
from adapters.data.examples import Example
from adapters.data.images import ImageRef, image_ref, open_image
from adapters.sight import default_device
from qformer.decoding import Decoding
from qformer.errors import UserError

Picture = str | Path | bytes | Image.Image | ImageRef
"""What may be given as a picture: a path, the bytes of a file, a Pillow image, or an ImageRef."""

DEFAULT_ADAPTER = "photo"


class Engine:
    """A loaded adapter that answers questions about pictures.

    Args:
        assembly: the loaded model.
        facts: what is known about the adapter.
        name: what it is called.
    """

    def __init__(self, assembly: Assembly, facts: Facts, name: str) -> None:
        self.assembly = assembly
        self.facts = facts
        self.name = name

    def fingerprint(self) -> str:
        """`sha256:…` of the adapter: another one means that the same question may get another answer."""
        return adapter_fingerprint(self.assembly)

    def ask(
        self,
        pictures: Picture | Sequence[Picture],
        question: str,
        *,
        decoding: Decoding | None = None,
    ) -> str:
        """Answer one question about one picture, or about several at once.

        Args:
            pictures: one, or a list; `<image>` marks in the question say where each belongs, else they come first.
            question: in words.
            decoding: how tokens are chosen; greedy where left out.

        Raises:
            UserError: a picture cannot be read, or the question is empty.
        """
        chosen = [pictures] if isinstance(pictures, Picture) else list(pictures)
        if not question.strip():
            raise UserError("QUESTION: it is empty; ask something about the picture")
        example = Example(tuple(picture_ref(picture) for picture in chosen), question, (), where="", id="1")
        return self.answer([example], "vqa", decoding=decoding)[0]

    def caption(self, picture: Picture, *, language: str = "en", decoding: Decoding | None = None) -> str:
        """Describe a picture in English ("en") or Chinese ("zh").

        Raises:
            UserError: the picture cannot be read, or the language is not known.
        """
        example = Example((picture_ref(picture),), "", (), where="", id="1", language=language)
        return self.answer([example], "caption", decoding=decoding or Decoding.preset("caption"))[0]

    def answer(
        self,
        examples: Sequence[Example],
        task: str = "vqa",
        *,
        decoding: Decoding | None = None,
        batch_size: int = 16,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Answer many examples, in batches; an answer does not depend on its batch."""
        return answer_examples(
            self.assembly,
            examples,
            task,
            decoding=decoding or Decoding(),
            batch_size=batch_size,
            on_progress=on_progress,
        )


def picture_ref(picture: Picture) -> ImageRef:
    """What was given as a picture, as the reference that the rest of the code takes.

    Raises:
        UserError: it is nothing that could be one, or a Pillow image that cannot be decoded.
    """
    if isinstance(picture, ImageRef):
        return picture
    if isinstance(picture, str):
        return image_ref(picture)
    if isinstance(picture, Path):
        return ImageRef(str(picture), path=picture)
    if isinstance(picture, bytes):
        return ImageRef("picture", data=picture)
    if not isinstance(picture, Image.Image):
        raise UserError(f"a picture is {type(picture).__name__}; give a path, a file's bytes or a Pillow image")
    buffer = io.BytesIO()
    open_image(picture).save(buffer, format="PNG")  # its bytes are its key in the cache
    return ImageRef("picture", data=buffer.getvalue())


def load_adapter(
    name: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str | None = None,
    offline: bool = False,
) -> Engine:
    """Load an adapter with the frozen models it stands on.

    Args:
        name: a run's folder, an artefact's folder, or a shipped adapter's name; left out, the default adapter.
        device: "cpu", "cuda", …; a GPU where there is one.
        dtype: "float32" or "bfloat16" for the LLM's computation.
        offline: take frozen weights from the cache only.

    Raises:
        UserError: there is no such adapter, or it does not fit its frozen models.
    """
    folder = find_artefact(name if name is not None else default_adapter())
    assembly, facts = load_artefact(folder, device=device or default_device(), dtype=dtype, offline=offline)
    return Engine(assembly, facts, str(name or folder.name))


def default_adapter() -> str:
    """The adapter that is used where none is named: the shipped one.

    Raises:
        UserError: none ships yet.
    """
    if DEFAULT_ADAPTER in shipped_adapters():
        return DEFAULT_ADAPTER
    raise UserError(
        "--adapter: no adapter ships with this version, so name one: train it with ./scripts/quickstart.sh"
        " or querybridge finetune RECIPE, then pass --adapter runs/quickstart or your run's folder"
    )
