"""Self-critical training: captions are sampled, and each is learned by how much better it is than its siblings.

Rennie et al. 2017 (arXiv 1612.00563), with the mean reward of a picture's other samples as the baseline (Luo 2020,
arXiv 2003.09971) in place of the greedy caption's. The reward is CIDEr-D against the picture's own captions, with
weights from all training captions; a caption's end counts as a word, or none would be learned.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch

from adapters.data.batches import Step
from adapters.data.collate import PackedAnswer
from adapters.data.examples import DataSet, Example
from adapters.data.image_ref import ImageRef
from adapters.data.prompts import Prompt
from adapters.evaluation.caption_tokens import caption_tokens
from adapters.evaluation.captions import Cider, score_captions
from adapters.inference.answering import answer_examples
from adapters.inference.generator import Generator
from adapters.inference.request import Request
from adapters.loading.assembly import Assembly
from adapters.training.sharing import shared
from qformer.decoding import Decoding
from qformer.errors import UserError

SAMPLING = Decoding(max_new_tokens=30, temperature=1.0)  # from the very distribution that is trained
TOGETHER = 160  # captions sampled at once
_END = "<end>"
_Key = tuple[tuple[str, ...], str]
_Words = tuple[str, ...]


class SelfCriticalSampler:
    """Samples captions from the model as it is and weighs them.

    Args:
        assembly: what is trained.
        data: its training data; captions are the references.
        samples: captions sampled of a picture, at least two.

    Raises:
        UserError: the data have no captions, there are fewer than two samples, or the LLM is an encoder-decoder.
    """

    def __init__(self, assembly: Assembly, data: DataSet, samples: int) -> None:
        check_self_critical(data, samples, encoder_decoder=assembly.model.language.is_encoder_decoder)
        self.assembly = assembly
        self.samples = samples
        self._references: dict[_Key, list[_Words]] = defaultdict(list)
        for example in data.examples:
            if (example.task or data.task) == "caption":
                key = _key(example.images, example.language)
                self._references[key] += [self._words(text, example.language) for text in example.answers]
        languages = {language for _, language in self._references}
        self._ciders = {
            language: Cider([texts for (_, other), texts in self._references.items() if other == language])
            for language in languages
        }

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # as validations: many shapes
    def rewrite(self, step: Step) -> tuple[Step, float]:
        """Put sampled captions, weighed, in the place of a step's own; other answers stay as they are.

        Returns:
            The step, and the mean reward of what was sampled (0 if it has no caption).
        """
        rows = step.rows
        wanted = [
            (number, branch)
            for number, row in enumerate(rows)
            for branch in {
                branch.caption: branch for branch in row.packed_answers if branch.caption is not None
            }.values()
            for _ in range(self.samples)
        ]
        asked = [
            Request(Prompt(row.shared, branch.own, len(row.images), branch.instruction), row.images)
            for row, branch in ((rows[number], branch) for number, branch in wanted)
        ]
        generator = Generator(self.assembly)
        written: list[tuple[int, ...]] = []
        for start in range(0, len(asked), TOGETHER):
            written += generator.write(asked[start : start + TOGETHER], SAMPLING)
        self.assembly.model.train()

        learned: dict[int, list[PackedAnswer]] = defaultdict(list)
        rewards: list[float] = []
        for start in range(0, len(wanted), self.samples):
            number, branch = wanted[start]
            siblings = written[start : start + self.samples]
            found = [self.reward(ids, rows[number].images, branch.caption or "") for ids in siblings]
            rewards += found
            for ids, reward in zip(siblings, found, strict=True):
                baseline = (sum(found) - reward) / (self.samples - 1)
                learned[number].append(replace(branch, answer=ids, weight=reward - baseline))
        kept = tuple(
            replace(row, packed_answers=(*learned[number], *(one for one in row.packed_answers if one.caption is None)))
            for number, row in enumerate(rows)
        )
        return Step(kept), sum(rewards) / max(len(rewards), 1)

    def reward(self, ids: Sequence[int], images: tuple[ImageRef, ...], language: str) -> float:
        """CIDEr-D of a sampled caption."""
        stops = set(self.assembly.model.language.stop_ids)
        text = self.assembly.prompts.decode([token for token in ids if token not in stops])
        said = self._words(text, language) if ids[-1] in stops else tuple(caption_tokens(text, language))
        return self._ciders[language].score(said, self._references[_key(images, language)])

    @staticmethod
    def _words(text: str, language: str) -> _Words:
        return (*caption_tokens(text, language), _END)


def greedy_cider(assembly: Assembly, examples: Sequence[Example], task: str) -> float:
    """CIDEr of greedy captions of the examples' pictures, the mean over languages; 0 if none is a caption."""
    captions: dict[str, dict[tuple[str, ...], tuple[Example, list[str]]]] = defaultdict(dict)
    for example in examples:
        if (example.task or task) == "caption":
            digests, language = _key(example.images, example.language)
            captions[language].setdefault(digests, (example, []))[1].extend(example.answers)
    found = []
    for language, pictures in captions.items():
        asked = [example for example, _ in pictures.values()]
        answer = partial(answer_examples, assembly, task="caption", decoding=Decoding(max_new_tokens=30))
        said = shared(asked, answer)
        found.append(score_captions(said, [texts for _, texts in pictures.values()], language=language)["CIDEr"])
    return sum(found) / max(len(found), 1)


def check_self_critical(data: DataSet, samples: int, *, what: str = "data", encoder_decoder: bool = False) -> None:
    """Report before training that there is nothing to sample or to compare.

    Raises:
        UserError: as `SelfCriticalSampler`.
    """
    problem = None
    if samples < 2:
        problem = (
            "a sample is weighed by the others of its picture: take at least 2, or 0 to learn the captions as they are"
        )
    elif not any((example.task or data.task) == "caption" for example in data.examples):
        problem = f"the {what} have no captions to weigh samples by; set it to 0"
    elif encoder_decoder:
        problem = "it is for causal LLMs; set it to 0"
    if problem is not None:
        raise UserError(f"train.self_critical={samples}: {problem}")


def _key(images: tuple[ImageRef, ...], language: str) -> _Key:
    return tuple(image.content_digest() for image in images), language
