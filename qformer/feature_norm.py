"""The trainable norm between frozen image encoders and the bridge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn


class Tower(Protocol):
    """What `FeatureNorm` asks of an encoder."""

    @property
    def width(self) -> int: ...  # noqa: D102
    @property
    def num_tokens(self) -> int: ...  # noqa: D102
    @property
    def grid(self) -> tuple[int, int] | None: ...  # noqa: D102
    @property
    def has_positions(self) -> bool: ...  # noqa: D102


class FeatureNorm(nn.Module):
    """BLIP-2's `ln_vision` (arXiv 2301.12597), for one tower or several set side by side as tokens.

    Each tower's features pass an fp32 LayerNorm of their own, for the towers themselves end without one. A tower
    narrower than the widest gets a linear layer up to its width. A tower that does not distinguish places gets fixed
    2-D sine-cosine positions added. Each norm's epsilon is its encoder's `norm_eps`, 1e-6 if it names none.

    Attributes:
        width: channels of what comes out.
        num_tokens: tokens of all towers together.
    """

    def __init__(self, encoders: Sequence[Tower]):
        super().__init__()
        self.width = max(encoder.width for encoder in encoders)
        self.num_tokens = sum(encoder.num_tokens for encoder in encoders)
        self.norms = nn.ModuleList(
            nn.LayerNorm(encoder.width, eps=getattr(encoder, "norm_eps", 1e-6)) for encoder in encoders
        )
        self.widen = nn.ModuleList(
            nn.Identity() if encoder.width == self.width else nn.Linear(encoder.width, self.width)
            for encoder in encoders
        )
        self.positions: list[str | None] = []
        for index, encoder in enumerate(encoders):
            if encoder.has_positions:
                self.positions.append(None)
                continue
            if encoder.grid is None:
                raise ValueError(f"encoder {index} has neither positions nor a grid to make them from")
            # fixed, so made again rather than saved
            self.register_buffer(f"positions_{index}", _grid_positions(encoder.grid, self.width), persistent=False)
            self.positions.append(f"positions_{index}")

    @torch.no_grad()
    def standardise(self, features: Sequence[Tensor]) -> None:
        """Set weight and bias so that over these features every channel has mean 0 and variance 1.

        A fresh bridge looks at all patches alike. What all pictures have in common, such as the mean of channels that
        end in a ReLU, would drown what distinguishes them; started like this, it does not.

        Args:
            features: of some hundred pictures, one [B, P_i, D_i] a tower.
        """
        for x, norm in zip(features, self.norms, strict=True):
            assert isinstance(norm, nn.LayerNorm)
            normed = nn.functional.layer_norm(x.float(), norm.normalized_shape, eps=norm.eps).flatten(0, 1)  # [N, D_i]
            deviation = normed.std(dim=0).clamp_min(1e-3)  # a channel that never fires stays small
            norm.weight.copy_(1 / deviation)
            norm.bias.copy_(-normed.mean(dim=0) / deviation)

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """One [B, P_i, D_i] a tower, of any float dtype → [B, sum of P_i, width] in fp32."""
        towers = []
        for x, norm, widen, name in zip(features, self.norms, self.widen, self.positions, strict=True):
            x = widen(norm(x.float()))  # [B, P_i, D_i] → [B, P_i, width]
            towers.append(x if name is None else x + getattr(self, name))
        return torch.cat(towers, dim=1)


def _grid_positions(grid: tuple[int, int], width: int) -> Tensor:
    """Fixed 2-D sine-cosine positions [rows x columns, width]: half of the channels say the row, half the column.

    Frequencies fall from 1 to 1/10000 as in arXiv 1706.03762, section 3.5, used per axis as in arXiv 2104.02057.
    Channels that are left over if `width` is no multiple of 4 stay zero.
    """
    rows, columns = grid
    count = width // 4
    frequencies = 10_000.0 ** -(torch.arange(count, dtype=torch.float32) / max(count, 1))  # [width / 4]
    angles_y = torch.arange(rows, dtype=torch.float32)[:, None] * frequencies  # [rows, width / 4]
    angles_x = torch.arange(columns, dtype=torch.float32)[:, None] * frequencies
    row = torch.cat([angles_y.sin(), angles_y.cos()], dim=1)[:, None].expand(
        -1, columns, -1
    )  # [rows, columns, width / 2]
    column = torch.cat([angles_x.sin(), angles_x.cos()], dim=1)[None].expand(rows, -1, -1)
    positions = torch.cat([row, column], dim=2).flatten(0, 1)  # [rows · columns, 4 · (width / 4)]
    return nn.functional.pad(positions, (0, width - positions.shape[1]))
