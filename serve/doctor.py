"""What this machine can do, and what a recipe's or an adapter's model consists of once it is loaded."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from adapters.catalogue import shipped_adapters, shipped_recipes
from qformer.errors import UserError
from qformer.sources import cache_root

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "gradio", "safetensors", "pillow")
GIB = 2**30


def examine(
    target: str | None = None, *, device: str | None = None, dtype: str | None = None, offline: bool = False
) -> dict[str, Any]:
    """Look at the machine, and load a model if one is named.

    Args:
        target: a recipe (file or shipped name) or an adapter (run, artefact or shipped name). Left out, nothing is
            loaded and nothing fetched.
        device: where to load it; a GPU if there is one.
        dtype: "float32" or "bfloat16" for the LLM's computation.
        offline: take frozen weights from the cache only.

    Returns:
        JSON-able: `python`, `platform`, `libraries`, `cpu` (name, cores, threads, compute_dtype, memory in GiB),
        `gpus` (name, memory, bf16), `four_bit` by device ("works" or what went wrong), `cache` (folder, free space),
        and of a target `model`: target, device, compute_dtype, `modules`, parameters and bytes in all, and
        `serving_bytes`, what its weights take when it answers (`serve.adapter.load_adapter`).

    Raises:
        UserError: there is no such target, or it cannot be loaded.
    """
    import torch

    from qformer.precision import default_compute_dtype

    gpus = [_gpu(index) for index in range(torch.cuda.device_count())]
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": {name: _version(name) for name in LIBRARIES},
        "cpu": {
            "name": _cpu_name(),
            "cores": os.cpu_count(),
            "threads": torch.get_num_threads(),
            "compute_dtype": str(default_compute_dtype("cpu")).removeprefix("torch."),
            **_memory(),
        },
        "gpus": gpus,
        "four_bit": {name: _four_bit(name) for name in ("cpu", *(["cuda"] if gpus else []))},
        "cache": _cache(),
    }
    if target is not None:
        found["model"] = _model(target, device=device, dtype=dtype, offline=offline)
    return found


def describe(found: Mapping[str, Any]) -> str:
    """What was found, as a table to read."""
    cpu, cache = found["cpu"], found["cache"]
    rows = [
        ("python", f"{found['python']} on {found['platform']}"),
        ("libraries", ", ".join(f"{name} {value or 'missing'}" for name, value in found["libraries"].items())),
        ("cpu", f"{cpu['name']}, {cpu['cores']} cores, torch uses {cpu['threads']}"),
        ("memory", f"{_gib(cpu['memory_gib'])}, {_gib(cpu['available_gib'])} available"),
        ("compute on the cpu", f"{cpu['compute_dtype']} (the faster of float32 and bfloat16 here)"),
    ]
    rows += [
        ("gpu", f"{gpu['name']}, {_gib(gpu['memory_gib'])}, bfloat16 {'yes' if gpu['bf16'] else 'no'}")
        for gpu in found["gpus"]
    ] or [("gpu", "none that torch can use")]
    rows += [(f"4-bit on the {name}", result) for name, result in found["four_bit"].items()]
    rows += [
        ("cache", f"{cache['folder']}, {_gib(cache['free_gib'])} free"),
        ("network", "not tried: models and data are fetched when a command first needs them"),
    ]
    lines = [f"{name:<20}{value}" for name, value in rows]
    if "model" in found:
        from adapters.memory.estimate import parts_table
        from adapters.memory.summary import ModuleSummary

        model = found["model"]
        lines += ["", f"{model['target']} on {model['device']}, computing in {model['compute_dtype']}"]
        lines += parts_table([ModuleSummary(**module) for module in model["modules"]])
        lines.append(
            f"in all {model['parameters']:,} parameters, {model['trainable']:,} of them trained,"
            f" {model['bytes'] / 2**20:,.1f} MiB"
        )
        if model["serving_bytes"] != model["bytes"]:
            lines.append(
                f"when it answers on a CPU, its 4-bit layers are unpacked: {model['serving_bytes'] / 2**20:,.1f} MiB"
            )
    return "\n".join(lines)


def _model(target: str, *, device: str | None, dtype: str | None, offline: bool) -> dict[str, Any]:
    from adapters.artefact.artefact import load_artefact
    from adapters.loading.assembly import assemble_named
    from adapters.loading.vision_side import default_device
    from adapters.memory.summary import summarise_modules
    from serve.adapter import ready_to_answer

    place = device or default_device()
    if _names_a_recipe(target):
        assembly = assemble_named(target, device=place, dtype=dtype, offline=offline)
    else:
        assembly, _ = load_artefact(target, device=place, dtype=dtype, offline=offline)
    parts = summarise_modules(assembly.model)
    ready_to_answer(assembly.model.language)
    return {
        "target": target,
        "device": place,
        "compute_dtype": str(assembly.model.language.compute_dtype).removeprefix("torch."),
        "modules": [asdict(part) for part in parts],
        "parameters": sum(part.parameters for part in parts),
        "trainable": sum(part.parameters for part in parts if part.trainable),
        "bytes": sum(part.bytes for part in parts),
        "serving_bytes": sum(part.bytes for part in summarise_modules(assembly.model)),
    }


def _names_a_recipe(target: str) -> bool:
    """Whether a target is a recipe's name or file; False for an adapter's."""
    path = Path(target)
    if path.is_dir() or target in shipped_adapters():
        return False
    if path.suffix in (".yaml", ".yml") or target in shipped_recipes():
        return True
    raise UserError(
        f"doctor {target}: neither a recipe nor an adapter; name a .yaml file, a folder, or one of"
        f" {', '.join([*shipped_recipes(), *shipped_adapters()])}"
    )


def _four_bit(device: str) -> str:
    """Quantise a small layer and multiply by it: "works", or what went wrong."""
    import torch

    try:
        from bitsandbytes.nn import Linear4bit

        torch.manual_seed(0)
        plain = torch.nn.Linear(64, 64, bias=False)
        layer = Linear4bit(64, 64, bias=False, compute_dtype=torch.float32, quant_type="nf4", compress_statistics=True)
        layer.load_state_dict(plain.state_dict())
        layer.to(device)
        inputs = torch.randn(8, 64)
        expected = plain(inputs)
        with torch.no_grad():
            error = (layer(inputs.to(device)).cpu() - expected).norm() / expected.norm()
    except (ImportError, OSError, RuntimeError, AttributeError, NotImplementedError, AssertionError) as problem:
        return f"does not work: {(str(problem).strip() or type(problem).__name__).splitlines()[0]}"
    if not error < 0.2:  # NF4's own error is about a tenth
        return f"does not work: a small product is off by {100 * float(error):.0f} %"
    return "works"


def _gpu(index: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "memory_gib": properties.total_memory / GIB,
        "bf16": torch.cuda.is_bf16_supported(),
    }


def _memory() -> dict[str, float | None]:
    """Memory of the machine and what of it is available, GiB; None if the system does not say."""
    total: float | None = None
    available: float | None = None
    if hasattr(os, "sysconf") and "SC_PHYS_PAGES" in os.sysconf_names:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / GIB
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("MemAvailable:"):
                available = int(line.split()[1]) * 1024 / GIB
    return {"memory_gib": total, "available_gib": available}


def _cache() -> dict[str, Any]:
    folder = cache_root()
    standing = next(path for path in (folder, *folder.parents) if path.exists())  # it may not have been made yet
    return {"folder": str(folder), "free_gib": shutil.disk_usage(standing).free / GIB}


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or sys.platform


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _gib(size: float | None) -> str:
    return "unknown" if size is None else f"{size:.1f} GiB"
