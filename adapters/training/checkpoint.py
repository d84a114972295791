"""What a run needs to go on as if it had never stopped: weights, optimiser, RNG and position, without pickle.

state/weights.safetensors     trained tensors, and a frozen bridge's, in float32
state/optimiser.safetensors   AdamW's moments and step counts, by parameter name
state/rng.safetensors         torch's generators, those of every process
state/position.json           step, epoch, place in the epoch, what the validations said
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate.utils import gather_object
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qformer.atomic import earlier_folder, whole_folder
from qformer.errors import UserError
from qformer.tensor_names import describe_differences

_BRIDGE = ("feature_norm.", "bridge.", "projection.", "heads.")
_WORDS = "bridge.embeddings.words.weight"  # of the text side, known by the fingerprint of what they are from


@dataclass
class RunState:
    """How far a run has come.

    Attributes:
        step: optimiser steps taken.
        epoch: the epoch under way, from 0.
        offset: steps taken within it.
        total: steps of the whole run; None before it was decided.
        best: the best validation score so far, higher is better; None before the first.
        best_step: the step of that validation.
        smoothed: the running mean of the validation scores.
        stale: validations since then.
        stopped_early: patience ran out, so there is nothing left to do.
        seconds: time spent training, over all sittings.
        data: fingerprint of the training data, so that a run is not resumed on other data.
        val: the same of the validation data, which `best` is measured on; "" if an older version wrote the state.
        dtype: what the LLM computes in.
        metrics: the figures of the best validation.
        started_from: the adapter the run started from, or None.
        terms: terms of the data, inherited ones included.
    """

    step: int = 0
    epoch: int = 0
    offset: int = 0
    total: int | None = None
    best: float | None = None
    best_step: int = 0
    smoothed: float | None = None
    stale: int = 0
    stopped_early: bool = False
    seconds: float = 0.0
    data: str = ""
    val: str = ""
    dtype: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    started_from: str | None = None
    terms: list[str] = field(default_factory=list)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """What trains, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def kept(model: nn.Module) -> dict[str, nn.Parameter]:
    """What a run's state holds, by name: what trains, and what a run left frozen though it is none of others' weights.

    That is the bridge of a run with `train.bridge: false`: a resumed run could not have it from elsewhere.
    """
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad or (name.startswith(_BRIDGE) and name != _WORDS)
    }


def generators_of_all() -> dict[str, Tensor]:
    """The states of torch's generators of every process, "RANK.cpu" and "RANK.cuda"; every process must call it."""
    own = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        own["cuda"] = torch.cuda.get_rng_state()  # of the device in use: another's would be opened to ask
    return {
        f"{number}.{name}": state
        for number, states in enumerate(gather_object([own]))
        for name, state in states.items()
    }


def save_state(
    folder: Path,
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    position: RunState,
    generators: Mapping[str, Tensor],
) -> None:
    """Write the state beside the earlier one, then take its place. `generators`: of `generators_of_all`.

    Raises:
        UserError: the disk is full or the folder cannot be written.
    """
    parameters = kept(model)
    moments: dict[str, Tensor] = {}
    for name, parameter in parameters.items():
        for key, value in optimiser.state.get(parameter, {}).items():
            moments[f"{name}|{key}"] = torch.as_tensor(value).detach().cpu().contiguous()
    weights = {name: p.detach().cpu().contiguous() for name, p in parameters.items()}
    try:
        with whole_folder(folder) as building:
            save_file(weights, building / "weights.safetensors")
            save_file(moments, building / "optimiser.safetensors")
            save_file(dict(generators), building / "rng.safetensors")
            (building / "position.json").write_text(json.dumps(asdict(position), indent=2), encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the run's state cannot be written ({error}); free space, then --resume") from error


def find_state(folder: Path) -> Path | None:
    """The state to go on from, or None. A run stopped between two renames left the last one under `.old`."""
    for candidate in (folder, earlier_folder(folder)):
        if (candidate / "position.json").is_file():
            return candidate
    return None


def read_run_state(folder: Path) -> RunState:
    """Where a run stood.

    Raises:
        UserError: the file is damaged.
    """
    try:
        return RunState(**json.loads((folder / "position.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: the state is damaged ({error}); delete the run's folder and start again") from error


def load_state(folder: Path, model: nn.Module, optimiser: torch.optim.Optimizer, *, rank: int = 0) -> RunState:
    """Put weights, optimiser and this process's generators back as they were.

    Raises:
        UserError: the state is damaged, or of a run with other trainable parts.
    """
    position = read_run_state(folder)
    parameters = kept(model)
    try:
        weights = load_file(folder / "weights.safetensors")
        moments = load_file(folder / "optimiser.safetensors")
        generators = load_file(folder / "rng.safetensors")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the state is damaged ({error}); delete the run's folder and start again") from error
    if differences := describe_differences(weights, parameters):
        raise UserError(
            f"{folder}: the run trained other parts: {differences}; resume it with its own recipe and models"
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
    for key, value in moments.items():
        name, _, kind = key.rpartition("|")
        parameter = parameters[name]
        # the fused AdamW keeps its step count there too, and bitsandbytes' a plain number
        counts = kind == "step" and not isinstance(optimiser, torch.optim.AdamW)
        optimiser.state[parameter][kind] = int(value) if counts else value.to(parameter.device)
    own = {name.partition(".")[2]: state for name, state in generators.items() if name.startswith(f"{rank}.")}
    if "cpu" not in own:
        raise UserError(
            f"{folder}: the run had fewer processes, or an older version wrote it; go on with as many as then"
        )
    torch.set_rng_state(own["cpu"])
    if torch.cuda.is_available() and "cuda" in own:
        torch.cuda.set_rng_state(own["cuda"])
    return position
