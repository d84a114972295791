"""Pictures and texts found by each other: the first stage's contrastive embeddings, then its matching head.

BLIP-2 (arXiv 2301.12597, section 4.4): rank all by ITC, then rank the best few again by ITM.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from adapters.data.image_ref import ImageRef
from adapters.loading.vision_side import MAX_TEXT, VisionSide
from qformer.objectives import similarity
from qformer.representation import RepresentationModel

RERANKED = 16  # candidates that ITM ranks again
MATCH_SHARE = 0.5  # of ITM's log-odds beside ITC's logit, the best on validation pictures (docs/photo-adapter.md)
CLASSES_READ = 10  # the likeliest classes of an image encoder's own classifier that count
CLASS_SHARE = 1.0  # of them beside ITC's cosine (docs/photo-adapter.md)
_LAST = -1e4  # below every score of a candidate: ITC's logits lie in -1000…1000, ITM's log-odds in the tens


class Retriever:
    """Compares pictures and texts with a trained first stage.

    Args:
        vision_side: loaded, with its text side.
        compute_dtype: of the computation.
        batch_size: pictures, texts or pairs computed together.
    """

    def __init__(
        self, vision_side: VisionSide, *, compute_dtype: torch.dtype = torch.float32, batch_size: int = 64
    ) -> None:
        self.vision_side = vision_side
        self.model: RepresentationModel = vision_side.representation(compute_dtype).eval()
        self.batch_size = batch_size

    @torch.no_grad()
    def embed_images(self, images: Sequence[ImageRef]) -> Tensor:
        """Unit vectors of pictures, [I, Q, E], on the CPU."""
        batches = [images[start : start + self.batch_size] for start in range(0, len(images), self.batch_size)]
        return torch.cat([self.model.encode_images(self.vision_side.features(batch)).cpu() for batch in batches])

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> Tensor:
        """Unit vectors of texts, [T, E], on the CPU."""
        batches = [texts[start : start + self.batch_size] for start in range(0, len(texts), self.batch_size)]
        return torch.cat([self.model.encode_texts(*self._tokens(batch)).cpu() for batch in batches])

    def name_texts(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Unit vectors of names, [L, E]: each goes into every template, and the vectors are averaged."""
        sentences = [template.replace("{label}", name) for name in names for template in templates]
        vectors = self.embed_texts(sentences).unflatten(0, (len(names), len(templates))).mean(dim=1)
        return F.normalize(vectors, dim=-1)

    @torch.no_grad()
    def embed_classes(self, image: ImageRef, templates: Sequence[str]) -> Tensor | None:
        """What the image encoder's own classifier says of a picture, as a text's unit vector [E]; None without one.

        It is the mean of the likeliest classes' names, each weighing by its probability (Norouzi et al. 2013, arXiv
        1312.5650): it lies near other names of the thing, which the classifier does not know.
        """
        classifier = self.vision_side.encoders[0].classifier
        if classifier is None:
            return None
        (features,) = self.vision_side.features([image])[:1]
        shares, best = classifier(features.float().cpu().mean(dim=1))[0].topk(CLASSES_READ)
        names = self.name_texts([classifier.names[index] for index in best.tolist()], templates)
        return F.normalize(shares @ names, dim=-1)

    def name(self, image: ImageRef, vectors: Tensor, templates: Sequence[str]) -> Tensor:
        """Probabilities [L] of labels for a picture: a softmax over ITC's scores, at its temperature.

        What the image encoder's classifier takes the picture for, if there is one, counts beside ITC.

        Args:
            image: the picture.
            vectors: of the labels, [L, E], as `name_texts` gives them.
            templates: those that the labels went into.
        """
        scores = self.scores(self.embed_images([image]), vectors)[0]
        if (classes := self.embed_classes(image, templates)) is not None:
            scores = scores + CLASS_SHARE * (vectors @ classes)
        return (scores / self.model.heads.temperature.item()).softmax(dim=0)

    def scores(self, images: Tensor, texts: Tensor) -> Tensor:
        """ITC's scores [I, T] of embedded pictures and texts: the cosine of the query nearest to the text."""
        parts = [similarity(images[start : start + 256], texts) for start in range(0, len(images), 256)]
        return torch.cat(parts)

    @torch.no_grad()
    def match(self, images: Sequence[ImageRef], texts: Sequence[str], pairs: Tensor) -> Tensor:
        """ITM's log-odds [N] that picture `pairs[n, 0]` and text `pairs[n, 1]` belong together.

        Pairs are taken by picture, so that each picture is read once.
        """
        order = pairs[:, 0].argsort(stable=True)
        found = torch.empty(len(pairs))
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            numbers, rows = pairs[chosen, 0].unique(return_inverse=True)
            ids, mask = self._tokens([texts[index] for index in pairs[chosen, 1].tolist()])
            features = self.vision_side.features([images[index] for index in numbers.tolist()])
            found[chosen] = self.model.match_scores(features, ids, mask, rows.to(ids.device)).cpu()
        return found

    def rerank(
        self,
        images: Sequence[ImageRef],
        texts: Sequence[str],
        scores: Tensor,
        *,
        most: int = RERANKED,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """ITM on the best by ITC, both ways.

        Args:
            images: I pictures.
            texts: T texts.
            scores: [I, T] by ITC.
            most: candidates of each picture and of each text.
            on_progress: called with (pairs done, pairs in all).

        Returns:
            Scores [I, T] to rank texts by for each picture, and [I, T] to rank pictures by for each text: `combined`
            for the candidates, far below them for the rest.
        """
        by_image = torch.zeros_like(scores, dtype=torch.bool)
        by_image.scatter_(1, scores.topk(min(most, scores.shape[1]), dim=1).indices, True)
        by_text = torch.zeros_like(by_image)
        by_text.scatter_(0, scores.topk(min(most, scores.shape[0]), dim=0).indices, True)
        pairs = (by_image | by_text).nonzero()  # [N, 2]
        odds = torch.zeros_like(scores)
        step = self.batch_size * 16
        for start in range(0, len(pairs), step):
            part = pairs[start : start + step]
            odds[part[:, 0], part[:, 1]] = self.match(images, texts, part)
            if on_progress is not None:
                on_progress(min(start + step, len(pairs)), len(pairs))
        both = self.combined(odds, scores)
        return both.where(by_image, scores + _LAST), both.where(by_text, scores + _LAST)

    def combined(self, odds: Tensor, scores: Tensor) -> Tensor:
        """ITM's log-odds and ITC's cosine as one score, of the same shape.

        The cosine over its temperature is ITC's logit, and the odds count half, since both judge by much the same
        evidence. BLIP-2 adds the bare cosine, next to nothing beside the odds; a matching head that has learned little
        then undoes what ITC knows.
        """
        return MATCH_SHARE * odds + scores / self.model.heads.temperature.item()

    def _tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        assert self.vision_side.tokenizer is not None
        ids, mask = self.vision_side.tokenizer(texts, longest=MAX_TEXT)
        return ids.to(self.model.device), mask.to(self.model.device)
