"""What happens to a picture before an image encoder: transformers' image processors on their Pillow backend.

torchvision is not needed. The folder's own preprocessing file says how pixels are scaled; how a picture becomes a
square is decided here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer.errors import UserError

if TYPE_CHECKING:
    from transformers.image_processing_backends import PilBackend

# of ImageNet's pictures, scaled to 0…1: mean and deviation of red, green and blue
IMAGENET_STATISTICS = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
_FILES = ("preprocessor_config.json", "processor_config.json")
# what decides about pixels; the rest of a processor's settings never reaches them
_SETTINGS = (
    "size",
    "resample",
    "crop_size",
    "rescale_factor",
    "image_mean",
    "image_std",
    "do_resize",
    "do_center_crop",
    "do_rescale",
    "do_normalize",
)


def image_processor(
    folder: Path | None, default: Mapping[str, Any], image_size: int | None, *, whole_image: bool
) -> PilBackend:
    """The processor of `folder` (of `default` if it has no file for it) that makes squares of one size.

    Args:
        folder: a model's folder, or None.
        default: `image_processor_type`, `size` and statistics of the architecture.
        image_size: the square's side in pixels; None for the published one.
        whole_image: squash the whole picture to the square, as BLIP-2 does, even if the published way
            crops its centre: a question may be about what is at the edge. False follows the file exactly.

    Raises:
        UserError: the folder's file cannot be used here.
    """
    processor: Any = _published(folder, default)  # its settings are attributes that its class does not declare
    size = processor.size
    resized = size.height or size.shortest_edge
    published = processor.crop_size.height if processor.do_center_crop else resized
    if not published or not resized:
        raise UserError(
            f"{folder}: its preprocessing has no fixed square size; set image_size in a preprocessor_config.json"
        )
    side = image_size or published
    changes: dict[str, Any] = {}
    if whole_image:
        changes = {"do_resize": True, "do_center_crop": False, "size": {"height": side, "width": side}}
    elif side != published:
        scaled = round(resized * side / published)  # the margin that is cropped keeps its share
        changes["size"] = {"height": scaled, "width": scaled} if size.height else {"shortest_edge": scaled}
        if processor.do_center_crop:
            changes["crop_size"] = {"height": side, "width": side}
    settings = {key: value for key, value in processor.to_dict().items() if key != "image_processor_type"}
    return type(processor)(**{**settings, **changes})


def describe_transform(processor: PilBackend) -> dict[str, Any]:
    """The settings that decide about pixels, ready for JSON."""
    settings = processor.to_dict()
    found = {name: settings[name] for name in _SETTINGS if settings.get(name) is not None}
    if not settings.get("do_center_crop"):
        found.pop("crop_size", None)
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def square_side(processor: PilBackend) -> int:
    """The side in pixels of what `processor` puts out."""
    settings: Any = processor
    return int(settings.crop_size.height if settings.do_center_crop else settings.size.height)


def seen_box(processor: PilBackend, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """The part of a picture that comes out of `processor`: left, top, right and bottom in the picture's own pixels.

    It reaches beyond the picture's borders if less is resized than is cropped: there the tower sees black.

    Args:
        processor: makes the square.
        size: width and height of the picture.
    """
    settings: Any = processor
    width, height = size
    if not settings.do_center_crop:
        return 0.0, 0.0, float(width), float(height)
    wide, high = width, height  # once resized
    if settings.do_resize and settings.size.shortest_edge:
        shortest = settings.size.shortest_edge
        wide, high = (max(shortest, shortest * side // min(size)) for side in size)
    elif settings.do_resize:
        wide, high = settings.size.width, settings.size.height
    crop = settings.crop_size
    left, top = (wide - crop.width) / 2 * width / wide, (high - crop.height) / 2 * height / high
    return left, top, width - left, height - top


def _published(folder: Path | None, default: Mapping[str, Any]) -> PilBackend:
    import transformers

    if folder is None or not any((folder / name).is_file() for name in _FILES):
        settings = {name: value for name, value in default.items() if name != "image_processor_type"}
        return getattr(transformers, f"{default['image_processor_type']}Pil")(**settings)
    try:
        found = transformers.AutoImageProcessor.from_pretrained(
            folder, backend="pil", local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"{folder}: its preprocessing file cannot be used ({reason}); mend or remove it") from error
    if getattr(found, "backend", None) != "pil":
        raise UserError(
            f"{folder}: its preprocessing {type(found).__name__} has no Pillow form; use CLIP's, SigLIP's or BLIP's"
        )
    return found
