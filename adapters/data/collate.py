"""From tokenised prompts and answers to batches of tensors.

Several answers about one picture share a sequence: the prompt's part up to the last image is there once, and so is what
all their questions begin with, since captions are asked for alike. Each question with its answer sees that and itself.
Sequences of different pictures share a row of the batch: what stands before the first image, a chat template's system
message, is there once. Positions and masks make it equal to as many separate sequences (tested), at a fraction of the
work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import takewhile

import torch
from torch import Tensor

from adapters.data.image_ref import ImageRef
from adapters.data.prompts import ANSWER_SLOT, IMAGE_SLOT, Prompt
from qformer.language import IGNORED
from qformer.model import TokenBatch

LENGTH_STEP = 16  # tokens that training sequences are rounded up to


@dataclass(frozen=True)
class PackedAnswer:
    """One question with its answer, as token ids after the shared part.

    Attributes:
        own: the question.
        answer: the answer, with its end token.
        instruction: what an instruction-aware bridge reads: the question, or the request for a caption.
        caption: the language, if the answer is a caption.
        weight: what the answer's loss counts; below zero, it is unlearned.
    """

    own: tuple[int, ...]
    answer: tuple[int, ...]
    instruction: str = ""
    caption: str | None = None
    weight: float = 1.0

    def __len__(self) -> int:
        return len(self.own) + len(self.answer)


@dataclass(frozen=True)
class PackedSequence:
    """One sequence: pictures, the part of the prompt up to the last of them, and the packed_answers."""

    images: tuple[ImageRef, ...]
    shared: tuple[int, ...]
    packed_answers: tuple[PackedAnswer, ...]

    @cached_property
    def common(self) -> int:
        """How many tokens the answers begin with alike; they are there once.

        The last token of each prompt is never among them: the first of the answer is predicted from it. A slot is
        another vector for each question, so nothing is alike behind it.
        """
        if len(self.packed_answers) == 1 or ANSWER_SLOT in self.packed_answers[0].own:
            return 0
        columns = zip(*(branch.own[:-1] for branch in self.packed_answers), strict=False)
        return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))

    @cached_property
    def opening(self) -> int:
        """How many tokens there are before the first image: they do not depend on the picture."""
        return sum(1 for _ in takewhile(lambda token: token != IMAGE_SLOT, self.shared))

    def __len__(self) -> int:
        return len(self.shared) + self.common + sum(len(branch) - self.common for branch in self.packed_answers)


def pairs_of(rows: Sequence[PackedSequence]) -> list[tuple[ImageRef, str]]:
    """Each question of packed sequences with each of its pictures, in reading order."""
    return [(image, answer.instruction) for row in rows for answer in row.packed_answers for image in row.images]


def padded_length(length: int) -> int:
    """A length rounded up, so that few shapes occur: kernels are made once a shape, and each keeps memory."""
    return -(-length // LENGTH_STEP) * LENGTH_STEP


def rows_of(sequences: Sequence[PackedSequence], row_tokens: int) -> list[tuple[PackedSequence, ...]]:
    """The rows of a batch: neighbours that open alike share one up to a length.

    Args:
        sequences: in the order in which they stand in the batch.
        row_tokens: the longest row that several sequences share; 0 gives each its own.
    """
    rows: list[tuple[PackedSequence, ...]] = []
    length = 0
    for sequence in sequences:
        opening = sequence.shared[: sequence.opening]
        if rows and opening == rows[-1][0].shared[: rows[-1][0].opening]:
            longer = length + len(sequence) - len(opening)
            if longer <= row_tokens:
                rows[-1] = (*rows[-1], sequence)
                length = longer
                continue
        rows.append((sequence,))
        length = len(sequence)
    return rows


def row_length(row: Sequence[PackedSequence]) -> int:
    """Tokens of a row that its sequences share: their opening is there once."""
    return row[0].opening + sum(len(sequence) - sequence.opening for sequence in row)


def collate_packed(sequences: Sequence[PackedSequence], pad_id: int, *, row_tokens: int = 0) -> TokenBatch:
    """Sequences to a training batch for a causal LLM, padded on the right to a rounded length.

    If each row is one sequence with one answer, the mask is a plain [B, T]; otherwise it is bool [B, 1, T, T].

    Args:
        sequences: their images fill the batch's slots in this order.
        pad_id: the token of padding.
        row_tokens: as `rows_of` takes it.
    """
    rows = rows_of(sequences, row_tokens)
    shape = (len(rows), padded_length(max(map(row_length, rows))))
    ids = torch.full(shape, pad_id, dtype=torch.long)
    labels = torch.full(shape, IGNORED, dtype=torch.long)
    positions = torch.zeros(shape, dtype=torch.long)
    present = torch.zeros(shape, dtype=torch.bool)
    weights = torch.ones(shape)
    sequence_of = torch.full(shape, -1, dtype=torch.long)  # 0 is the opening that all share, 1, 2, … the sequences
    branch_of = torch.full(
        shape, -1, dtype=torch.long
    )  # 0 is what all answers of a sequence share, 1, 2, … the answers
    for r, row in enumerate(rows):
        end = opening = row[0].opening if len(row) > 1 else 0
        ids[r, :opening] = torch.tensor(row[0].shared[:opening], dtype=torch.long)
        positions[r, :opening] = torch.arange(opening)
        sequence_of[r, :opening] = branch_of[r, :opening] = 0
        for s, sequence in enumerate(row, start=1):
            seen = sequence.shared + sequence.packed_answers[0].own[: sequence.common]  # by all its answers
            start, end = end, end + len(seen) - opening
            ids[r, start:end] = torch.tensor(seen[opening:])
            positions[r, start:end] = torch.arange(opening, len(seen))
            sequence_of[r, start:end] = s
            branch_of[r, start:end] = 0
            for b, branch in enumerate(sequence.packed_answers, start=1):
                rest = branch.own[sequence.common :] + branch.answer
                start, end = end, end + len(rest)
                ids[r, start:end] = torch.tensor(rest)
                labels[r, end - len(branch.answer) : end] = torch.tensor(branch.answer)
                weights[r, end - len(branch.answer) : end] = branch.weight
                positions[r, start:end] = torch.arange(len(seen), len(seen) + len(rest))
                sequence_of[r, start:end] = s
                branch_of[r, start:end] = b
        present[r, :end] = True
    alone = all(len(row) == 1 and len(row[0].packed_answers) == 1 for row in rows)
    mask = present.long() if alone else packed_mask(branch_of, sequence_of)
    weighed = any(branch.weight != 1.0 for sequence in sequences for branch in sequence.packed_answers)
    return _token_batch(ids, mask, pad_id, labels, positions, weights if weighed else None)


def packed_mask(branch_of: Tensor, sequence_of: Tensor) -> Tensor:
    """The attention of packed rows, bool [B, 1, T, T], True where attention may go.

    Args:
        branch_of: [B, T], 0 for what all answers of a sequence share, 1, 2, … for the answers, -1 for padding.
        sequence_of: [B, T], 0 for the opening that all sequences of a row share, 1, 2, … for them, -1 for padding.
    """
    length = branch_of.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    same_branch = branch_of.unsqueeze(2) == branch_of.unsqueeze(1)  # [B, T, T]
    to_shared = (branch_of == 0).unsqueeze(1)  # [B, 1, T]
    same_sequence = sequence_of.unsqueeze(2) == sequence_of.unsqueeze(1)
    to_opening = (sequence_of == 0).unsqueeze(1)
    mask = causal & (to_opening | (same_sequence & (same_branch | to_shared)))
    return mask.unsqueeze(1)  # padding sees the opening or padding before it, so no row of the mask is empty


def collate_encoder_decoder(rows: Sequence[PackedSequence], pad_id: int) -> TokenBatch:
    """Rows of one branch each to a training batch for an encoder-decoder LLM: prompt in, answer as labels [B, S]."""
    batch = collate_prompts(
        [Prompt(r.shared, r.packed_answers[0].own, len(r.images)) for r in rows], pad_id, side="right"
    )
    longest = max(len(row.packed_answers[0].answer) for row in rows)
    labels = torch.full((len(rows), longest), IGNORED, dtype=torch.long)
    for r, row in enumerate(rows):
        answer = row.packed_answers[0].answer
        labels[r, : len(answer)] = torch.tensor(answer)
    return replace(batch, labels=labels)


def collate_prompts(prompts: Sequence[Prompt], pad_id: int, *, side: str = "left") -> TokenBatch:
    """Prompts to a batch for generation: padded on the left for a causal LLM, on the right for an encoder-decoder."""
    length = max(len(prompt.ids) for prompt in prompts)
    ids = torch.full((len(prompts), length), pad_id, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for p, prompt in enumerate(prompts):
        span = slice(length - len(prompt.ids), length) if side == "left" else slice(0, len(prompt.ids))
        ids[p, span] = torch.tensor(prompt.ids)
        mask[p, span] = 1
    return _token_batch(ids, mask, pad_id)


def _token_batch(
    ids: Tensor,
    mask: Tensor,
    pad_id: int,
    labels: Tensor | None = None,
    positions: Tensor | None = None,
    weights: Tensor | None = None,
) -> TokenBatch:
    """A batch of token ids [B, T] with slots among them."""
    images, answers = ids == IMAGE_SLOT, ids == ANSWER_SLOT
    ids = ids.masked_fill(images | answers, pad_id)
    return TokenBatch(ids, mask, images, labels, positions, weights, answers if bool(answers.any()) else None)
