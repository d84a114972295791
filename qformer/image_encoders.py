"""The frozen towers: what an image encoder is, and one short class an architecture.

A tower turns pictures into features [B, P, width]: the tokens of one chosen hidden layer, without the tower's final
norm (BLIP-2, arXiv 2301.12597, section 3.1). `qformer.vision_loading` loads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from qformer.class_reader import Classifier
from qformer.efficientnet import MODEL_TYPE, EfficientNetLite, EfficientNetLiteConfig
from qformer.errors import UserError
from qformer.imagenet import imagenet_names
from qformer.published import TOWER, is_published, read_tensors, tensor_files
from qformer.quiet import quiet_transformers
from qformer.tensor_names import describe_differences
from qformer.transform import IMAGENET_STATISTICS, describe_transform, square_side

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers.image_processing_backends import PilBackend

_IDENTITY_VERSION = 1  # raised when the same weights and settings would give other features
_CLIP_STATISTICS = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


class ImageEncoder(nn.Module):
    """One frozen tower. `load_image_encoder` makes it; a subclass says how one architecture is loaded, cut and run.

    `layer` indexes the tower's hidden states as Python does: 0 is what enters the first block, -1 the last block's
    output, -2 the second-last's. What comes after is dropped: it costs neither memory nor time.

    Attributes:
        width: channels D of a feature.
        num_tokens: tokens P a picture, the class token included if it is kept.
        image_size: side in pixels of the square that the tower sees.
        grid: (rows, columns) if the tokens are just a grid in reading order, else None.
        has_positions: whether the tower itself distinguishes places.
        layer: the chosen hidden state, counted from the front.
        classifier: what the published tower names by the mean of that state; None if it has no such names.
    """

    architecture: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]  # in config.json
    preprocessing: ClassVar[Mapping[str, Any]]  # used if the folder has none
    has_positions: ClassVar[bool] = True
    has_class_token: ClassVar[bool] = True
    missing_blocks: ClassVar[int] = 0  # last blocks that checkpoints leave out; they count all the same
    norm_eps: float = 1e-6  # of the trained norm behind the tower: BLIP-2's
    classifier: Classifier | None = None

    def __init__(self, model: nn.Module, processor: PilBackend, weights: str | None, layer: int, class_token: bool):
        super().__init__()
        self.layer = _from_front(layer, self.count_states(model), self.missing_blocks, self.architecture)
        self.cut(model, self.layer)
        self.model: Any = model.eval().requires_grad_(False)
        self.processor = processor
        self.weights = weights
        self.image_size = square_side(processor)
        self.class_token = class_token and self.has_class_token
        rows, self.width = self.output_shape()
        self.num_tokens = rows * rows + int(self.class_token)
        self.grid: tuple[int, int] | None = None if self.class_token else (rows, rows)

    @classmethod
    def read_config(cls, folder: Path) -> Any:
        """The tower's config, with `image_size` and, if it has patches, `patch_size`."""
        raise NotImplementedError

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> nn.Module:
        """The whole tower with the folder's weights. Raises UserError if they do not fit."""
        raise NotImplementedError

    @classmethod
    def build(cls, config: Any) -> nn.Module:
        """The whole tower of a config, with weights as they come."""
        raise NotImplementedError

    @classmethod
    def count_states(cls, model: nn.Module) -> int:
        """How many hidden states the uncut tower gives."""
        raise NotImplementedError

    def cut(self, model: nn.Module, layer: int) -> None:
        """Drop what comes after hidden state `layer`, final norm and head included."""
        raise NotImplementedError

    def output_shape(self) -> tuple[int, int]:
        """(rows of the square grid, width) at the chosen layer."""
        raise NotImplementedError

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] → [B, tokens, width], the class token first if there is one."""
        raise NotImplementedError

    def centres(self) -> Tensor:
        """Middles of the rows of tokens along the side of the square, from 0 to 1, [rows]; those of the columns too."""
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of weights and features."""
        return next(self.model.parameters()).dtype

    def train(self, mode: bool = True) -> ImageEncoder:
        """Stay in evaluation mode, whatever the model around it does: frozen means frozen."""
        return super().train(False)

    def preprocess(self, images: Sequence[Image]) -> Tensor:
        """Pictures of any size and mode → pixels [B, 3, S, S] in float32 on the CPU."""
        if not images:
            return torch.zeros(0, 3, self.image_size, self.image_size)
        return self.processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels [B, 3, S, S] → features [B, P, width] in the tower's dtype, without gradients."""
        weight = next(self.model.parameters())
        tokens = self.encode(pixels.to(device=weight.device, dtype=weight.dtype))
        return tokens[:, 1:] if self.has_class_token and not self.class_token else tokens

    def identity(self) -> dict[str, object]:
        """All that the features depend on, ready for JSON: the key under which they may be kept."""
        return {
            "version": _IDENTITY_VERSION,
            "fingerprint": self.weights,
            "architecture": self.architecture,
            "layer": self.layer,
            "class_token": self.class_token,
            "num_tokens": self.num_tokens,
            "width": self.width,
            "transform": describe_transform(self.processor),
            "dtype": str(self.dtype).removeprefix("torch."),
        }


