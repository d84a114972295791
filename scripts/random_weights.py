"""Random weights of published shapes, built a shard at a time, and small ones: what is trained without a hub."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

_BLOCK = 2**24  # random numbers that tensors are cut from
_STD = 0.02  # as transformers draws weights
_SHARD = "2GB"
WORDS = ("what", "which", "is", "the", "colour", "of", "a", "red", "green", "blue", "yes", "no")
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def model_config(values: Mapping[str, Any]) -> Any:
    """transformers' configuration of published shapes, with the special tokens of `make_tokenizer`."""
    from transformers import CONFIG_MAPPING

    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
    return CONFIG_MAPPING[values["model_type"]](**{k: v for k, v in {**special, **values}.items() if k != "model_type"})


def folder_config(folder: Path) -> Any:
    """transformers' configuration in a folder.

    Raises:
        UserError: transformers knows no such model.
    """
    from transformers import AutoConfig

    from qformer.errors import UserError, first_line

    try:
        return AutoConfig.from_pretrained(str(folder))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: no model of transformers is described there ({first_line(error)})") from error


def whole_config(vision: Any, language: Any) -> Any:
    """The configuration of a BLIP-2 or InstructBLIP of published shapes; its Q-Former is transformers' default."""
    import transformers as tf

    instructs = vision["model_type"].startswith("instructblip")
    family: Any = tf.InstructBlipConfig if instructs else tf.Blip2Config
    former: Any = tf.InstructBlipQFormerConfig if instructs else tf.Blip2QFormerConfig
    seen = model_config(vision)
    return family(
        vision_config=seen,
        qformer_config=former(encoder_hidden_size=seen.hidden_size),
        text_config=model_config(language),
        num_query_tokens=32,
        image_token_index=len(WORDS) + 20,
    )


def build(config: Any, folder: Path) -> int:
    """Random weights of a configuration in a folder, as transformers saves them; returns how many numbers.

    One shard is in memory at a time.
    """
    import torch
    import transformers as tf
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    from qformer.published import FAMILY
    from qformer.shards import LazyTensor, write_shards

    folder.mkdir(parents=True, exist_ok=True)
    kind = config.model_type
    classes: dict[str, Any] = {
        "clip_vision_model": tf.CLIPVisionModel,
        "siglip_vision_model": tf.SiglipVisionModel,
        "dinov2": tf.Dinov2Model,
        "bert": tf.BertModel,
        "blip-2": tf.Blip2ForConditionalGeneration,
        "instructblip": tf.InstructBlipForConditionalGeneration,
    }
    loader: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with torch.device("meta"):
        model = classes[kind]._from_config(config) if kind in classes else loader.from_config(config)
    numbers = torch.randn(_BLOCK, generator=torch.Generator().manual_seed(0)).mul_(_STD).half()
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    saved = dict(model.named_parameters()) | _untied(model, config)
    for name, parameter in saved.items():
        begins = int(torch.randint(_BLOCK, (), generator=generator))
        tensors[name] = LazyTensor(tuple(parameter.shape), torch.float16, _cut(numbers, begins, name, parameter.shape))
    write_shards(folder, tensors, _SHARD if kind != "bert" else "100GB")
    config.architectures = [type(model).__name__]
    config.dtype = torch.float16
    config.save_pretrained(folder)
    if kind == "bert" or (kind in FAMILY and kind == "instructblip"):
        save_bert_tokenizer(folder if kind == "bert" else folder / "qformer_tokenizer")
    if kind not in classes or kind in FAMILY:
        text = config.text_config if kind in FAMILY else config
        chats = kind not in FAMILY and text.model_type not in ("opt", "t5")
        make_tokenizer(text, chat=chats).save_pretrained(folder)
    return sum(parameter.numel() for parameter in saved.values())


def _untied(model: Any, config: Any) -> dict[str, Any]:
    """The head of an LLM whose checkpoint holds one of its own, though transformers builds it tied."""
    text = getattr(config, "text_config", config)
    if getattr(text, "model_type", "") == "t5" and getattr(text, "tie_word_embeddings", True) is False:
        inner = "language_model." if text is not config else ""
        head = (model.language_model if inner else model).lm_head.weight
        return {f"{inner}lm_head.weight": head}
    return {}


def _cut(numbers: Tensor, begins: int, name: str, shape: Iterable[int]) -> Callable[[], Tensor]:
    """What gives a tensor: a scale of one for norms, none for biases, else a piece of the block, round and round."""
    import torch

    size = tuple(shape)
    count = int(torch.Size(size).numel())

    def read() -> Tensor:
        if len(size) == 1:
            fill = 1.0 if name.endswith("weight") else 0.0
            return torch.full(size, fill, dtype=torch.float16)
        rolled = torch.cat([numbers[begins:], numbers[:begins]])
        return rolled.repeat(-(-count // len(rolled)))[:count].reshape(size).clone()

    return read


def make_tokenizer(config: Any, *, chat: bool) -> Any:
    """A tokenizer of a few whole words, with the special tokens that a configuration names."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = {config.pad_token_id or 0: "<pad>", _first(config.eos_token_id): "</s>"}
    vocabulary: dict[str, int] = {token: number for number, token in special.items()}
    free = (number for number in range(config.vocab_size) if number not in special)
    for word in ("<unk>", "<|im_start|>", "<|im_end|>", *WORDS):
        vocabulary[word] = next(free)
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<|im_end|>" if chat else "</s>",
        unk_token="<unk>",
        additional_special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    if chat:
        made.chat_template = _CHAT
    return made


def _first(ids: int | Sequence[int]) -> int:
    return ids if isinstance(ids, int) else ids[0]


def save_bert_tokenizer(folder: Path) -> None:
    """A BERT tokenizer of a few whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ("[PAD]", "[unused0]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS)
    tokenizer = Tokenizer(models.WordLevel({word: place for place, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)


def make_clip(folder: Path, *, wide: int, layers: int) -> Path:
    """A CLIP-shaped tower of random weights: 64 pixels, patches of 8."""
    import torch
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    config = CLIPVisionConfig(
        hidden_size=wide, intermediate_size=4 * wide, num_hidden_layers=layers, num_attention_heads=wide // 64,
        image_size=64, patch_size=8,
    )  # fmt: skip
    CLIPVisionModel(config).save_pretrained(folder)
    return folder


def make_language(folder: Path) -> Path:
    """A random LLM with two layers and a tokenizer of single characters: what a CPU trains in seconds."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    special = ["<pad>", "</s>", "<unk>"]
    vocabulary = {token: place for place, token in enumerate([*special, *map(chr, range(32, 127)), "\n"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=128, pad_token_id=0, eos_token_id=1, bos_token_id=1, initializer_range=0.2, **sizes)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder
