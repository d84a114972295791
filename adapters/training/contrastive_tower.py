"""A CLIP of your own: the last blocks of a convolutional tower, trained contrastively on pictures with captions.

CLIP (arXiv 2103.00020) if no CLIP weights can be had. The tower's earlier blocks stay as published, so their output
is computed once and kept; the text tower is a frozen sentence encoder with a trained projection, so that little data
suffices. The result is a small difference to the published weights (`qformer.weight_delta`), frozen from then on.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from adapters.data.caption_batches import CaptionedPicture, draw_batch, group_captions
from adapters.data.reading import read_data
from adapters.data.views import all_views
from adapters.evaluation.retrieval import recalls
from adapters.features.cache import FeatureCache
from adapters.training.run_data import fill_caches
from qformer.attention import MultiHeadAttention
from qformer.errors import UserError
from qformer.image_encoders import EfficientNetLiteEncoder
from qformer.objectives import EMBEDDING_WIDTH, contrastive_loss
from qformer.precision import default_compute_dtype
from qformer.sources import resolve
from qformer.vision_loading import load_image_encoder
from qformer.weight_delta import save_weight_delta


class AttentionPool(nn.Module):
    """The mean of all places looks at them once more, as in CLIP's convolutional towers (section 2.4).

    Args:
        width: D, of the features.
        heads: of the attention, which divide D.
        compute_dtype: of the attention; bfloat16 runs it under autocast. What is compared is float32.
    """

    def __init__(self, width: int, heads: int = 8, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.compute_dtype = compute_dtype
        self.norm = nn.LayerNorm(width)
        self.attention = MultiHeadAttention(width, heads)
        self.project = nn.Linear(width, EMBEDDING_WIDTH)

    def forward(self, places: Tensor) -> Tensor:
        """Features [B, P, D] to unit vectors [B, E]."""
        places = self.norm(places)
        mean = places.mean(dim=1, keepdim=True)
        in_bfloat16 = self.compute_dtype == torch.bfloat16
        with torch.autocast(places.device.type, dtype=torch.bfloat16, enabled=in_bfloat16):
            seen = self.attention(mean, places).hidden  # [B, 1, D]
        return F.normalize(self.project((mean + seen.float())[:, 0]), dim=-1)


class SentenceEncoder:
    """A frozen BERT-family sentence encoder: the mean over tokens of its last hidden states.

    Args:
        source: as `qformer.sources.resolve` takes it.
        offline: take its weights from the cache only.
    """

    def __init__(self, source: str, *, offline: bool = False) -> None:
        from transformers import AutoModel, AutoTokenizer

        folder = resolve(source, offline=offline)
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder))
        self.model = AutoModel.from_pretrained(str(folder), add_pooling_layer=False).eval().requires_grad_(False)
        self.width = int(self.model.config.hidden_size)

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """Texts to vectors [T, D]; those of like length are computed together."""
        out = torch.empty(len(texts), self.width)
        order = sorted(range(len(texts)), key=lambda index: len(texts[index]))
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            tokens = self.tokenizer(
                [texts[index] for index in chosen], padding=True, truncation=True, max_length=64, return_tensors="pt"
            )
            hidden = self.model(**tokens).last_hidden_state  # [b, L, D]
            mask = tokens["attention_mask"].unsqueeze(-1)
            out[chosen] = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
        return out


def train_tower(
    train: str | Path,
    val: str | Path,
    out: Path | str,
    *,
    source: str = "pypi:efficientnet-lite2",
    text_source: str = "pypi:minilm-l6",
    start: int = 5,
    epochs: int = 12,
    batch_size: int = 128,
    views: int = 5,
    learning_rate: float = 5e-4,
    seed: int = 0,
    terms: str | None = None,
    offline: bool = False,
    quiet: bool = False,
) -> dict[str, float]:
    """Train a tower's last blocks against captions and write the difference of the best epoch.

    Args:
        train: a file of captions.
        val: a file of captions to choose the epoch by.
        out: the folder of the difference.
        source: an EfficientNet-Lite.
        text_source: a BERT-family sentence encoder.
        start: the last hidden state that stays as published; what comes after it is trained.
        epochs: passes over the pictures, one caption of each a pass; targets are smoothed as in BLIP-2's ITC.
        batch_size: pictures a step; each is compared with all others.
        views: of each training picture, as `adapters.data.views` cuts them; 1 is the picture alone.
        learning_rate: of the pool and the projection; the tower's blocks learn at a fifth of it.
        seed: of weights and order.
        terms: of the pictures; kept with the difference.
        offline: take frozen weights from the cache only.
        quiet: print nothing.

    Returns:
        The best epoch's recalls on `val`, and its number.

    Raises:
        UserError: the tower is another kind, or data cannot be read.
    """
    if start < 0 or epochs < 1 or views < 1:
        raise UserError(
            f"start is {start}, epochs {epochs} and views {views}: count hidden states from 0, and train for one epoch"
            " and in one view at least"
        )
    trunk, whole = (load_image_encoder(source, layer=layer, offline=offline) for layer in (start, -1))
    if not isinstance(whole, EfficientNetLiteEncoder):
        raise UserError(f"{source}: {whole.architecture} cannot be trained further here; take an EfficientNet-Lite")
    published = load_image_encoder(source, layer=-1, offline=offline)
    torch.manual_seed(seed)
    pictures = group_captions(read_data(train, task="caption", offline=offline).examples)
    held_out = group_captions(read_data(val, task="caption", offline=offline).examples)
    for data, part in ((train, pictures), (val, held_out)):
        if len(part) < 2:
            raise UserError(
                f"{data}: {len(part)} pictures with English captions, which the text encoder reads; telling pictures"
                " apart needs two"
            )
    if start >= whole.layer:
        raise UserError(f"start is {start}, and {source} has the hidden states 0 to {whole.layer}: take an earlier one")
    cache = FeatureCache(trunk)
    images = [*all_views([picture.image for picture in pictures], views), *(picture.image for picture in held_out)]
    fill_caches([cache], images, quiet=quiet)
    sentences = SentenceEncoder(text_source, offline=offline)
    vectors = {text: row for part in (pictures, held_out) for text, row in _embedded(sentences, part)}
    tail = whole.tail(start).requires_grad_(True)
    pool = AttentionPool(whole.width, compute_dtype=default_compute_dtype("cpu", four_bit=False))
    if not quiet:
        print(f"the pool computes in {str(pool.compute_dtype).removeprefix('torch.')}", file=sys.stderr)
    project = nn.Sequential(
        nn.Linear(sentences.width, sentences.width), nn.GELU(), nn.Linear(sentences.width, EMBEDDING_WIDTH)
    )
    scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
    heads = [*pool.parameters(), *project.parameters(), scale]
    groups = [(p, learning_rate / 5) for p in tail.parameters()] + [(p, learning_rate) for p in heads]
    optimiser = torch.optim.AdamW(  # no decay on biases, norms and the scale, as CLIP
        [{"params": [p], "peak": peak, "weight_decay": 0.05 if p.dim() > 1 else 0.0} for p, peak in groups],
        lr=learning_rate,
    )

    def images_of(batch: Sequence[CaptionedPicture]) -> Tensor:
        """Unit vectors [B, E]."""
        rows = trunk.output_shape()[0]
        maps = cache.load([picture.image for picture in batch]).float().transpose(1, 2).unflatten(2, (rows, rows))
        features = tail(maps.contiguous(memory_format=torch.channels_last))  # [B, C, H, W]
        return pool(features.flatten(2).transpose(1, 2))

    def texts_of(texts: Sequence[str]) -> Tensor:
        return F.normalize(project(torch.stack([vectors[text] for text in texts])), dim=-1)

    @torch.no_grad()
    def recall() -> dict[str, float]:
        images = torch.cat([images_of(held_out[i : i + 64]) for i in range(0, len(held_out), 64)])
        owners = [row for row, picture in enumerate(held_out) for _ in picture.captions]
        return recalls(images @ texts_of([t for p in held_out for t in p.captions]).T, owners)

    size = min(batch_size, len(pictures))
    steps = len(pictures) // size
    best: dict[str, float] = {}
    for epoch in range(epochs):
        rng = random.Random(f"{seed}:{epoch}")
        order = rng.sample(pictures, len(pictures))
        summed, began = 0.0, time.monotonic()
        for step in range(steps):
            batch = draw_batch(order[step * size : (step + 1) * size], 1, rng, views=views)
            done = (epoch * steps + step) / (epochs * steps)
            for group in optimiser.param_groups:
                group["lr"] = group["peak"] * min(1.0, done * 20 + 0.05) * 0.5 * (1 + math.cos(math.pi * done))
            texts = texts_of([text for _, (text,) in batch])
            numbers = torch.arange(len(batch))
            loss = contrastive_loss(
                images_of([picture for picture, _ in batch]) @ texts.T * scale.exp().clamp(max=100), numbers, numbers
            )
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([*tail.parameters(), *heads], 1.0)
            optimiser.step()
            summed += loss.item()
        found = recall()
        mean = sum(found.values()) / len(found)
        if not quiet:
            print(
                f"epoch {epoch + 1}/{epochs} · loss {summed / steps:.3f} · i2t R@1 {found['i2t_R@1']:.3f}"
                f" · t2i R@1 {found['t2i_R@1']:.3f} · {time.monotonic() - began:.0f} s",
                file=sys.stderr,
                flush=True,
            )
        if mean > best.get("mean_recall", -1.0):
            best = {**found, "mean_recall": mean, "epoch": epoch + 1}
            facts: dict[str, Any] = {
                "base": published.weights,
                "source": source,
                "trained": f"hidden states after {start}, contrastively with {Path(train).name} against {text_source}",
                "metrics": best,
                "terms": terms,
            }
            save_weight_delta(Path(out), whole.model, published.model, facts)
    return best


def _embedded(sentences: SentenceEncoder, pictures: Sequence[CaptionedPicture]) -> list[tuple[str, Tensor]]:
    texts = list(dict.fromkeys(text for picture in pictures for text in picture.captions))
    return list(zip(texts, sentences(texts), strict=True))
