"""A small difference to published weights: what an image encoder becomes when its last blocks were trained further.

A folder of two files. `difference.safetensors` holds, in bfloat16, what is added to some of the published tensors;
`difference.json` names the published weights, without which the difference is of no use.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from qformer.errors import UserError
from qformer.weight_hash import hash_tensors

_TENSORS = "difference.safetensors"
FACTS = "difference.json"


@torch.no_grad()
def save_weight_delta(folder: Path, changed: nn.Module, published: nn.Module, facts: dict[str, Any]) -> Path:
    """Write the difference of `changed` to `published`, tensor by tensor; equal tensors are left out.

    Args:
        folder: made if it is not there.
        changed: the trained module.
        published: the same module with the published weights.
        facts: what is to be known of it; "base", the fingerprint of the published weights, among them.

    Returns:
        The folder.

    Raises:
        UserError: it cannot be written.
    """
    theirs = published.state_dict()
    differences: dict[str, Tensor] = {}
    for name, tensor in changed.state_dict().items():
        if not torch.equal(tensor, theirs[name]):
            differences[name] = (tensor.float() - theirs[name].float()).bfloat16().cpu().contiguous()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(differences, folder / _TENSORS)
        (folder / FACTS).write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the difference cannot be written ({error}); free space or name another") from error
    return folder


@torch.no_grad()
def apply_weight_delta(model: nn.Module, folder: Path, *, base: str | None) -> str:
    """Add a difference to a module's weights, in place.

    Args:
        model: holds the published weights.
        folder: as `save_weight_delta` wrote it.
        base: the fingerprint of the module's weights.

    Returns:
        The fingerprint of the result: over the published weights' and the difference's.

    Raises:
        UserError: no difference there, one to other weights, or tensors that do not fit.
    """
    folder = Path(folder)
    try:
        facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
        differences = load_file(folder / _TENSORS)
        expected = str(facts["base"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no difference to published weights can be read there ({error})") from error
    if expected != base:
        raise UserError(f"{folder}: it belongs to the weights {expected[:19]}…, not to {str(base)[:19]}…")
    own = model.state_dict()
    for name, difference in differences.items():
        if name not in own or own[name].shape != difference.shape:
            raise UserError(f"{folder}: {name} does not fit the tower; fetch a fresh copy")
    for name, difference in differences.items():
        own[name].add_(difference.to(own[name]))
    return "sha256:" + hashlib.sha256(f"{base} {hash_tensors([folder / _TENSORS])}".encode()).hexdigest()
