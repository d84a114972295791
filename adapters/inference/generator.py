"""What reads and writes with one adapter: a batch of prompts becomes answers, or probabilities of choices."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TypeVar, cast

import torch
from torch import Tensor

from adapters.data.collate import (
    PackedAnswer,
    PackedSequence,
    collate_encoder_decoder,
    collate_packed,
    collate_prompts,
    pairs_of,
)
from adapters.data.image_ref import ImageRef
from adapters.data.prompts import Prompt
from adapters.inference.request import Completion, Request
from adapters.loading.assembly import Assembly
from qformer.decoding import Decoding
from qformer.generation import Generated, OnStep, PrefixCache

_CHOICE_TOKENS = 1024  # of choices, or of rows with them, that are looked at in one pass
_ONE_LOOP = 64 * 2**20  # bytes of prefixes that a loop over many questions keeps from batch to batch


_Key = tuple[object, ...]
Item = TypeVar("Item")


class Generator:
    """Generates from prompts with one adapter; what a picture became is kept for the next question about it.

    Args:
        assembly: the loaded adapter.
        keep_bytes: memory for kept pictures: their vectors and, if the LLM can continue, its keys and values over
            them. The ones not asked about for longest go first; what one batch needs always stays.
    """

    def __init__(self, assembly: Assembly, *, keep_bytes: int = _ONE_LOOP) -> None:
        self.assembly = assembly
        self.keep_bytes = keep_bytes
        self._kept: OrderedDict[_Key, Tensor | PrefixCache] = OrderedDict()

    @torch.no_grad()
    def __call__(
        self,
        asked: Sequence[Request],
        decoding: Decoding,
        *,
        on_step: Callable[[list[Completion]], Sequence[bool]] | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> list[Completion]:
        """Answer a batch.

        Args:
            asked: at least one prompt; an answer does not depend on the others.
            decoding: how tokens are chosen.
            on_step: called after each token with what every row said so far; True ends a row. Not in beam search.
            stopped: looked at after each token of a beam search, where True ends it with what was found; and between
                the parts of a long prompt.

        Raises:
            Stopped: `stopped` said so while a prompt was being read.
        """

        def step(ids: Tensor, log_probs: Tensor) -> Tensor:
            assert on_step is not None
            return torch.tensor(on_step(self._said(ids, log_probs)), dtype=torch.bool, device=ids.device)

        made = self._generate(asked, decoding, step if on_step is not None else None, stopped)
        return self._said(made.ids, made.log_probs)

    @torch.no_grad()
    def write(self, asked: Sequence[Request], decoding: Decoding) -> list[tuple[int, ...]]:
        """Answer a batch in token ids, each up to and with its end token, if it came to one."""
        stops = set(self.assembly.model.language.stop_ids)
        written = []
        for tokens in self._generate(asked, decoding).ids.tolist():
            end = next((place for place, token in enumerate(tokens) if token in stops), len(tokens) - 1)
            written.append(tuple(tokens[: end + 1]))
        return written

    def unread(self, asked: Request) -> int:
        """Tokens of its prompt that have still to be read, given what is kept of its pictures."""
        return len(asked.prompt.own) + (0 if self._key(asked) in self._kept else len(asked.prompt.shared))

    @torch.no_grad()
    def start(
        self, asked: Sequence[Request], *, stopped: Callable[[], bool] | None = None
    ) -> list[tuple[PrefixCache | None, Tensor]]:
        """Read each prompt's shared part, if there is one; with it the vectors [T, D_l] of the rest.

        Raises:
            Stopped: `stopped`, which is looked at between the parts of a long prompt, says so.
        """
        assembly = self.assembly
        assembly.model.language.activate()
        prefixes = self._prefixes(asked, stopped)
        prompts = [Prompt((), one.prompt.own, 0) for one in asked]
        batch = collate_prompts(prompts, assembly.prompts.tokenizer.pad_token_id).to(assembly.model.device)
        answers = self._read_answers([(image, one.prompt.instruction) for one in asked for image in one.images])
        placed = assembly.model.place(batch, self._none(), answers)  # [B, T, D_l], padded on the left
        self._forget()
        rests = [row[len(row) - len(one.own) :] for row, one in zip(placed, prompts, strict=True)]
        return list(zip(prefixes, rests, strict=True))

    def knows(self, asked: Request) -> bool:
        """Whether all its pictures' vectors are kept: they have been opened, and need not be again."""
        keys: list[_Key] = [("vectors", image.digest(), self._read_with(asked)) for image in asked.images]
        if self.assembly.answer_reader is not None:
            keys += [("numbers", image.digest()) for image in asked.images]
        return all(key in self._kept for key in keys)

    def _generate(
        self,
        asked: Sequence[Request],
        decoding: Decoding,
        on_step: OnStep | None = None,
        stopped: Callable[[], bool] | None = None,
    ) -> Generated:
        assembly, language = self.assembly, self.assembly.model.language
        assembly.model.eval()
        language.activate()
        pad, device = assembly.prompts.tokenizer.pad_token_id, assembly.model.device
        if language.can_reuse_prefix:
            prefixes = self._prefixes(asked, stopped)
            prompts = [Prompt((), one.prompt.own, 0) for one in asked]
            vectors = self._none()
        else:
            prefixes, prompts, vectors = None, [one.prompt for one in asked], self._vectors(asked)
        side = "right" if language.is_encoder_decoder else "left"
        batch = collate_prompts(prompts, pad, side=side).to(device)
        made = assembly.model.generate(
            batch,
            vectors,
            decoding,
            prefixes=prefixes,
            answers=self._read_answers([(image, one.prompt.instruction) for one in asked for image in one.images]),
            on_step=on_step,
            stopped=stopped,
        )
        self._forget()
        return made

    def _said(self, ids: Tensor, log_probs: Tensor) -> list[Completion]:
        """Rows of token ids [B, N] in words; `log_probs` is of the same shape."""
        stops = set(self.assembly.model.language.stop_ids)
        said = []
        for tokens, chance in zip(ids.tolist(), log_probs.tolist(), strict=True):  # one wait for the device for all
            # What comes after a stop is filling, and its kind depends on the rows beside it
            written = list(takewhile(lambda token: token not in stops, tokens))
            ended = len(written) < len(tokens)
            count = len(written) + ended
            log_prob = sum(chance[:count]) / count
            single = tuple(zip(tokens[:count], chance[:count], strict=True))
            text = self.assembly.prompts.decode(written)
            said.append(Completion(text, count, ended, log_prob, single, self.assembly.temperature))
        return said

    @torch.no_grad()
    def choose(
        self,
        asked: Sequence[Request],
        choices: Sequence[Sequence[str]],
        *,
        stopped: Callable[[], bool] = lambda: False,
    ) -> list[list[float]]:
        """The probability of each choice, if one of them must be the answer, for a batch of questions.

        A choice weighs by its whole probability as an answer, its end token included: a softmax over the sums of
        log-probabilities. A prompt is read once for all its choices, if the LLM can pack.

        Args:
            asked: at least one prompt; an answer does not depend on the others.
            choices: of each prompt.
            stopped: looked at between passes; if nobody waits any more, the rest is left undone, with even shares.
        """
        assembly, language = self.assembly, self.assembly.model.language
        assembly.model.eval()
        language.activate()
        packs = language.can_pack and not assembly.reads_instructions
        rows: list[tuple[int, PackedSequence]] = []  # with the question that each belongs to
        for number, (one, named) in enumerate(zip(asked, choices, strict=True)):
            packed_answers = [
                PackedAnswer(one.prompt.own, tuple(assembly.prompts.answer_ids(choice)), one.prompt.instruction)
                for choice in named
            ]
            for part in (
                _parts(packed_answers, _CHOICE_TOKENS, len) if packs else [[branch] for branch in packed_answers]
            ):
                rows.append((number, PackedSequence(one.images, one.prompt.shared, tuple(part))))
        sums: list[list[float]] = [[] for _ in asked]
        for batch in _parts(rows, _CHOICE_TOKENS, lambda pair: len(pair[1])):
            if stopped():
                return [[1 / len(named)] * len(named) for named in choices]
            found = self._log_probs([row for _, row in batch], [asked[number] for number, _ in batch])
            for (number, _), each in zip(batch, found, strict=True):
                sums[number] += each
        self._forget()
        return [torch.tensor(each).softmax(dim=0).tolist() for each in sums]

    def _log_probs(self, rows: Sequence[PackedSequence], asked: Sequence[Request]) -> list[list[float]]:
        """The log-probability of each branch's whole answer, a list a row."""
        assembly, language = self.assembly, self.assembly.model.language
        collate = collate_encoder_decoder if language.is_encoder_decoder else collate_packed
        batch = collate(rows, assembly.prompts.tokenizer.pad_token_id).to(assembly.model.device)
        assert batch.labels is not None
        embeds = assembly.model.place(batch, self._vectors(asked), self._read_answers(pairs_of(rows)))
        tokens = language.label_log_probs(embeds, batch.attention_mask, batch.labels, position_ids=batch.position_ids)
        lengths = [len(branch.answer) for row in rows for branch in row.packed_answers]
        whole = iter(part.sum().item() for part in tokens.split(lengths))
        return [[next(whole) for _ in row.packed_answers] for row in rows]

    def _prefixes(
        self, asked: Sequence[Request], stopped: Callable[[], bool] | None = None
    ) -> list[PrefixCache | None]:
        """Keys and values over each prompt's shared part; None for a prompt without pictures."""
        keys = [self._key(one) for one in asked]
        waiting = {
            key: one for key, one in zip(keys, asked, strict=True) if one.images and not self._touch(key)
        }  # each once
        # kept apart: what is answered for others while these are read may have it forgotten
        found = {key: cast(PrefixCache, self._kept[key]) for key in keys if key in self._kept}
        by_length: dict[int, list[tuple[_Key, Request]]] = {}
        for key, one in waiting.items():
            by_length.setdefault(len(one.prompt.shared), []).append((key, one))
        pad, device = self.assembly.prompts.tokenizer.pad_token_id, self.assembly.model.device
        for alike in by_length.values():
            prompts = [Prompt(one.prompt.shared, (), one.prompt.num_images) for _, one in alike]
            vectors = self._vectors([one for _, one in alike])
            read = self.assembly.model.prefill(collate_prompts(prompts, pad).to(device), vectors, stopped=stopped)
            known = dict(zip([key for key, _ in alike], read, strict=True))
            found |= known
            self._kept |= known
        return [found.get(key) for key in keys]

    def _vectors(self, asked: Sequence[Request]) -> Tensor:
        """Vectors of all the pictures of a batch, [I, Q, D_l] in reading order; each is computed once."""
        wanted = [
            (("vectors", image.digest(), self._read_with(one)), image, one.prompt.instruction)
            for one in asked
            for image in one.images
        ]
        waiting = {key: (image, text) for key, image, text in wanted if not self._touch(key)}
        if waiting:
            images, texts = zip(*waiting.values(), strict=True)
            features = self.assembly.features(images)
            self._kept |= zip(waiting, self.assembly.image_embeddings(images, texts, features), strict=True)
            self._look(images, features)
        return torch.stack([cast(Tensor, self._kept[key]) for key, _, _ in wanted]) if wanted else self._none()

    def _look(self, images: Sequence[ImageRef], features: Sequence[Tensor]) -> None:
        """Keep what the reader sees of pictures, if it reads the questions about them."""
        if (reader := self.assembly.answer_reader) is not None:
            keys = [("numbers", image.digest()) for image in images]
            self._kept |= zip(keys, reader.look(features), strict=True)

    def _read_answers(self, asked: Sequence[tuple[ImageRef, str]]) -> Tensor | None:
        """What the reader answers to questions about pictures, [B, S, D_l] in reading order."""
        if self.assembly.answer_reader is None:
            return None
        images = {image.digest(): image for image, _ in asked}
        waiting = [image for digest, image in images.items() if not self._touch(("numbers", digest))]
        if waiting:
            self._look(waiting, self.assembly.features(waiting))
        numbers = {digest: cast(Tensor, self._kept["numbers", digest]) for digest in images}
        return self.assembly.read_answers(asked, numbers)

    def _none(self) -> Tensor:
        model = self.assembly.model
        return torch.empty(0, model.num_queries, model.language.width, device=model.device)

    def _key(self, asked: Request) -> _Key:
        digests = tuple(image.digest() for image in asked.images)
        return ("prefix", digests, self._read_with(asked), asked.prompt.shared)

    def _read_with(self, asked: Request) -> str:
        """What the bridge reads beside a picture."""
        return asked.prompt.instruction if self.assembly.reads_instructions else ""

    def _touch(self, key: _Key) -> bool:
        """Whether something is kept; it counts as used now."""
        if key not in self._kept:
            return False
        self._kept.move_to_end(key)
        return True

    def _forget(self) -> None:
        """Let go of what has not been used for longest, until the rest fits."""
        held = sum(entry.nbytes for entry in self._kept.values())
        while held > self.keep_bytes and self._kept:
            held -= self._kept.popitem(last=False)[1].nbytes


def _parts(items: Sequence[Item], most: int, length: Callable[[Item], int]) -> list[list[Item]]:
    """Items in their order, cut into parts of a summed length; a longer one is a part of its own."""
    parts: list[list[Item]] = []
    held = most
    for item in items:
        if held + length(item) > most:
            parts.append([])
            held = 0
        parts[-1].append(item)
        held += length(item)
    return parts
