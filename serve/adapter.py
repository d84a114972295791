"""One loaded adapter: it answers in the caller's thread, one question or many at a time."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

from adapters.artefact.artefact import adapter_fingerprint, find_artefact, load_artefact
from adapters.artefact.facts import Facts
from adapters.catalogue import shipped_adapters
from adapters.data.examples import Example
from adapters.data.image_ref import ImageRef, image_ref
from adapters.data.images import open_image
from adapters.data.prompts import Turn
from adapters.inference.answering import reply_to_examples
from adapters.inference.generator import Generator
from adapters.inference.request import Completion, Request, ranked
from adapters.loading.assembly import Assembly
from adapters.loading.vision_side import FrozenModels, default_device
from qformer.decoding import Decoding
from qformer.errors import UserError
from qformer.language import LanguageModel
from qformer.lora import merge_lora
from qformer.precision import dequantize_four_bit

ImageInput = str | Path | bytes | Image.Image | ImageRef
"""What may be given as a picture: a path, the bytes of a file, a Pillow image, or an ImageRef."""

DEFAULT_ADAPTER = "photo"
KEPT_BYTES = 64 * 2**20  # of pictures that were asked about, an adapter
DEQUANTIZED_AT_MOST = 2**30  # bytes of an LLM's layers that a CPU unpacks to answer faster


class LoadedAdapter:
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
        self.generator = Generator(assembly, keep_bytes=KEPT_BYTES)

    def fingerprint(self) -> str:
        """`sha256:…` of the adapter: another one means that the same question may get another answer."""
        return adapter_fingerprint(self.assembly)

    def ask(
        self,
        pictures: ImageInput | Sequence[ImageInput],
        question: str,
        *,
        decoding: Decoding | None = None,
    ) -> str:
        """Answer one question about one picture, or about several at once.

        Args:
            pictures: one, or a list; `<image>` marks in the question say where each belongs, else they come first.
            question: in words.
            decoding: how tokens are chosen; as its recipe says if left out.

        Raises:
            UserError: a picture cannot be read, or the question is empty.
        """
        return self.complete(pictures, question, decoding=decoding).text

    def complete(
        self, pictures: ImageInput | Sequence[ImageInput], question: str, *, decoding: Decoding | None = None
    ) -> Completion:
        """As `ask`, with the answer's confidence."""
        request = self.chat_request([user_turn(pictures, question)])
        return self.generator([request], decoding or self.default_decoding("vqa"))[0]

    def choose(
        self, pictures: ImageInput | Sequence[ImageInput], question: str, choices: Sequence[str]
    ) -> dict[str, float]:
        """The probability of each choice as the answer, the likeliest first; they add up to 1.

        Raises:
            UserError: a picture cannot be read, the question is empty, or there are fewer than two choices.
        """
        named = checked_choices(choices)
        request = self.chat_request([user_turn(pictures, question)])
        (shares,) = self.generator.choose([request], [named])
        return ranked(named, shares)

    def caption(self, picture: ImageInput, *, language: str = "en", decoding: Decoding | None = None) -> str:
        """Describe a picture in English ("en") or Chinese ("zh").

        Raises:
            UserError: the picture cannot be read, or the language is not known.
        """
        request = self.caption_request(picture, language)
        return self.generator([request], decoding or self.default_decoding("caption"))[0].text

    def answer(
        self,
        examples: Sequence[Example],
        task: str = "vqa",
        *,
        decoding: Decoding | None = None,
        batch_size: int = 64,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[str]:
        """Answer many examples, in batches; an answer does not depend on its batch."""
        said = self.reply(examples, task, decoding=decoding, batch_size=batch_size, on_progress=on_progress)
        return [one.text for one in said]

    def reply(
        self,
        examples: Sequence[Example],
        task: str = "vqa",
        *,
        decoding: Decoding | None = None,
        batch_size: int = 64,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """As `answer`, with the confidence of each."""
        return reply_to_examples(
            self.assembly,
            examples,
            task,
            decoding=decoding or self.default_decoding(task),
            batch_size=batch_size,
            on_progress=on_progress,
        )

    def default_decoding(self, task: str) -> Decoding:
        """How tokens are chosen unless a caller says otherwise: the preset for "caption", else as the recipe says."""
        return Decoding.preset("caption") if task == "caption" else self.assembly.default_decoding

    def chat_request(self, turns: Sequence[Turn]) -> Request:
        """A conversation as a prompt.

        Raises:
            UserError: it does not end with the user's turn, or is longer than the language model reads.
        """
        prompt = self.assembly.prompts.chat(turns)
        images = tuple(image for turn in turns for image in turn.images)
        return self.check_length(Request(prompt, images))

    def caption_request(self, picture: ImageInput, language: str = "en") -> Request:
        """The request for a caption as a prompt."""
        return Request(self.assembly.prompts.caption(language), (picture_ref(picture),))

    @property
    def context_length(self) -> int | None:
        """Tokens that a prompt and its answer may have together; None if the language model sets no bound."""
        language = self.assembly.model.language
        longest = getattr(language.config, "max_position_embeddings", None)
        return None if longest is None or language.is_encoder_decoder else int(longest)

    def fit_decoding(self, request: Request, decoding: Decoding) -> Decoding:
        """The decoding, with its longest answer cut to the room that the context has after the prompt."""
        if self.context_length is None:
            return decoding
        room = self.context_length - len(request.prompt.ids)
        return replace(decoding, max_new_tokens=max(1, min(decoding.max_new_tokens, room)))

    def check_length(self, request: Request, *, room: int = 0) -> Request:
        """Return the request if its prompt leaves room for an answer.

        Args:
            request: the prompt, with its pictures.
            room: tokens that will be added to the prompt.

        Raises:
            UserError: the prompt leaves none.
        """
        length = len(request.prompt.ids) + room
        if self.context_length is not None and length >= self.context_length:
            raise UserError(
                f"what is asked is {length} tokens, and this language model reads {self.context_length}: shorten it, or"
                " begin anew"
            )
        return request


def user_turn(pictures: ImageInput | Sequence[ImageInput], text: str) -> Turn:
    """A user's turn from pictures and words.

    Raises:
        UserError: something given as a picture is none, or there are no words.
    """
    chosen = [pictures] if isinstance(pictures, ImageInput) else list(pictures)
    if not text.strip():
        raise UserError("QUESTION: it is empty; ask something about the picture")
    return Turn("user", text, tuple(picture_ref(picture) for picture in chosen))


def checked_choices(choices: Sequence[str], *, where: str = "choices") -> tuple[str, ...]:
    """Choices without blanks around them; `where` names them in errors.

    Raises:
        UserError: there are fewer than two, or one twice.
    """
    names = tuple(choice.strip() for choice in choices if choice.strip())
    if len(names) < 2:
        raise UserError(f"{where}: {len(names)} given; name at least two")
    if len(set(names)) < len(names):
        raise UserError(f"{where}: one is there twice; name each once")
    return names


def short_name(name: str) -> str:
    """What people call an adapter: a run's folder by its own name, not by that of its `best`."""
    path = Path(name)
    return (path.parent.name if path.name in ("best", "last") else path.name) or name


def picture_ref(picture: ImageInput) -> ImageRef:
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
    frozen: FrozenModels | None = None,
) -> LoadedAdapter:
    """Load an adapter with its frozen models.

    Args:
        name: a run's folder, an artefact's folder, or a shipped adapter's name; left out, the default adapter.
        device: "cpu", "cuda", …; a GPU if there is one.
        dtype: "float32" or "bfloat16" for the LLM's computation.
        offline: take frozen weights from the cache only.
        frozen: models that are loaded already, for adapters that share them; None if no other will share its LLM.

    Raises:
        UserError: there is no such adapter, or it does not fit its frozen models.
    """
    folder = find_artefact(name if name is not None else default_adapter())
    assembly, facts = load_artefact(
        folder, device=device or default_device(), dtype=dtype, offline=offline, frozen=frozen
    )
    ready_to_answer(assembly.model.language, alone=frozen is None)
    return LoadedAdapter(assembly, facts, str(name or folder.name))


def ready_to_answer(language: LanguageModel, *, alone: bool = False) -> None:
    """Unpack the 4-bit layers of an LLM on a CPU if they take no more than `DEQUANTIZED_AT_MOST` bytes.

    Args:
        language: the LLM, with LoRA or without.
        alone: no other adapter will answer with it, so LoRA is added to what was unpacked in float32.
    """
    if language.device.type == "cpu":
        unpacked = dequantize_four_bit(language.model, language.compute_dtype, at_most=DEQUANTIZED_AT_MOST)
        if unpacked and alone and language.compute_dtype == torch.float32:
            merge_lora(language.model)


def default_adapter() -> str:
    """The adapter that is used if none is named: the shipped one.

    Raises:
        UserError: none ships yet.
    """
    if DEFAULT_ADAPTER in shipped_adapters():
        return DEFAULT_ADAPTER
    raise UserError(
        "--adapter: no adapter ships with this version, so name one: train it with ./scripts/quickstart.sh"
        " or querybridge finetune RECIPE, then pass --adapter runs/quickstart or your run's folder"
    )
