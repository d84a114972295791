"""EfficientNet-Lite, the convolutional image encoder of the embedded default.

EfficientNet (arXiv 1905.11946) as its Lite variants publish it: ReLU6 for swish, no squeeze-and-excitation, stem and
head not scaled. Inference only: batch norms use their stored statistics and can be folded into the convolutions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from math import ceil
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

MODEL_TYPE = "efficientnet-lite"

# blocks, kernel, stride, expansion, width out: the stages before any scaling (EfficientNet-B0, table 1)
_STAGES = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


@dataclass(frozen=True)
class EfficientNetLiteConfig:
    """Width and depth multipliers, the square input's side in pixels, and the fixed widths of stem and head."""

    width: float = 1.0
    depth: float = 1.0
    image_size: int = 224
    num_classes: int = 1000
    stem_channels: int = 32
    head_channels: int = 1280

    model_type: ClassVar[str] = MODEL_TYPE

    def stages(self) -> list[tuple[int, int, int, int, int]]:
        """(blocks, kernel, stride, expansion, width out) of the seven stages, scaled."""
        last = len(_STAGES) - 1
        return [
            # the Lite variants repeat the first and the last stage once whatever the depth
            (n if i in (0, last) else ceil(n * self.depth), k, s, e, self._scaled(out))
            for i, (n, k, s, e, out) in enumerate(_STAGES)
        ]

    def _scaled(self, channels: int) -> int:
        """A multiple of 8 near `channels` x width, never more than a tenth below it."""
        exact = channels * self.width
        rounded = max(8, int(exact + 4) // 8 * 8)
        return rounded + 8 if rounded < 0.9 * exact else rounded

    def to_dict(self) -> dict[str, Any]:
        """The content of `config.json`."""
        return {"model_type": MODEL_TYPE, **asdict(self)}

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> EfficientNetLiteConfig:
        """Read `config.json`; keys that are not ours are left alone, as transformers does."""
        return cls(**{name: content[name] for name in (field.name for field in fields(cls)) if name in content})


LITE2 = EfficientNetLiteConfig(1.1, 1.2, 260)


class ConvNorm(nn.Module):
    """Convolution with TensorFlow's "same" padding, batch norm with stored statistics, ReLU6 if `activate`.

    [B, in, H, W] → [B, out, ceil(H / stride), ceil(W / stride)]
    """

    def __init__(self, inner: int, outer: int, kernel: int, stride: int = 1, groups: int = 1, activate: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(inner, outer, kernel, stride, groups=groups, bias=False)
        self.norm: nn.Module = nn.BatchNorm2d(outer, eps=1e-3)
        self.activate = activate

    def forward(self, x: Tensor) -> Tensor:
        """Pad, convolve, normalise, activate."""
        kernel, stride = self.conv.kernel_size[0], self.conv.stride[0]
        height, width = (max((ceil(n / stride) - 1) * stride + kernel - n, 0) for n in x.shape[-2:])
        if (
            height % 2 or width % 2
        ):  # the odd pixel goes below and to the right, which a convolution's own padding cannot express
            x = F.pad(x, (width // 2, width - width // 2, height // 2, height - height // 2))
            height = width = 0
        conv = self.conv
        x = F.conv2d(x, conv.weight, conv.bias, conv.stride, (height // 2, width // 2), conv.dilation, conv.groups)
        x = self.norm(x)
        # in place: nothing else holds this tensor and no gradient is taken
        return F.relu6(x, inplace=not torch.is_grad_enabled()) if self.activate else x

    def fold(self) -> None:
        """Fold the batch norm into the convolution: the same function to rounding, one pass over memory fewer."""
        if isinstance(self.norm, nn.BatchNorm2d):
            self.conv = fuse_conv_bn_eval(self.conv, self.norm)
            self.norm = nn.Identity()


class InvertedResidual(nn.Module):
    """Expand, filter each channel, project; the input is added if the shape stays. [B, in, H, W] → [B, out, h, w]"""

    def __init__(self, inner: int, outer: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        middle = inner * expansion
        self.expand = ConvNorm(inner, middle, 1) if expansion != 1 else nn.Identity()
        self.depthwise = ConvNorm(middle, middle, kernel, stride, groups=middle)
        self.project = ConvNorm(middle, outer, 1, activate=False)
        self.residual = stride == 1 and inner == outer

    def forward(self, x: Tensor) -> Tensor:
        """One block."""
        y = self.project(self.depthwise(self.expand(x)))
        return y + x if self.residual else y


class EfficientNetLite(nn.Module):
    """The network: `parts` are the stem, the seven stages and the head, and their nine maps are its hidden states."""

    def __init__(self, config: EfficientNetLiteConfig):
        super().__init__()
        self.config = config
        self.parts = nn.ModuleList([ConvNorm(3, config.stem_channels, 3, stride=2)])
        width = config.stem_channels
        for count, kernel, stride, expansion, outer in config.stages():
            blocks = [InvertedResidual(width, outer, kernel, stride, expansion)]
            blocks += [InvertedResidual(outer, outer, kernel, 1, expansion) for _ in range(count - 1)]
            self.parts.append(nn.Sequential(*blocks))
            width = outer
        self.parts.append(ConvNorm(width, config.head_channels, 1))
        self.classifier: nn.Linear | None = nn.Linear(config.head_channels, config.num_classes)

    def cut(self, layer: int) -> None:
        """Drop what comes after hidden state `layer` (counted from the front) and the classifier."""
        self.parts = self.parts[: layer + 1]
        self.classifier = None

    def fold(self) -> EfficientNetLite:
        """Switch to inference for good: batch norms folded into the convolutions, weights channels-last.

        On a CPU that is three times as fast as the plain network; outputs agree to 1e-4. Returns itself.
        """
        self.eval()
        for part in self.modules():
            if isinstance(part, ConvNorm):
                part.fold()
        self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self

    def output_shape(self, image_size: int) -> tuple[int, int]:
        """(rows = columns, channels) of the last map that the network, cut or not, gives for a square picture."""
        stages = self.config.stages()
        strides = [2, *(stride for _, _, stride, _, _ in stages), 1][: len(self.parts)]
        widths = [self.config.stem_channels, *(outer for *_, outer in stages), self.config.head_channels]
        for stride in strides:
            image_size = ceil(image_size / stride)
        return image_size, widths[len(self.parts) - 1]

    def centres(self, image_size: int) -> Tensor:
        """Middles of what the rows of the last map see, in pixels from the border of a square picture, [rows]."""
        first, step = 0.5, 1.0  # the first row's middle, and the distance between two rows
        for part in self.modules():
            if isinstance(part, ConvNorm):
                kernel, stride = part.conv.kernel_size[0], part.conv.stride[0]
                rows = ceil(image_size / stride)
                before = max((rows - 1) * stride + kernel - image_size, 0) // 2
                first += ((kernel - 1) / 2 - before) * step
                image_size, step = rows, step * stride
        return first + step * torch.arange(image_size)

    def hidden_states(self, pixels: Tensor) -> Iterator[Tensor]:
        """The maps [B, C, H, W] of pixels [B, 3, H, W], one after the other."""
        x = pixels
        for part in self.parts:
            x = part(x)
            yield x

    def forward(self, pixels: Tensor) -> Tensor:
        """Class logits [B, num_classes] of pixels [B, 3, H, W]: the head's map averaged over places (uncut only)."""
        *_, x = self.hidden_states(pixels)
        assert self.classifier is not None
        return self.classifier(x.mean(dim=(2, 3)))
