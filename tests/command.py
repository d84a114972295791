"""The command as its tests call it: what it exits with and prints where."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

FAST = ["--device", "cpu", "--dtype", "float32"]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str

    @property
    def values(self) -> dict[str, Any]:
        """The one JSON object on standard output."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out)

    def mistake(self) -> str:
        """The one line that a user's mistake gets."""
        assert self.code == 2, self.err
        assert self.out == ""
        assert self.err.count("\n") == 1, self.err
        assert self.err.startswith("querybridge: ")
        return self.err.removeprefix("querybridge: ").rstrip("\n")


Call = Callable[..., Outcome]
