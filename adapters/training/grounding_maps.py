"""What the grounding head is trained on, encoded once: maps of pictures on disk, and hidden states of phrases.

Encoding that is stopped goes on at the next picture.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from adapters.data.image_ref import ImageRef
from adapters.data.images import open_image
from adapters.loading.grounding_head import PhraseEncoder, TowerMaps
from qformer.atomic import whole_file
from qformer.errors import UserError

_TOGETHER = 8  # pictures, or phrases times 16, that are encoded at a time


class MapStore:
    """The maps of pictures in float16 on disk, in the order of the pictures.

    Args:
        folder: where they lie; an earlier run's are taken if they are of the same pictures and tower.
        maps: the tower.
        images: the pictures, each once.

    Raises:
        UserError: the folder holds maps of other pictures or of another tower, or cannot be written.
    """

    def __init__(self, folder: Path, maps: TowerMaps, images: Sequence[ImageRef]) -> None:
        self.folder, self.maps, self.images = folder, maps, images
        described = {
            "tower": maps.encoder.identity(),
            "layers": list(maps.layers),
            "pictures": [image.digest() for image in images],
        }
        try:
            folder.mkdir(parents=True, exist_ok=True)
            facts = folder / "maps.json"
            if facts.is_file() and json.loads(facts.read_text(encoding="utf-8")) != described:
                raise UserError(f"{folder}: it holds maps of other pictures or of another tower; name another --out")
            facts.write_text(json.dumps(described), encoding="utf-8")
            shapes = [found.shape[1:] for found in maps(maps.encoder.preprocess([open_image(images[0])]))]
            self.parts = [
                self._opened(f"layer-{layer}", (len(images), *shape))
                for layer, shape in zip(maps.layers, shapes, strict=True)
            ]
        except OSError as error:
            raise UserError(f"{folder}: cannot be written ({error}); free space or name another --out") from error

    def _opened(self, name: str, shape: tuple[int, ...]) -> np.memmap:
        path = self.folder / f"{name}.npy"
        mode = "r+" if path.is_file() else "w+"
        return np.lib.format.open_memmap(path, mode=mode, dtype=np.float16, shape=shape if mode == "w+" else None)

    def fill(self, on_progress: Callable[[int, int], None] | None = None) -> None:
        """Encode what is not there yet."""
        counter = self.folder / "done"
        done = int(counter.read_text()) if counter.is_file() else 0
        while done < len(self.images):
            batch = self.images[done : done + _TOGETHER]
            found = self.maps(self.maps.encoder.preprocess([open_image(image) for image in batch]))
            for part, new in zip(self.parts, found, strict=True):
                part[done : done + len(batch)] = new.half().cpu().numpy()
            done += len(batch)
            if done % 128 == 0 or done == len(self.images):
                for part in self.parts:
                    part.flush()
                with whole_file(counter) as partial:
                    partial.write_text(str(done))
                if on_progress is not None:
                    on_progress(done, len(self.images))

    def load(self, rows: Sequence[int]) -> list[Tensor]:
        """The maps of some pictures in float32, each [I, C, R, R]."""
        return [torch.from_numpy(np.asarray(part[list(rows)], dtype=np.float32)) for part in self.parts]


def encode_phrases(encoder: PhraseEncoder, phrases: Sequence[str]) -> tuple[Tensor, Tensor]:
    """Hidden states [U, T, W] in float16 and mask [U, T] of all phrases; each comes out as it would by itself."""
    order = sorted(range(len(phrases)), key=lambda row: len(phrases[row]))  # little padding
    parts: list[tuple[list[int], Tensor, Tensor]] = []
    for start in range(0, len(order), 16 * _TOGETHER):
        rows = order[start : start + 16 * _TOGETHER]
        hidden, mask = encoder([phrases[row] for row in rows])
        parts.append((rows, hidden.half().cpu(), mask.cpu()))
    longest = max(mask.shape[1] for _, _, mask in parts)
    hidden = torch.zeros(len(phrases), longest, encoder.width, dtype=torch.float16)
    mask = torch.zeros(len(phrases), longest, dtype=torch.bool)
    for rows, states, present in parts:
        hidden[rows, : states.shape[1]], mask[rows, : states.shape[1]] = states, present
    return hidden, mask
