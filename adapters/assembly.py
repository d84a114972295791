"""Everything a recipe names, loaded and put together: towers, caches, bridge, language model, prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from adapters.data.images import ImageRef
from adapters.data.prompts import PromptBuilder, PromptStyle
from adapters.features import FeatureCache
from adapters.recipe import BridgeSection, LoraSection, Recipe
from qformer.bridge import QFormer
from qformer.config import BridgeConfig
from qformer.errors import UserError
from qformer.interchange import start_from_bert
from qformer.language import LanguageModel, LoraSettings, load_language_model
from qformer.model import VisionLanguageModel
from qformer.precision import limit_kernel_cache
from qformer.sources import fingerprint, resolve
from qformer.vision import FeatureNorm, load_image_encoder

MAX_INSTRUCTION = 128  # tokens of an instruction that the bridge reads, as in InstructBLIP
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass
class Assembly:
    """A loaded model with what stands around it.

    Attributes:
        recipe: what it was built from.
        model: the model; its trainable parts are fresh until an artefact is loaded into them.
        prompts: words and tokenises for its LLM.
        caches: one feature cache a tower.
        bridge_tokenizer: the bridge's own, where it is instruction-aware.
        fingerprints: of the frozen weights, by role: "vision.0", "language", "bridge.start".
    """

    recipe: Recipe
    model: VisionLanguageModel
    prompts: PromptBuilder
    caches: list[FeatureCache]
    bridge_tokenizer: Any | None
    fingerprints: dict[str, str]

    def features(self, images: Sequence[ImageRef]) -> list[Tensor]:
        """Features of pictures, one tensor [B, P, D] a tower, from the cache where it has them."""
        return [cache.load(images) for cache in self.caches]

    def image_embeddings(self, images: Sequence[ImageRef], instructions: Sequence[str] | None = None) -> Tensor:
        """Pictures to vectors for the LLM, [B, Q, D_l].

        Args:
            images: B pictures.
            instructions: what is asked about each, used where the bridge is instruction-aware.
        """
        tokens = self.instruction_tokens(instructions or [""] * len(images))
        return self.model.image_embeddings(self.features(images), *tokens)

    def instruction_tokens(self, instructions: Sequence[str]) -> tuple[Tensor, ...]:
        """Instructions as (ids [B, T], mask [B, T] bool) for the bridge; () where it does not read them."""
        if self.bridge_tokenizer is None:
            return ()
        tokens = self.bridge_tokenizer(
            list(instructions), padding=True, truncation=True, max_length=MAX_INSTRUCTION, return_tensors="pt"
        ).to(self.model.device)
        return tokens["input_ids"], tokens["attention_mask"].bool()


def assemble(
    recipe: Recipe,
    *,
    device: str = "cpu",
    dtype: str | None = None,
    offline: bool = False,
    lora: bool = True,
) -> Assembly:
    """Load the frozen parts a recipe names and build the trainable ones.

    Args:
        recipe: what to build.
        device: where the model runs.
        dtype: "float32" or "bfloat16" for the LLM's computation; left out, what suits the device.
        offline: take frozen weights from the cache only.
        lora: put fresh LoRA matrices on the LLM; False where they come from an artefact.

    Raises:
        UserError: weights cannot be had, or parts do not fit.
    """
    if dtype is not None and dtype not in DTYPES:
        raise UserError(f"--dtype {dtype}: take one of {', '.join(DTYPES)}")
    limit_kernel_cache()
    check_device(device)
    fingerprints: dict[str, str] = {}
    encoders = []
    for index, tower in enumerate(recipe.vision.towers):
        encoder = load_image_encoder(
            tower.source,
            layer=tower.layer,
            class_token=tower.class_token,
            image_size=tower.image_size,
            device=device,
            dtype=torch.float32 if torch.device(device).type == "cpu" else torch.float16,
            offline=offline,
        )
        encoders.append(encoder)
        fingerprints[f"vision.{index}"] = str(encoder.identity()["fingerprint"])
    language_folder = resolve(recipe.language.source, offline=offline)
    fingerprints["language"] = fingerprint(language_folder)
    language = load_language_model(
        language_folder,
        quantize=recipe.language.quantize,
        compute_dtype=DTYPES[dtype] if dtype else None,
        device=device,
    )
    torch.manual_seed(recipe.train.seed)  # fresh weights depend on the seed and on nothing before
    feature_norm = FeatureNorm(encoders)
    bridge = QFormer(bridge_config(recipe.bridge, feature_norm.width))
    bridge_tokenizer = _bridge_start(recipe.bridge, bridge, fingerprints, offline=offline)
    projection = word_sized_projection(bridge.config.hidden_size, language)
    if lora and recipe.language.lora is not None:
        language.add_lora(lora_settings(recipe.language.lora))
    if recipe.language.gradient_checkpointing:
        language.enable_checkpointing()
    model = VisionLanguageModel(encoders, feature_norm.to(device), bridge.to(device), projection.to(device), language)
    prompts = PromptBuilder(
        language.tokenizer,
        model.num_queries,
        is_encoder_decoder=language.is_encoder_decoder,
        style=PromptStyle(**recipe.prompt.model_dump()),
    )
    caches = [FeatureCache(encoder) for encoder in encoders]
    return Assembly(recipe, model.eval(), prompts, caches, bridge_tokenizer, fingerprints)


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


def bridge_config(section: BridgeSection, encoder_width: int) -> BridgeConfig:
    """A recipe's bridge section as the Q-Former's configuration."""
    given = section.model_dump(exclude={"preset", "start"}, exclude_none=True)
    return BridgeConfig.preset(section.preset, encoder_width=encoder_width, **given)


def lora_settings(section: LoraSection) -> LoraSettings:
    """A recipe's LoRA section as the settings the language model takes."""
    return LoraSettings(**section.model_dump())


def _bridge_start(
    section: BridgeSection, bridge: QFormer, fingerprints: dict[str, str], *, offline: bool
) -> Any | None:
    """Copy BERT-family weights into a bridge; hand back its tokenizer where instructions are read."""
    if section.start is None:
        if section.instruction_aware:
            raise UserError("bridge.instruction_aware: needs bridge.start, whose tokenizer reads the instruction")
        return None
    folder = resolve(section.start, offline=offline)
    fingerprints["bridge.start"] = fingerprint(folder)
    try:
        start_from_bert(bridge, load_file(folder / "model.safetensors"))
    except OSError as error:
        raise UserError(f"bridge.start: {folder} has no model.safetensors; name a BERT saved in one file") from error
    if bridge.embeddings is not None:  # known by the fingerprint, so neither trained nor kept in the artefact
        bridge.embeddings.words.requires_grad_(False)
    if not section.instruction_aware:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"bridge.start: {folder} has no tokenizer, which an instruction-aware bridge needs") from error


def check_device(device: str) -> None:
    """Raise a UserError where the device is not one torch has here."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(f"--device {device}: torch cannot use it here; take cpu, or see querybridge doctor") from error


def default_device() -> str:
    """ "cuda" where there is a GPU, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"
