"""The text side in training: what the first stage's model takes, and how a later stage keeps it fitting.

While an LLM learns to read the bridge, the bridge moves, and an unchanged text side would no longer fit. A step
of the first stage's objectives now and then lets both move together, at a small part of the cost of the LLM.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from adapters.data.caption_batches import Batch, draw_batch, group_captions, image_numbers
from adapters.data.examples import DataSet, Example
from adapters.loading.assembly import Assembly
from adapters.loading.vision_side import MAX_TEXT, VisionSide
from qformer.errors import UserError
from qformer.objectives import Losses
from qformer.representation import TextBatch


def model_inputs(vision_side: VisionSide, batch: Batch) -> tuple[object, ...]:
    """What `RepresentationModel.forward` takes: features, texts, and each picture's number."""
    assert vision_side.tokenizer is not None
    device = next(vision_side.feature_norm.parameters()).device
    ids, mask = vision_side.tokenizer([text for _, texts in batch for text in texts], longest=MAX_TEXT)
    owners = torch.tensor([row for row, (_, texts) in enumerate(batch) for _ in texts])
    text = TextBatch(ids.to(device), mask.to(device), owners.to(device))
    return vision_side.features([picture.image for picture, _ in batch]), text, image_numbers(batch).to(device)


def check_keeping(data: DataSet, *, text_branch: bool, processes: int) -> None:
    """Report before anything is loaded that a text side cannot be kept.

    Raises:
        UserError: the bridge has none, there are several processes, or no English captions.
    """
    problem = None
    if not text_branch:
        problem = "bridge.text_branch is off, so there is no text side to keep"
    elif processes > 1:
        problem = "the text side is kept in a run of one process only"
    elif len(group_captions(data.examples)) < 2:
        problem = "there are no English captions to keep the text side with"
    if problem is not None:
        raise UserError(f"train.text_side_every: {problem}; set it to 0")


class TextSideKeeper:
    """Steps of the first stage beside another loss.

    Args:
        assembly: with its text side; its modules are the ones that are trained.
        examples: training data; its English captions are learned from.
        batch_size: pictures a step.
        captions: drawn of each picture.
        pair_share: the share of the pictures that ITM and ITG see.
        views: of each picture, of which one is drawn.
        seed: of the draws.
    """

    def __init__(
        self,
        assembly: Assembly,
        examples: Sequence[Example],
        *,
        batch_size: int,
        captions: int = 2,
        pair_share: float = 1.0,
        views: int = 1,
        seed: int = 0,
    ) -> None:
        self.pictures = group_captions(examples)
        self.vision_side = assembly.vision_side
        self.batch_size = batch_size
        self.captions = captions
        self.pair_share = pair_share
        self.views = views
        self.seed = seed
        self.model = assembly.vision_side.representation(assembly.model.language.compute_dtype)

    def losses(self, step: int) -> Losses:
        """The objectives on pictures drawn for this step, the same in a resumed run."""
        rng = random.Random(f"{self.seed}:text side:{step}")
        chosen = rng.sample(self.pictures, min(self.batch_size, len(self.pictures)))
        batch = draw_batch(chosen, self.captions, rng, views=self.views)
        paired = max(1, round(self.pair_share * len(batch)))
        losses: Losses = self.model(*model_inputs(self.vision_side, batch), paired=paired)
        return losses
