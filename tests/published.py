"""Tiny random BLIP-2 and InstructBLIP checkpoints as transformers saves them, and transformers' own answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers as tf
from PIL import Image
from references import randomise
from tiny import make_tokenizer, save_tiny_bert, tiny_language_model

QUERIES = 3
SIDE = 32
VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": SIDE,
    "patch_size": 16,
    "layer_norm_eps": 1e-5,
}
QFORMER = {
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "vocab_size": 40,
    "max_position_embeddings": 48,
}
KINDS = ("blip2-opt", "blip2-llama", "blip2-t5", "instructblip-llama", "instructblip-t5")


def tiny_published(kind: str) -> Any:
    """A random model: "blip2-LLM", "instructblip-LLM" or "blip2-retrieval"."""
    family, _, llm = kind.partition("-")
    common: dict[str, Any] = {"num_query_tokens": QUERIES, "image_token_index": 101}
    if family == "instructblip":
        made: Any = tf.InstructBlipForConditionalGeneration
        config: Any = tf.InstructBlipConfig(
            vision_config=tf.InstructBlipVisionConfig(**VISION),
            qformer_config=tf.InstructBlipQFormerConfig(**QFORMER),
            text_config=tiny_language_model(llm).config,
            **common,
        )
    else:
        retrieval = llm == "retrieval"
        made = tf.Blip2ForImageTextRetrieval if retrieval else tf.Blip2ForConditionalGeneration
        config = tf.Blip2Config(
            vision_config=tf.Blip2VisionConfig(**VISION),
            qformer_config=tf.Blip2QFormerConfig(**QFORMER, use_qformer_text_input=retrieval),
            text_config=tiny_language_model("opt" if retrieval else llm).config,
            **(common | ({"image_token_index": None} if retrieval else {})),
        )
    return randomise(made(config), seed=5)


def processor_for(kind: str, folder: Path) -> Any:
    """Its processor; the second tokenizer of an InstructBLIP is a tiny BERT's, which also reads for retrieval."""
    side = {"height": SIDE, "width": SIDE}
    images = tf.models.blip.image_processing_pil_blip.BlipImageProcessorPil(size=side)
    words = tf.AutoTokenizer.from_pretrained(save_tiny_bert(folder.with_name(folder.name + "-bert")))
    if kind == "blip2-retrieval":
        return tf.Blip2Processor(images, words)
    tokenizer = make_tokenizer(chat=False)
    if kind.startswith("instructblip"):
        return tf.InstructBlipProcessor(images, tokenizer, words, num_query_tokens=QUERIES)
    return tf.Blip2Processor(images, tokenizer, num_query_tokens=QUERIES)


def save_published(folder: Path, kind: str, *, shards: str = "20KB", old: bool = False) -> Any:
    """Save a random model with its processor in shards, and hand it back.

    Args:
        folder: to be made.
        kind: as `tiny_published` takes it.
        shards: the largest, as transformers takes it.
        old: as hubs' older configurations are: neither the number of queries nor the image's token is said.
    """
    model = tiny_published(kind)
    model.save_pretrained(folder, max_shard_size=shards)
    processor_for(kind, folder).save_pretrained(folder)
    if old:
        path = folder / "config.json"
        values = json.loads(path.read_text())
        del values["num_query_tokens"], values["image_token_index"]
        path.write_text(json.dumps(values))
    return model


def draw_pictures(folder: Path, count: int = 3) -> list[Path]:
    """Noise of several sizes, so that every picture has features of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(7)
    paths = []
    for number in range(count):
        noise = torch.randint(0, 256, (30 + number, 44, 3), generator=generator, dtype=torch.uint8)
        paths.append(folder / f"{number}.png")
        Image.fromarray(noise.numpy()).save(paths[-1])
    return paths


def answers_of(
    model: Any, processor: Any, pictures: Sequence[Path], texts: Sequence[str], *, beams: int, most: int = 8
) -> list[list[int]]:
    """The tokens of transformers' `generate`, a batch at once, each row up to and with its end token."""
    causal = not model.config.text_config.is_encoder_decoder
    processor.tokenizer.padding_side = "left" if causal else "right"
    images = [Image.open(path).convert("RGB") for path in pictures]
    inputs = processor(images=images, text=list(texts), padding=True, return_tensors="pt")
    ids = model.generate(**inputs, num_beams=beams, max_new_tokens=most, do_sample=False)
    start = inputs["input_ids"].shape[1] if causal else 1
    end = model.config.text_config.eos_token_id
    rows = ids[:, start:].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]