class _TransformersEncoder(ImageEncoder):
    """What transformers' towers share: a list of blocks under `encoder`, square patches, a final norm to leave out."""

    blocks: ClassVar[str] = "layers"
    final_norm: ClassVar[str] = "post_layernorm"
    class_name: ClassVar[str]  # in transformers

    @classmethod
    def read_config(cls, folder: Path) -> Any:
        """transformers' config of the tower; out of a whole model's folder too."""
        import transformers

        return getattr(transformers, cls.class_name).config_class.from_pretrained(folder, local_files_only=True)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> nn.Module:
        """transformers' model; a tensor that the folder lacks is an error."""
        return _load_strictly(cls.class_name, folder, dtype)

    @classmethod
    def build(cls, config: Any) -> nn.Module:
        """transformers' model of the config."""
        import transformers

        return getattr(transformers, cls.class_name)._from_config(config)

    @classmethod
    def count_states(cls, model: Any) -> int:
        """One before the first block and one after each."""
        return len(getattr(model.encoder, cls.blocks)) + 1

    def cut(self, model: Any, layer: int) -> None:
        """Keep the first `layer` blocks; the final norm becomes the identity."""
        setattr(model.encoder, self.blocks, getattr(model.encoder, self.blocks)[:layer])
        setattr(model, self.final_norm, nn.Identity())

    def output_shape(self) -> tuple[int, int]:
        """Patches a side, and the width that all hidden states share."""
        return self.image_size // self.model.config.patch_size, self.model.config.hidden_size

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] → [B, tokens, width]; positions are interpolated for another picture size than the native."""
        native = pixels.shape[-1] == self.model.config.image_size
        return self.model(pixels, interpolate_pos_encoding=not native).last_hidden_state

    def centres(self) -> Tensor:
        """Those of the patches; pixels that fill no patch are at the end."""
        rows, _ = self.output_shape()
        return (torch.arange(rows) + 0.5) * self.model.config.patch_size / self.image_size


class ClipEncoder(_TransformersEncoder):
    """CLIP (arXiv 2103.00020). Hidden state 0 follows the norm before the blocks."""

    architecture = "clip"
    model_types = ("clip", "clip_vision_model")
    class_name = "CLIPVisionModel"
    preprocessing: ClassVar[Mapping[str, Any]] = {"image_processor_type": "CLIPImageProcessor", **_CLIP_STATISTICS}


class SiglipEncoder(_TransformersEncoder):
    """SigLIP (arXiv 2303.15343): no class token; the pooling head is left out."""

    architecture = "siglip"
    model_types = ("siglip", "siglip_vision_model")
    class_name = "SiglipVisionModel"
    has_class_token = False
    preprocessing: ClassVar[Mapping[str, Any]] = {"image_processor_type": "SiglipImageProcessor"}

    def cut(self, model: Any, layer: int) -> None:
        """Drop the pooling head too."""
        super().cut(model, layer)
        model.use_head = False
        model.head = None


class Dinov2Encoder(_TransformersEncoder):
    """DINOv2 (arXiv 2304.07193). It fits its positions to any picture size by itself."""

    architecture = "dinov2"
    model_types = ("dinov2",)
    class_name = "Dinov2Model"
    blocks = "layer"
    final_norm = "layernorm"
    preprocessing: ClassVar[Mapping[str, Any]] = {"image_processor_type": "BitImageProcessor", **IMAGENET_STATISTICS}

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] → [B, 1 + patches, width]."""
        return self.model(pixels).last_hidden_state


class Blip2Encoder(_TransformersEncoder):
    """BLIP-2's ViT-g. Its checkpoints leave out the last block, as BLIP-2 reads the second-last layer.

    Layers count as in the tower before that cut: -2, the default, is the output of all blocks that are there, and -1 is
    not available. `post_layernorm` is BLIP-2's trainable norm after the tower, so it belongs to the bridge, not here.
    """

    architecture = "blip2"
    model_types = ("blip-2", "blip_2_vision_model")
    class_name = "Blip2VisionModel"
    missing_blocks = 1
    preprocessing: ClassVar[Mapping[str, Any]] = {"image_processor_type": "BlipImageProcessor", **_CLIP_STATISTICS}

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> nn.Module:
        """Of a whole model's shards only the tower's tensors are read, and only their files need be there."""
        if not is_published(folder):
            return super().load(folder, dtype)
        with torch.device("meta"):
            model = cls.build(cls.read_config(folder))
        prefix = TOWER[0]
        tensors = read_tensors(
            folder, {name: file for name, file in tensor_files(folder).items() if name.startswith(TOWER)}
        )
        found = {name.removeprefix(prefix): tensor.to(dtype) for name, tensor in tensors.items()}
        if differences := describe_differences(found, model.state_dict()):
            raise UserError(f"{folder}: its {cls.class_name} cannot be loaded: {differences}; fetch it anew")
        model.load_state_dict(found, assign=True)
        return model

    def cut(self, model: Any, layer: int) -> None:
        """Drop what follows; the norm behind the tower is the bridge's, and the config says its epsilon."""
        self.norm_eps = float(model.config.layer_norm_eps)
        super().cut(model, layer)


