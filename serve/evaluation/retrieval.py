"""How well pictures find their captions, and captions their pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from adapters.data.caption_batches import group_captions
from adapters.data.image_ref import ImageRef, blank_image
from adapters.data.reading import read_data
from adapters.evaluation.retrieval import recalls
from adapters.inference.retrieval import RERANKED, Retriever
from qformer.errors import UserError


def evaluate_retrieval(
    retriever: Retriever,
    data: str | Path,
    *,
    blank_images: bool = False,
    limit: int | None = None,
    skip_bad_rows: bool = False,
    columns: Mapping[str, str] | None = None,
    allow_outside: bool = False,
    offline: bool = False,
    rerank: bool = True,
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Score how pictures find their captions and captions their pictures, among all of a file's.

    Args:
        retriever: the loaded first stage.
        data: a file of captions.
        blank_images: the control: every picture is replaced by a mid-grey one.
        limit: only the first so many rows.
        skip_bad_rows: leave bad rows out, and report how many as "skipped".
        columns: the file's name of a field by ours, such as {"image": "photo"}.
        allow_outside: pictures may lie outside the data's own folder; else a row that names one is bad.
        offline: do not fetch a packaged set.
        rerank: let ITM rank the best 16 by ITC again; "i2t_R@1" and the like are then its, and "itc_i2t_R@1" ITC's own.
        on_progress: called with (pairs done, pairs in all) of ITM.

    Returns:
        "n" pictures, "texts", R@1, R@5 and R@10 both ways as fractions, and "skipped".

    Raises:
        UserError: the data cannot be read.
    """
    rows = read_data(
        data,
        task="caption",
        skip_bad_rows=skip_bad_rows,
        broken_pictures_too=True,
        limit=limit,
        columns=columns,
        allow_outside=allow_outside,
        offline=offline,
    )
    pictures = group_captions(rows.examples)
    if not pictures:
        raise UserError(f"{data}: no pictures with captions in English, which is what the text side reads")
    images: list[ImageRef] = [blank_image() if blank_images else picture.image for picture in pictures]
    texts = [text for picture in pictures for text in picture.captions]
    owners = [row for row, picture in enumerate(pictures) for _ in picture.captions]
    scores = retriever.scores(retriever.embed_images(images), retriever.embed_texts(texts))
    found: dict[str, float] = {"n": len(images), "texts": len(texts), "skipped": len(rows.skipped)}
    plain = recalls(scores, owners)
    if not rerank:
        return found | plain
    by_image, by_text = retriever.rerank(images, texts, scores, most=RERANKED, on_progress=on_progress)
    to_text, to_image = recalls(by_image, owners), recalls(by_text, owners)
    reranked = {name: (to_text if name.startswith("i2t") else to_image)[name] for name in plain}
    return found | reranked | {f"itc_{name}": value for name, value in plain.items()}
