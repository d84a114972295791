"""The memory a recipe's training needs, calculated: no weights, no hub, no GPU.

Weights are counted on a skeleton of the model (exact). Gradients and AdamW's two moments take 4 and 8 bytes for each
trainable parameter (exact). Activations come from a run on fake tensors (see `adapters.memory.activations`).
What the libraries themselves hold is a fixed figure, and the allocator's fragments are left to the headroom of a tenth.

How far off: on a GPU it was not measured. On a CPU a process keeps much of what it frees, so its anonymous memory is
larger: a run of easy_vqa_cpu with a question a row, 1.2 GiB by this, measured 1.7 GiB in training and 2.1 GiB in all.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from operator import mul
from typing import Any, cast

import torch

from adapters.loading.reader import answers_read
from adapters.memory.activations import MicroBatch, measure_activations
from adapters.memory.meta_model import build_meta_model
from adapters.memory.summary import ModuleSummary, summarise_modules
from adapters.recipe import Recipe, load_recipe
from qformer.image_encoders import ImageEncoder
from qformer.lora import undo_speed_up
from qformer.precision import default_compute_dtype

GIB = 2**30
HEADROOM = 1.1
GPU_SIZES = (6, 8, 10, 12, 16, 24, 32, 40, 48, 80, 141)  # GB on the label of what is sold
# What a process holds before it loads a model: CUDA's context and kernels on a GPU (0.4 to 0.7 GiB by the card), the
# libraries' own anonymous memory on a CPU (measured with torch, transformers, PEFT and bitsandbytes imported).
RUNTIME = {"cuda": int(0.6 * GIB), "cpu": int(0.35 * GIB)}

# bytes a parameter of both moments; in 8 bits each, with a float32 scale for 256 of them
_MOMENTS = {"adamw": 8, "paged_adamw_8bit": 2 + 2 * 4 / 256}

_WORDS = {
    "weights": "frozen and trained weights",
    "gradients": "gradients",
    "optimiser": "AdamW's moments",
    "activations": "activations",
    "dequantised": "largest layer, dequantised",
    "features": "image features",
    "runtime": "libraries",
}


def estimate_memory(recipe: Recipe, *, device: str | None = None) -> dict[str, Any]:
    """Calculate what training by a recipe needs.

    Args:
        recipe: any recipe whose frozen models are on this machine, or are those of a shipped recipe.
        device: "cuda" or "cpu", to calculate for; left out, "cpu" if every model comes in a packaged wheel.

    Returns:
        JSON-able: `device`, `compute_dtype`, `micro_batch` (shape), `modules` (as `doctor` lists them), `parameters`
        (`trainable` by module, `frozen`, `quantized`, `llm_linear`), `bytes` by part, `total_gib`, `fits` (the
        smallest usual GPU with a tenth to spare, or None), `picture_bytes` (a training picture's features in
        the disk cache, all its views).

    Raises:
        UserError: the configuration of a model is not to be had, or parts do not fit.
    """
    device = device or _natural_device(recipe)
    on_gpu = device != "cpu"
    compute = torch.bfloat16 if on_gpu else default_compute_dtype("cpu", four_bit=recipe.language.quantize == "nf4")
    tower_dtype = torch.float16 if on_gpu else torch.float32
    model = build_meta_model(recipe, compute_dtype=compute, tower_dtype=tower_dtype)
    parts = summarise_modules(model)
    vectors = model.num_queries + answers_read(recipe.bridge.reader)
    shape = MicroBatch.of(recipe.train.micro_batch_tokens, vectors)
    towers = cast("list[ImageEncoder]", list(model.encoders))
    values = [encoder.num_tokens * encoder.width for encoder in towers]  # in a picture's features
    picture = sum(values)
    kept = [4 if tower.features == "float32" else 2 for tower in recipe.vision.towers]  # bytes of a value on disk
    trainable = {part.name: part.parameters for part in parts if part.trainable}
    linear = [part for part in parts if part.name == "LLM linear layers"]
    quantized = sum(part.parameters for part in linear if part.quantized)
    needed = {
        "weights": sum(part.bytes for part in parts),
        "gradients": 4 * sum(trainable.values()),
        "optimiser": round(_MOMENTS[recipe.train.optimiser] * sum(trainable.values())),
        "activations": _activations(recipe, shape, compute, tower_dtype, sum(trainable.values()), on_gpu),
        "dequantised": _largest_four_bit(model) * compute.itemsize,
        "features": 4 * shape.rows * picture,  # float32 on the device
        "runtime": RUNTIME["cuda" if on_gpu else "cpu"],
    }
    total = sum(needed.values())
    return {
        "device": device,
        "compute_dtype": str(compute).removeprefix("torch."),
        "micro_batch": {**asdict(shape), "pictures": shape.rows},
        "gradient_checkpointing": recipe.language.gradient_checkpointing,
        "modules": [asdict(part) for part in parts],
        "parameters": {
            "trainable": {**trainable, "total": sum(trainable.values())},
            "frozen": sum(part.parameters for part in parts if not part.trainable),
            "quantized": quantized,
            "llm_linear": sum(part.parameters for part in linear),
        },
        "bytes": needed,
        "total_gib": total / GIB,
        "fits": next((size for size in GPU_SIZES if total * HEADROOM <= size * GIB), None) if on_gpu else None,
        "picture_bytes": sum(map(mul, values, kept)) * recipe.data.views,
    }


def estimate_named(name: str, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """`estimate_memory` of a recipe given by its file or shipped name, with `key=value` overrides."""
    return estimate_memory(load_recipe(name, overrides))


def describe_estimate(found: Mapping[str, Any]) -> str:
    """An estimate as a table to read."""
    parameters, shape = found["parameters"], found["micro_batch"]
    checkpointing = "with" if found["gradient_checkpointing"] else "without"
    lines = [f"Calculated for {found['device']}, computing in {found['compute_dtype']}", ""]
    lines += parts_table([ModuleSummary(**module) for module in found["modules"]])
    trainable = ", ".join(f"{name} {count:,}" for name, count in parameters["trainable"].items() if name != "total")
    bits = 8 if any(module["dtype"] == "int8" for module in found["modules"]) else 4
    share = parameters["quantized"] / parameters["llm_linear"] if parameters["llm_linear"] else 0.0
    lines += [
        "",
        f"trainable: {parameters['trainable']['total']:,} ({trainable})",
        f"in {bits}-bit:  {parameters['quantized']:,} of the {parameters['llm_linear']:,} in the LLM's linear layers"
        f" ({100 * share:.1f} %)",
        "",
        f"A micro-batch of {shape['rows']} rows of {shape['row_tokens']} tokens, a picture each, {checkpointing}"
        " gradient checkpointing:",
    ]
    lines += [f"  {_WORDS[name]:<28}{size / GIB:>8.2f} GiB" for name, size in found["bytes"].items()]
    lines.append(f"  {'all together':<28}{found['total_gib']:>8.2f} GiB")
    if found["fits"]:
        lines.append(f"fits a GPU of {found['fits']} GB with a tenth to spare")
    elif found["device"] != "cpu":
        lines.append(
            "fits no single GPU; try --set train.micro_batch_tokens=512 or language.gradient_checkpointing=true"
        )
    else:
        lines.append("a process on a CPU may hold 1.7 times as much, for it keeps what it frees")
    lines.append(f"the feature cache on disk takes {found['picture_bytes'] / 2**20:.2f} MiB a training picture")
    return "\n".join(lines)


def parts_table(parts: list[ModuleSummary]) -> list[str]:
    """One line a part: name, dtype, in 4 or 8 bits or not, trained or frozen, parameters, MiB."""
    lines = [f"{'module':<26}{'dtype':<10}{'packed':<8}{'state':<9}{'parameters':>15}{'MiB':>11}"]
    lines += [
        f"{part.name:<26}{part.dtype:<10}{'yes' if part.quantized else 'no':<8}"
        f"{'trained' if part.trainable else 'frozen':<9}{part.parameters:>15,}{part.bytes / 2**20:>11,.1f}"
        for part in parts
    ]
    return lines


def _natural_device(recipe: Recipe) -> str:
    sources = [recipe.language.source, *(tower.source for tower in recipe.vision.towers)]
    return "cpu" if all(source.startswith("pypi:") for source in sources) else "cuda"


def _activations(
    recipe: Recipe, shape: MicroBatch, compute: torch.dtype, tower: torch.dtype, trainable: int, on_gpu: bool
) -> int:
    """The larger of a micro-batch's activations and what AdamW's step holds while there are none."""
    if on_gpu:  # a GPU's fused attention drops inside the kernel; the CPU's would fall back to one that keeps scores
        recipe = recipe.model_copy(
            update={"bridge": recipe.bridge.model_copy(update={"dropout": 0.0, "patch_dropout": 0.0})}
        )
    attention = "sdpa" if on_gpu else "eager"
    model = build_meta_model(recipe, compute_dtype=compute, tower_dtype=tower, quantized=False, attention=attention)
    if on_gpu:
        undo_speed_up(model)
    return max(measure_activations(model, shape), 4 * trainable)


def _largest_four_bit(model: torch.nn.Module) -> int:
    """Parameters of the largest 4-bit layer: a layer's weight is whole again while it is used."""
    sizes = [
        module.in_features * module.out_features
        for module in model.modules()
        if type(module).__name__ == "Linear4bit" and isinstance(module, torch.nn.Linear)
    ]
    return max(sizes, default=0)
