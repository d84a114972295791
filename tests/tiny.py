"""Makers of tiny models, tokenizers and data for the tests of every room: random weights, no network."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(*, chat: bool) -> PreTrainedTokenizerFast:
    """One token a byte-like character: every text can be written, nothing has to be learned."""
    specials = ["<pad>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
    alphabet = [chr(code) for code in range(32, 127)] + ["\n"]
    vocabulary = {token: index for index, token in enumerate(specials + alphabet)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>" if chat else "</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_language_model(kind: str) -> torch.nn.Module:
    """A random two-layer LLM, 64 wide: 4-bit layers need widths of 64 and multiples of 32."""
    torch.manual_seed(0)
    common = {"vocab_size": 128, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 1}
    llama = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,  # with the default's 0.02 no frozen head could ever be sure of a token
    }
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**common, **llama))
    if kind == "qwen2":
        return Qwen2ForCausalLM(Qwen2Config(**common, **llama))
    if kind == "opt":
        return OPTForCausalLM(
            OPTConfig(
                **common,
                hidden_size=64,
                ffn_dim=128,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=64,
            )
        )
    if kind == "t5":
        config = T5Config(
            **common, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0,
            feed_forward_proj="gated-gelu", tie_word_embeddings=False,
        )  # fmt: skip
        return T5ForConditionalGeneration(config)
    raise ValueError(kind)


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "black": (10, 10, 10)}


def draw_data(
    folder: Path, name: str = "data.jsonl", questions: tuple[str, ...] = ("what colour?", "is it red?")
) -> Path:
    """Squares of plain colour with questions about them, as a VQA data file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for colour, rgb in COLOURS.items():
        for shade in range(3):
            path = folder / f"{colour}{shade}.png"
            Image.new("RGB", (40, 40), tuple(min(255, part + 10 * shade) for part in rgb)).save(path)
            answers = {"what colour?": colour, "is it red?": "yes" if colour == "red" else "no"}
            rows += [{"image": path.name, "question": question, "answer": answers[question]} for question in questions]
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def tiny_values(vision: Path, language: Path, data: Path, **train: object) -> dict[str, object]:
    """A recipe, as a mapping, that trains in a second."""
    return {
        "data": {"train": str(data), "val_fraction": 0.25},
        "vision": {"towers": [{"source": str(vision)}]},
        "bridge": {"preset": "tiny", "num_queries": 3},
        "language": {"source": str(language), "quantize": "none", "lora": {"rank": 4, "alpha": 8}},
        "train": {
            "max_steps": 6,
            "batch_size": 6,
            "row_tokens": 160,
            "micro_batch_tokens": 320,
            "learning_rate": 1e-3,
            "warmup_steps": 2,
            "validate_every": 3,
            "log_every": 1,
            **train,
        },
    }


WORDS = ("a", "the", "square", "of", "is", "here", "picture", "colour", "plain", *COLOURS)


def save_tiny_bert(folder: Path) -> Path:
    """A random two-layer BERT as wide as the `tiny` bridge, with a tokenizer of a few whole words."""
    from tokenizers import processors
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]")
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def draw_captions(folder: Path, name: str = "captions.jsonl") -> Path:
    """The same squares of plain colour with two captions each."""
    draw_data(folder)
    rows = [
        {"image": f"{colour}{shade}.png", "captions": [f"a {colour} square", f"the colour of the square is {colour}"]}
        for colour in COLOURS
        for shade in range(3)
    ]
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def save_tiny_efficientnet(folder: Path, seed: int = 0) -> Path:
    """A random narrow EfficientNet-Lite at 33×33 pixels, as a folder that `load_image_encoder` reads."""
    from safetensors.torch import save_file

    from qformer.efficientnet import EfficientNetLite, EfficientNetLiteConfig

    torch.manual_seed(seed)
    config = EfficientNetLiteConfig(0.1, 0.5, 33, num_classes=5, stem_channels=8, head_channels=24)
    model = EfficientNetLite(config)
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):  # so that something is left of a picture after eight stages
            torch.nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    save_file(model.state_dict(), folder / "model.safetensors")
    return folder
