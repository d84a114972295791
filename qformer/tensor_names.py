"""Strict loading: what of a set of tensors is not as it must be, in words."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor


def describe_differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> str:
    """The first three differences in names and shapes, and how many there are; "" where there are none."""
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    problems += [
        f"{name} is {list(found[name].shape)}, not {list(expected[name].shape)}"
        for name in expected
        if name in found and found[name].shape != expected[name].shape
    ]
    return f"{'; '.join(problems[:3])} ({len(problems)} in all)" if problems else ""
