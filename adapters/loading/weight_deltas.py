"""Where the difference that is added to a tower's weights lies, what it is, and its copy in an artefact."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from adapters.catalogue import shipped_weight_deltas
from qformer.errors import UserError
from qformer.weight_delta import FACTS

_IN_ARTEFACT = "towers"


@dataclass(frozen=True)
class WeightDelta:
    """A difference as it was read when its tower was loaded.

    Attributes:
        folder: where it lies.
        files: its files' bytes, by name.
    """

    folder: Path
    files: Mapping[str, bytes]

    @property
    def ships(self) -> bool:
        """Whether it comes with the package, so that an artefact names it and holds no copy."""
        return self.folder in shipped_weight_deltas().values()

    @property
    def terms(self) -> str | None:
        """The terms of the pictures it was trained on; what sees through it inherits them."""
        return self._fact("terms")

    @property
    def base(self) -> str | None:
        """The fingerprint of the published weights that it is added to."""
        return self._fact("base")

    def _fact(self, name: str) -> str | None:
        try:
            fact = json.loads(self.files[FACTS]).get(name)
        except (ValueError, AttributeError):
            return None
        return fact if isinstance(fact, str) and fact else None

    def digest(self) -> str:
        """SHA-256 over its files, in hex."""
        digest = hashlib.sha256()
        for name, content in sorted(self.files.items()):
            digest.update(f"{name} {len(content)}\n".encode() + content)
        return digest.hexdigest()


def read_weight_delta(name: str, artefact: Path | None = None) -> WeightDelta:
    """Read a difference: one that lies in an artefact, one that ships, by its name, or any other folder.

    Raises:
        UserError: there is none.
    """
    shipped = shipped_weight_deltas()
    kept = [artefact / name] if artefact is not None else []
    ships = [shipped[name]] if name in shipped else []
    for folder in (*kept, *ships, Path(name).expanduser()):
        if (folder / FACTS).is_file():
            return WeightDelta(folder, {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()})
    raise UserError(f"vision.towers.difference: no folder '{name}', and none of that name ships ({', '.join(shipped)})")


def keep_weight_deltas(differences: Mapping[int, WeightDelta], artefact: Path) -> dict[int, str]:
    """Copy differences that do not ship into an artefact.

    Args:
        differences: by the tower's place.
        artefact: its folder.

    Returns:
        For each tower whose difference was copied, the name that it has in there.

    Raises:
        OSError: they cannot be written.
    """
    names = {}
    for place, difference in differences.items():
        if not difference.ships:
            names[place] = f"{_IN_ARTEFACT}/{place}"
            (artefact / names[place]).mkdir(parents=True)
            for name, content in difference.files.items():
                (artefact / names[place] / name).write_bytes(content)
    return names
