"""The rows that an adapter learned from, if they are still here as they were: the controls of its scores need them."""

from __future__ import annotations

from adapters.artefact.artefact import find_artefact, read_recipe
from adapters.data.examples import DataSet
from adapters.training.setup import read_split
from qformer.errors import UserError
from serve.adapter import LoadedAdapter


def training_rows(adapter: LoadedAdapter) -> DataSet | None:
    """What an adapter was trained on last, without what was held out; nothing is fetched.

    Returns:
        The rows; None if they cannot be read any more, or are not those that the adapter's facts name.
    """
    try:
        recipe = read_recipe(find_artefact(adapter.name))
        data = recipe.data.model_copy(update={"allow_outside": True})  # its pictures are compared, never shown
        rows, _ = read_split(recipe.model_copy(update={"data": data}), offline=True)
    except UserError:
        return None
    return rows if rows.fingerprint == adapter.facts.data.get("fingerprint") else None