class InstructBlipEncoder(Blip2Encoder):
    """InstructBLIP's ViT-g: BLIP-2's, under another name."""

    architecture = "instructblip"
    model_types = ("instructblip", "instructblip_vision_model")
    class_name = "InstructBlipVisionModel"


class EfficientNetLiteEncoder(ImageEncoder):
    """EfficientNet-Lite. Its nine hidden states: stem, seven stages (-2 is the last), head (-1, 1280 channels).

    Tokens are the places of the map in reading order. Batch norms are folded and memory is channels-last: three times
    as fast on a CPU, equal to 1e-4.
    """

    architecture = "efficientnet-lite"
    model_types = (MODEL_TYPE,)
    has_positions = False
    has_class_token = False
    preprocessing: ClassVar[Mapping[str, Any]] = {"image_processor_type": "ViTImageProcessor", **IMAGENET_STATISTICS}

    @classmethod
    def read_config(cls, folder: Path) -> EfficientNetLiteConfig:
        """Our own config.json."""
        return EfficientNetLiteConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype) -> nn.Module:
        """Norms are folded in fp32, then all is rounded once."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        model = EfficientNetLite(cls.read_config(folder))
        try:
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except (RuntimeError, OSError, SafetensorError) as error:
            raise UserError(f"{folder}: model.safetensors does not fit config.json; name another folder") from error
        return model.fold().to(dtype)

    @classmethod
    def build(cls, config: EfficientNetLiteConfig) -> nn.Module:
        """Folded like a loaded one, so that shapes and memory are the same."""
        return EfficientNetLite(config).fold()

    @classmethod
    def count_states(cls, model: Any) -> int:
        """One for each part: nine."""
        return len(model.parts)

    def cut(self, model: Any, layer: int) -> None:
        """Drop later parts and the classifier, whose map is kept aside if it reads the chosen hidden state."""
        linear, names = model.classifier, imagenet_names()
        if layer == len(model.parts) - 1 and linear is not None and linear.out_features == len(names):
            # beside the modules: it is no part of the tower, whose features do not depend on it
            self.classifier = Classifier(linear.weight.detach().float(), linear.bias.detach().float(), names)
        model.cut(layer)

    def output_shape(self) -> tuple[int, int]:
        """9 rows of 1280 channels for Lite2's head at 260 px."""
        return self.model.output_shape(self.image_size)

    def tail(self, start: int) -> nn.Module:
        """What leads from hidden state `start`, a map [B, C, H, W], to the chosen one; its weights are the tower's."""
        return nn.Sequential(*list(self.model.parts)[start + 1 :])

    def encode(self, pixels: Tensor) -> Tensor:
        """[B, 3, S, S] → [B, rows · rows, width]."""
        *_, x = self.model.hidden_states(pixels.contiguous(memory_format=torch.channels_last))
        return x.flatten(2).transpose(1, 2)  # [B, C, H, W] → [B, H·W, C]

    def centres(self) -> Tensor:
        """Where the convolutions' strides and paddings put them: the outer ones lie near the picture's border."""
        return self.model.centres(self.image_size) / self.image_size


ENCODERS: tuple[type[ImageEncoder], ...] = (
    ClipEncoder,
    SiglipEncoder,
    Dinov2Encoder,
    Blip2Encoder,
    InstructBlipEncoder,
    EfficientNetLiteEncoder,
)


def _from_front(layer: int, states: int, missing: int, architecture: str) -> int:
    """`layer` counted from the front, over `states` hidden states and `missing` more that the checkpoint leaves out."""
    total = states + missing
    index = layer if layer >= 0 else total + layer
    if not 0 <= index < states:
        raise UserError(
            f"layer {layer}: {architecture} here gives hidden states {-total}…{-1 - missing} (or 0…{states - 1})"
        )
    return index


def _load_strictly(class_name: str, folder: Path, dtype: torch.dtype) -> nn.Module:
    """The model with the folder's weights; a tensor it lacks is an error; the library would draw noise."""
    import transformers
    from safetensors import SafetensorError

    try:
        with quiet_transformers():  # a CLIP folder's text tower is "unexpected" here, and rightly left alone
            model, info = getattr(transformers, class_name).from_pretrained(
                folder,
                dtype=dtype,
                # the tower's place in a whole model, which the library knows for some classes and not for BLIP-2's
                key_mapping={r"^(model\.)?vision_model\.": ""},
                ignore_mismatched_sizes=True,  # reported below, with the tensor's name
                output_loading_info=True,
                use_safetensors=True,
                local_files_only=True,
            )
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(
            f"{folder}: {class_name} cannot be loaded ({reason}); name a whole folder of its kind"
        ) from error
    wrong = sorted({*info["missing_keys"], *(entry[0] for entry in info["mismatched_keys"])})
    if wrong:
        raise UserError(
            f"{folder}: {len(wrong)} tensors of {class_name} are missing or of another shape, first {wrong[0]}; "
            "name a whole folder of its kind"
        )
    return model
