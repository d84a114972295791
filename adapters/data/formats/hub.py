"""Datasets of Hugging Face's hub, through its own library: `hub:OWNER/NAME`, `hub:OWNER/NAME/CONFIG:SPLIT`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from adapters.data.formats.columnar import ROWS_AT_ONCE, typed_rows
from adapters.data.formats.raw_rows import RawRow
from qformer.errors import UserError

PREFIX = "hub:"


def hub_rows(source: str, *, offline: bool = False) -> Iterator[RawRow]:
    """The rows of a split of a dataset on the hub, which is fetched whole into the library's own cache.

    Args:
        source: `hub:OWNER/NAME`, with `/CONFIG` if it has several and `:SPLIT`, which is "train" if left out.
        offline: take it from the cache.

    Raises:
        UserError: the library is not installed, or the dataset cannot be had.
    """
    name, _, split = source.removeprefix(PREFIX).partition(":")
    owner, *rest = name.split("/")
    if not owner or not 1 <= len(rest) <= 2 or not all(rest):
        raise UserError(f"data '{source}': write hub:OWNER/NAME, hub:OWNER/NAME:SPLIT or hub:OWNER/NAME/CONFIG:SPLIT")
    try:
        import datasets
    except ImportError:
        raise UserError(f"data '{source}' needs Hugging Face's datasets: pip install 'querybridge[hub]'") from None
    try:
        found: Any = datasets.load_dataset(
            f"{owner}/{rest[0]}",
            rest[1] if len(rest) == 2 else None,
            split=split or "train",
            download_config=datasets.DownloadConfig(local_files_only=offline),
        )
    except Exception as error:  # a library of many kinds of errors: of the network, the hub, the name, the files
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"data '{source}' cannot be had from the hub ({type(error).__name__}: {reason})") from error
    schema = found.features.arrow_schema
    batches = (
        batch for table in found.with_format("arrow").iter(batch_size=ROWS_AT_ONCE) for batch in table.to_batches()
    )
    return typed_rows(source, schema, batches)
