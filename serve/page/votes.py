"""Votes of the Compare tab, one JSON object a line in a file."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from qformer.errors import UserError

VERDICTS = {"left": "Left is better", "right": "Right is better", "both": "Both are right", "neither": "Neither is"}


class VoteFile:
    """A file of votes; it is made with the first one.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writing = threading.Lock()

    def add(self, verdict: str, compared: Mapping[str, Any]) -> None:
        """Keep a vote.

        Args:
            verdict: one of `VERDICTS`.
            compared: what was asked and answered, JSON-able.

        Raises:
            UserError: the verdict is not known, or the file cannot be written.
        """
        if verdict not in VERDICTS:
            raise UserError(f"vote '{verdict}' is not known; take one of {', '.join(VERDICTS)}")
        line = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "vote": verdict, **compared}
        try:
            with self._writing:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                with self.path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line, ensure_ascii=False) + "\n")
        except OSError as error:
            raise UserError(f"{self.path}: the vote could not be kept ({error.strerror})") from error

    def count(self) -> Counter[str]:
        """How many votes of each kind there are.

        Raises:
            UserError: the file cannot be read, or a line in it is no vote.
        """
        found: Counter[str] = Counter()
        if not self.path.exists():
            return found
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path}: the votes cannot be read ({error})") from error
        for number, line in enumerate(lines, start=1):
            try:
                found[json.loads(line)["vote"]] += 1
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.path}, line {number}: it is no vote; move the file away") from None
        return found
