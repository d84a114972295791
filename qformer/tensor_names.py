"""Strict loading: what differs between the tensors that were found and those that are expected, in words."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def describe_differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """How many tensors are missing, unexpected or of another shape, three of each by name; "" if none is."""
    missing = [name for name in expected if name not in found]
    unexpected = [name for name in found if name not in expected]
    reshaped = [
        f"{name} is {list(found[name].shape)}, not {list(tensor.shape)}"
        for name, tensor in expected.items()
        if name in found and found[name].shape != tensor.shape
    ]
    differences = {"missing": missing, "unexpected": unexpected, "of another shape": reshaped}
    return "; ".join(f"{len(names)} {what} ({_first(names)})" for what, names in differences.items() if names)


def _first(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")
