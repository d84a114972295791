"""Load frozen image encoders, whichever the architecture.

The path of a picture: `ImageEncoder.preprocess` → `ImageEncoder` → `qformer.feature_norm.FeatureNorm`, which sets the
tokens of one or several towers side by side → the bridge.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qformer.errors import UserError
from qformer.image_encoders import ENCODERS, ImageEncoder
from qformer.published import TOWER
from qformer.sources import fingerprint, resolve
from qformer.transform import image_processor
from qformer.weight_delta import apply_weight_delta

if TYPE_CHECKING:
    from transformers.image_processing_backends import PilBackend


def load_image_encoder(
    source: str,
    *,
    layer: int = -2,
    class_token: bool = True,
    image_size: int | None = None,
    weight_delta: Path | None = None,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    offline: bool = False,
    whole_image: bool = True,
) -> ImageEncoder:
    """The frozen tower of a source (`pypi:NAME`, folder or hub id), whichever of the known architectures it is.

    Args:
        source: see `qformer.sources.resolve`.
        layer: which hidden state to give; see `ImageEncoder`.
        class_token: keep the class token, if the tower has one.
        image_size: side in pixels of the square picture; None for the published one.
        weight_delta: a folder with a small difference that is added to the published weights (`qformer.weight_delta`).
        device: where the weights go.
        dtype: of weights and features.
        offline: fetch nothing.
        whole_image: squash the whole picture to the square even if the published way crops its centre.

    Raises:
        UserError: no such source, an unknown architecture, weights that do not fit, a layer or size that cannot be.
    """
    folder = resolve(source, offline=offline, parts=TOWER)
    kind = _encoder_class(_model_type(folder), source)
    processor = _processor(kind, kind.read_config(folder), folder, image_size, whole_image)
    model, weights = kind.load(folder, torch.float32 if weight_delta is not None else dtype), fingerprint(folder, TOWER)
    if weight_delta is not None:
        weights = apply_weight_delta(model, weight_delta, base=weights)
        model = model.to(dtype)
    encoder = kind(model, processor, weights, layer, class_token)
    return encoder.to(device)


def build_image_encoder(
    config: Any,
    *,
    layer: int = -2,
    class_token: bool = True,
    image_size: int | None = None,
    device: str | torch.device = "meta",
    dtype: torch.dtype = torch.float32,
) -> ImageEncoder:
    """The tower of a config without trained weights: for shapes, memory estimates (on the meta device) and tests.

    Args:
        config: `CLIPVisionConfig`, `SiglipVisionConfig`, `Dinov2Config`, `Blip2VisionConfig` of transformers, or our
            `EfficientNetLiteConfig`.
        layer: which hidden state to give; see `ImageEncoder`.
        class_token: keep the class token, if the tower has one.
        image_size: side in pixels of the square picture; None for the config's.
        device: "meta" holds shapes only.
        dtype: of weights and features.

    Raises:
        UserError: an unknown architecture, a layer or size that cannot be.
    """
    kind = _encoder_class(config.model_type, type(config).__name__)
    processor = _processor(kind, config, None, image_size, whole_image=True)
    with torch.device(device):
        model = kind.build(config).to(dtype)
        return kind(model, processor, None, layer, class_token)


def _processor(
    kind: type[ImageEncoder], config: Any, folder: Path | None, image_size: int | None, whole_image: bool
) -> PilBackend:
    patch = getattr(config, "patch_size", 1)
    if image_size is not None and (image_size < 1 or image_size % patch):
        nearest = max(1, round(image_size / patch)) * patch
        raise UserError(f"image_size {image_size} is not a multiple of the tower's patch of {patch} px: take {nearest}")
    side = config.image_size
    default = {**kind.preprocessing, "size": {"height": side, "width": side}, "do_center_crop": False}
    return image_processor(folder, default, image_size, whole_image=whole_image)


def _model_type(folder: Path) -> str:
    try:
        return str(json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type"))
    except (ValueError, AttributeError) as error:
        raise UserError(
            f"{folder / 'config.json'} is not a JSON object ({error}): fetch or save the model anew"
        ) from error


def _encoder_class(model_type: str, source: str) -> type[ImageEncoder]:
    for kind in ENCODERS:
        if model_type in kind.model_types:
            return kind
    known = ", ".join(kind.architecture for kind in ENCODERS)
    raise UserError(f"{source}: no image encoder is known for model_type {model_type!r}; take one of {known}")
