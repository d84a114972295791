"""Which part of a picture a tower sees, read off what the processors themselves make of a ramp."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil

from qformer.transform import image_processor, seen_box

SIDE = 32
CROPS: dict[str, Any] = {
    "image_processor_type": "CLIPImageProcessor", "size": {"shortest_edge": 40},
    "crop_size": {"height": SIDE, "width": SIDE}, "do_center_crop": True,
}  # fmt: skip


def ramp(width: int, height: int) -> Image.Image:
    """Red grows from 0 to 1 along the picture, green down it."""
    across, down = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray((np.stack([across, down, across * 0], axis=-1) * 255).round().astype(np.uint8))


def seen(processor: CLIPImageProcessorPil, width: int, height: int) -> tuple[float, float, float, float]:
    """The box in shares of the picture, extrapolated from the middles of the outermost pixels to their edges."""
    made = processor(
        images=[ramp(width, height)], return_tensors="np", do_normalize=False, do_rescale=True, rescale_factor=1 / 255
    )
    red, green = made["pixel_values"][0][:2]
    across, down = red.mean(axis=0)[2:-2], green.mean(axis=1)[2:-2]  # resampling bends a ramp at its very ends

    def ends(line: np.ndarray) -> tuple[float, float]:
        step = (line[-1] - line[0]) / (len(line) - 1)
        return line[0] - 2.5 * step, line[-1] + 2.5 * step

    (left, right), (top, bottom) = ends(across), ends(down)
    return left, top, right, bottom


@pytest.mark.parametrize("size", [(200, 100), (90, 240), (64, 64)])
@pytest.mark.parametrize("whole", [True, False])
def test_the_box_is_what_comes_out(size: tuple[int, int], whole: bool) -> None:
    processor: Any = image_processor(None, CROPS, None, whole_image=whole)
    left, top, right, bottom = seen_box(processor, size)
    width, height = size

    assert (left / width, top / height, right / width, bottom / height) == pytest.approx(
        seen(processor, width, height), abs=0.02
    )
    assert whole == ((left, top, right, bottom) == (0, 0, width, height))
