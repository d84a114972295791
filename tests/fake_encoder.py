"""An encoder and pictures for the tests of the feature cache, which other processes import too."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from adapters.data.image_ref import ImageRef

IDENTITY: dict[str, object] = {
    "fingerprint": "sha256:0",
    "architecture": "fake",
    "layer": -2,
    "class_token": True,
    "transform": {"size": 4, "mean": [0.5, 0.5, 0.5]},
    "dtype": "float32",
}


class FakeEncoder:
    """Three tokens of five numbers that are the picture's mean colour, times `scale`; counts its pictures."""

    def __init__(self, scale: float = 1.0, **changes: object) -> None:
        self.scale = scale
        self.changes = changes
        self.pictures = 0
        self.batches: list[int] = []

    def identity(self) -> dict[str, object]:
        return IDENTITY | self.changes

    def preprocess(self, images: Sequence[Image.Image]) -> Tensor:
        arrays = [np.asarray(image.resize((4, 4)), dtype=np.float32) / 255 for image in images]
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)  # [B, 3, 4, 4]

    def __call__(self, pixels: Tensor) -> Tensor:
        self.pictures += len(pixels)
        self.batches.append(len(pixels))
        mean = pixels.mean(dim=(2, 3))  # [B, 3]
        return self.scale * mean[:, :, None].expand(-1, -1, 5)  # [B, 3, 5]


def picture(number: int) -> ImageRef:
    """A one-coloured picture: red channel `number`."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 255)).save(file, "PNG")
    return ImageRef(f"{number}.png", data=file.getvalue(), where=f"data.jsonl row {number} (line {number})")


def pictures(*numbers: int) -> list[ImageRef]:
    return [picture(number) for number in numbers]


def files(root: Path) -> list[Path]:
    return sorted((root / "features").rglob("*.npy"))


def expected(refs: Sequence[ImageRef]) -> Tensor:
    reds = torch.tensor([float(ref.label.removesuffix(".png")) for ref in refs]) / 255
    colours = torch.stack([reds, torch.zeros(len(refs)), torch.ones(len(refs))], dim=1)  # [B, 3]
    return colours[:, :, None].expand(-1, -1, 5).half()
