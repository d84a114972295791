"""The text side in training: what the first stage's model takes, and how a later stage keeps it true.

While an LLM learns to read the bridge, the bridge moves, and a text side that stood still would no longer fit. A step
of the first stage's objectives now and then lets both move together, at a small part of the cost of the LLM.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch

from adapters.assembly import Assembly
from adapters.data.captioned import Batch, captioned, draw_captions, image_numbers
from adapters.data.examples import Example
from adapters.recipe import TrainSection
from adapters.sight import MAX_TEXT, Sight
from qformer.errors import UserError
from qformer.objectives import Losses
from qformer.representation import TextBatch


def model_inputs(sight: Sight, batch: Batch) -> tuple[object, ...]:
    """What `RepresentationModel.forward` takes: features, texts, and each picture's number."""
    assert sight.tokenizer is not None
    device = next(sight.feature_norm.parameters()).device
    ids, mask = sight.tokenizer([text for _, texts in batch for text in texts], longest=MAX_TEXT)
    owners = torch.tensor([row for row, (_, texts) in enumerate(batch) for _ in texts])
    text = TextBatch(ids.to(device), mask.to(device), owners.to(device))
    return sight.features([picture.image for picture, _ in batch]), text, image_numbers(batch).to(device)


class TextSideKeeper:
    """Steps of the first stage beside another loss.

    Args:
        assembly: with its text side; its modules are the ones that are trained.
        examples: training data; its English captions are learned from.
        train: batch size, captions and share of pairs, as in the first stage.

    Raises:
        UserError: the bridge has no text branch, or there are no English captions.
    """

    def __init__(self, assembly: Assembly, examples: Sequence[Example], train: TrainSection) -> None:
        english = [e for e in examples if e.language == "en" and (e.task or assembly.recipe.task) == "caption"]
        self.pictures = captioned(english)
        if len(self.pictures) < 2:
            raise UserError(
                "train.text_side_every: there are no English captions to keep the text side with; set it to 0"
            )
        self.sight = assembly.sight
        self.train = train
        self.model = assembly.sight.representation(assembly.model.language.compute_dtype)

    def losses(self, step: int) -> Losses:
        """The objectives on pictures drawn for this step, the same in a resumed run."""
        rng = random.Random(f"{self.train.seed}:text side:{step}")
        chosen = rng.sample(self.pictures, min(self.train.batch_size, len(self.pictures)))
        batch = [(picture, draw_captions(picture, self.train.captions, rng)) for picture in chosen]
        paired = max(1, round(self.train.pair_share * len(batch)))
        losses: Losses = self.model(*model_inputs(self.sight, batch), paired=paired)
        return losses
