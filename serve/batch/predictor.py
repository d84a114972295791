"""What answers a batch of examples, the same in a plain loop, in a process of its own and as an actor of a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from adapters.data.batches import prompt_for
from adapters.data.examples import Example
from adapters.data.image_ref import ImageRef
from adapters.data.images import open_image
from adapters.inference.generator import Generator
from adapters.inference.reasoned_answer import ReasonedAnswer, ballots, elect
from adapters.inference.reasoning import trained_reasoning_mode
from adapters.inference.request import Completion, Request, ranked
from qformer.decoding import Decoding
from qformer.errors import UserError
from serve.adapter import LoadedAdapter, load_adapter, picture_ref
from serve.batch.asking import Asking, Facts, Fields
from serve.reasoning import asked_answer, asked_rationale

_LONG = 1024  # tokens of a prompt that is answered by itself


class VQAPredictor:
    """Answers a batch of columns; the same class serves a plain loop and a worker of a data engine.

    Args:
        adapter: a run's folder, an artefact's folder or a shipped name.
        decoding: how tokens are chosen, for every task or by task; left out, as the adapter usually does.
        batch_size: prompts generated together.
        options: as `serve.adapter.load_adapter` takes them.
    """

    def __init__(
        self,
        adapter: str | Path | None = None,
        *,
        decoding: Decoding | Mapping[str, Decoding] | None = None,
        batch_size: int = 64,
        **options: Any,
    ) -> None:
        self.engine: LoadedAdapter = load_adapter(adapter, **options)
        self.decoding = decoding
        self.batch_size = batch_size

    def __call__(self, batch: Mapping[str, Sequence[Any]]) -> dict[str, Any]:
        """Columns "image" (path, bytes or data URI, or a list of them) and "question" in.

        Out come these and "answer" and "confidence".

        Raises:
            UserError: a column is missing, or a picture cannot be read.
        """
        for column in ("image", "question"):
            if column not in batch:
                raise UserError(f"batch: there is no column '{column}'; rename yours to it")
        examples = []
        for row, (image, question) in enumerate(zip(batch["image"], batch["question"], strict=True)):
            chosen = image if isinstance(image, list | tuple) else [image]
            pictures = tuple(replace(picture_ref(picture), where=f"row {row}") for picture in chosen)
            examples.append(Example(pictures, str(question), (), where=f"row {row}", id=str(row)))
        said = self.predict(examples)
        return {**batch, "answer": [one.text for one in said], "confidence": [one.confidence for one in said]}

    def predict(self, examples: Sequence[Example], task: str = "vqa") -> list[Completion]:
        """Answers to examples, in their order.

        Raises:
            UserError: a picture cannot be read, or a question is longer than the language model reads.
        """
        said: dict[int, Completion] = {}
        for part in self.plan(examples, Asking(task)):
            said |= zip(part, self._replies([examples[place] for place in part], task), strict=True)
        return [said[place] for place in range(len(examples))]

    def facts(self, asking: Asking) -> Facts:
        """What answers, for the job's file.

        Raises:
            UserError: the adapter was not taught to do what is asked.
        """
        if asking.task == "reason":
            thinks = trained_reasoning_mode(self.engine.assembly) == "two-stage"
            ballots(self.decoding_for("reason"), asking.votes, thinks=thinks)
        dtype = str(self.engine.assembly.model.language.compute_dtype).removeprefix("torch.")
        return Facts(self.engine.name, self.engine.fingerprint(), asdict(self.decoding_for(asking.task)), dtype)

    def prepare(self, examples: Sequence[Example]) -> None:
        """Have the features of the examples' pictures on disk."""
        if images := [image for example in examples for image in example.images]:
            for cache in self.engine.assembly.caches:
                cache.load(images)  # not `fill`, which would hold the features of the whole job in the cache

    def check(self, example: Example, asking: Asking) -> None:
        """See that the pictures of an example can be opened, and that its prompt is not too long.

        Raises:
            UserError: one cannot, or it is.
        """
        for image in example.images:
            open_image(image, where=example.where)  # the row of its own, not the first that names the picture
        self.check_length(example, asking.task, asking.rationale_tokens)

    def check_length(self, example: Example, task: str, rationale_tokens: int | None = None) -> int:
        """The tokens of an example's prompt.

        Raises:
            UserError: they are more than the language model reads, or no prompt can be made.
        """
        if task == "reason":
            longest = rationale_tokens or self.engine.assembly.rationale_tokens
            try:
                return len(asked_rationale(self.engine, example, longest=longest).prompt.ids)
            except UserError as error:
                raise UserError(_at(example, error)) from None
        prompt = prompt_for(example, task, self.engine.assembly.prompts)
        try:
            self.engine.check_length(Request(prompt, example.images))
        except UserError as error:
            raise UserError(f"{example.where}: {error}") from None
        return len(prompt.ids)

    def plan(self, examples: Sequence[Example], asking: Asking) -> list[list[int]]:
        """Which examples are generated together: those on one picture, up to the batch size; a long one by itself.

        Raises:
            UserError: a prompt is too long.
        """
        lengths = [self.check_length(example, asking.task, asking.rationale_tokens) for example in examples]
        groups: dict[tuple[str, ...], list[int]] = {}  # by pictures, in the order of their first row
        parts: list[list[int]] = []
        for place, (example, length) in enumerate(zip(examples, lengths, strict=True)):
            if length > _LONG:
                parts.append([place])  # the others need no such padding
            else:
                groups.setdefault(tuple(image.digest() for image in example.images), []).append(place)
        size = max(1, self.batch_size // self.decoding_for(asking.task).num_beams)
        flat = [place for places in groups.values() for place in places]
        parts += [flat[start : start + size] for start in range(0, len(flat), size)]
        return sorted(parts, key=min)

    def answer(self, examples: Sequence[Example], asking: Asking) -> list[Fields]:
        """Answers to some examples of `plan`, as a line's fields: one call of the language model, or one a stage.

        Raises:
            UserError: a picture cannot be read.
        """
        if asking.task == "reason":
            return self._thoughts(examples, asking)
        found: dict[int, Fields] = {}
        listed = {place: asking.choices or example.choices for place, example in enumerate(examples)}
        if chosen := [place for place, choices in listed.items() if choices]:
            asked = [
                Request(prompt_for(examples[place], asking.task, self.engine.assembly.prompts), examples[place].images)
                for place in chosen
            ]
            shares = Generator(self.engine.assembly).choose(asked, [listed[place] for place in chosen])
            found |= {place: _choice(listed[place], share) for place, share in zip(chosen, shares, strict=True)}
        if written := [place for place, choices in listed.items() if not choices]:
            said = self._replies([examples[place] for place in written], asking.task)
            found |= {place: self._written(one, asking) for place, one in zip(written, said, strict=True)}
        return [found[place] for place in range(len(examples))]

    def decoding_for(self, task: str) -> Decoding:
        """How tokens are chosen for "vqa", "caption" or "reason"."""
        if isinstance(self.decoding, Decoding):
            return self.decoding
        return (self.decoding or {}).get(task) or self.usual_decoding(task)

    def usual_decoding(self, task: str) -> Decoding:
        """How tokens are chosen if nobody says otherwise: reasons greedily, the rest as the adapter does."""
        return Decoding() if task == "reason" else self.engine.default_decoding(task)

    def _replies(self, examples: Sequence[Example], task: str) -> list[Completion]:
        return self.engine.reply(examples, task, decoding=self.decoding_for(task), batch_size=self.batch_size)

    def _written(self, said: Completion, asking: Asking) -> Fields:
        fields: Fields = {"answer": said.text, "confidence": said.confidence}
        if asking.logprobs:
            decode = self.engine.assembly.prompts.tokenizer.decode
            fields["logprobs"] = [
                {"token": decode([token]), "logprob": log_prob} for token, log_prob in said.token_log_probs
            ]
        return fields

    def _thoughts(self, examples: Sequence[Example], asking: Asking) -> list[Fields]:
        """Reasons, and the answers from them (`serve.reasoning.reason`, for many at once)."""
        thinks = trained_reasoning_mode(self.engine.assembly) == "two-stage"
        rounds = ballots(self.decoding_for("reason"), asking.votes, thinks=thinks)
        said = [self._thoughts_once(examples, asking, ballot, thinks=thinks) for ballot in rounds]
        if asking.votes == 1:
            return said[0]
        elected = (elect([ReasonedAnswer(**fields) for fields in votes]) for votes in zip(*said, strict=True))
        return [{name: value for name, value in vars(one).items() if value is not None} for one in elected]

    def _thoughts_once(
        self, examples: Sequence[Example], asking: Asking, thinking: Decoding, *, thinks: bool
    ) -> list[Fields]:
        engine, decoding = self.engine, self.decoding_for("reason")
        generator = Generator(engine.assembly)
        rationales = [""] * len(examples)
        if thinks:
            longest = asking.rationale_tokens or engine.assembly.rationale_tokens
            first = [asked_rationale(engine, example, longest=longest) for example in examples]
            rationales = [one.text for one in generator(first, _fitted(engine, first, thinking, longest))]
        asked = [asked_answer(engine, example, text) for example, text in zip(examples, rationales, strict=True)]
        listed = [asking.choices or example.choices for example in examples]
        found: dict[int, Fields] = {}
        if chosen := [place for place, choices in enumerate(listed) if choices]:
            worded = [[engine.assembly.prompts.choice(one, listed[place]) for one in listed[place]] for place in chosen]
            shares = generator.choose([asked[place] for place in chosen], worded)
            found |= {place: _choice(listed[place], share) for place, share in zip(chosen, shares, strict=True)}
        if written := [place for place, choices in enumerate(listed) if not choices]:
            open_ended = [asked[place] for place in written]
            said = generator(open_ended, _fitted(engine, open_ended, decoding, decoding.max_new_tokens))
            found |= {place: self._written(one, asking) for place, one in zip(written, said, strict=True)}
        return [{"rationale": text, **found[place]} for place, text in enumerate(rationales)]


def _fitted(engine: LoadedAdapter, asked: Sequence[Request], decoding: Decoding, longest: int) -> Decoding:
    """The decoding with room for the longest of some prompts."""
    wanted = replace(decoding, max_new_tokens=longest)
    room = min(engine.fit_decoding(one, wanted).max_new_tokens for one in asked)
    return replace(wanted, max_new_tokens=room)


def _choice(choices: Sequence[str], shares: Sequence[float]) -> Fields:
    """The likeliest choice, with its probability and those of all."""
    by_share = ranked(choices, shares)
    best = next(iter(by_share))
    return {"answer": best, "confidence": by_share[best], "choices": by_share}


def _at(example: Example, error: UserError) -> str:
    """A message with its row before it, once."""
    text = str(error)
    return text if text.startswith(example.where) else f"{example.where}: {text}"


class EmbeddingPredictor:
    """Embeds pictures with the first stage, as `querybridge search` compares them; no language model is loaded.

    Args:
        adapter: a run's folder, an artefact's folder or a shipped name.
        batch_size: pictures computed together.
        options: as `serve.retrieval.load_retriever` takes them.
    """

    def __init__(self, adapter: str | Path | None = None, *, batch_size: int = 64, **options: Any) -> None:
        from serve.retrieval import load_retriever

        self.retriever, self._key = load_retriever(adapter, **options)
        self.name = str(adapter) if adapter is not None else "default"
        self.batch_size = batch_size
        self._dtype = str(options.get("dtype") or "float32")  # as `load_retriever` has it

    def facts(self, asking: Asking) -> Facts:
        """What embeds, for the job's file."""
        return Facts(self.name, str(self._key), {}, self._dtype)

    def prepare(self, examples: Sequence[Example]) -> None:
        """Have the features of the examples' pictures on disk."""
        if images := [image for example in examples for image in example.images]:
            self.retriever.vision_side.features(images)

    def check(self, example: Example, asking: Asking) -> None:
        """See that an example's picture can be opened, and that it is one.

        Raises:
            UserError: it cannot, or there are several.
        """
        _one_picture(example)
        for image in example.images:
            open_image(image, where=example.where)

    def plan(self, examples: Sequence[Example], asking: Asking) -> list[list[int]]:
        """Pictures in the order of the rows."""
        for example in examples:
            _one_picture(example)
        places = range(len(examples))
        return [list(places[start : start + self.batch_size]) for start in range(0, len(examples), self.batch_size)]

    def answer(self, examples: Sequence[Example], asking: Asking) -> list[Fields]:
        """The unit vectors of the examples' pictures: [Q, E] each, as lists."""
        vectors = self.retriever.embed_images([example.images[0] for example in examples])  # [B, Q, E]
        return [{"embedding": [[round(x, 6) for x in query] for query in one]} for one in vectors.tolist()]


def _one_picture(example: Example) -> ImageRef:
    if len(example.images) != 1:
        raise UserError(f"{example.where}: {len(example.images)} pictures; --task embed takes one a row")
    return example.images[0]
