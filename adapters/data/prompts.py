"""From a question and its pictures to token ids: the one place where a prompt is worded and tokenised.

Training, evaluation and serving all come through here, so a model is asked in the words it was taught in.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

from adapters.data.answers import LETTERS, choice_letter
from adapters.data.image_ref import ImageRef
from qformer.errors import UserError

IMAGE_MARK = "<image>"
IMAGE_SLOT = -1  # in a list of token ids, the place of one vector of an image
ANSWER_SLOT = -2  # the place of one vector of what a reader answers to the question about an image

REASON_REQUEST = "Think step by step."
ANSWER_REQUEST = "So what is the answer?"
CAPTION_REQUEST = {"en": "Describe the picture.", "zh": "用中文描述这张图片。"}


@dataclass(frozen=True)
class Prompt:
    """A tokenised prompt, cut after its last image.

    Attributes:
        shared: ids up to and with the last image; `IMAGE_SLOT` for each vector of an image. Questions about one
            picture have this part in common, so it is computed once for all of them.
        own: ids after the last image up to where the answer begins; `ANSWER_SLOT` for each vector that a reader of
            questions gives.
        num_images: how many images the slots belong to.
        instruction: the question, or the request for a caption, in words: what an instruction-aware bridge reads.
    """

    shared: tuple[int, ...]
    own: tuple[int, ...]
    num_images: int
    instruction: str = ""

    @property
    def ids(self) -> tuple[int, ...]:
        """The whole prompt."""
        return self.shared + self.own


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: who speaks; "system" only at the beginning.
        text: in words; `<image>` marks say where pictures belong, else they come first.
        images: pictures shown in this turn, in order.
    """

    role: Literal["system", "user", "assistant"]
    text: str
    images: tuple[ImageRef, ...] = ()


@dataclass(frozen=True)
class PromptStyle:
    """How questions are worded.

    Attributes:
        system: system message of the chat template; None leaves the template's own default.
        question: wording around a question, with `{question}`; None takes the default of the model's kind.
        caption: wording of a request for a caption; None takes the default of the model's kind and the language.
        letters: choices are listed with letters, "(A) red (B) blue", and answered by them, "(A)", as ScienceQA's are.

    Raises:
        UserError: the wording around a question has no `{question}`.
    """

    system: str | None = None
    question: str | None = None
    caption: str | None = None
    letters: bool = False

    def __post_init__(self) -> None:
        """Refuse a wording that would leave the question out."""
        if self.question is not None and "{question}" not in self.question:
            raise UserError(
                f"prompt.question is '{self.question}', which asks nothing: write {{question}} where the question goes"
            )


def check_language(language: str) -> None:
    """Raise UserError if captions cannot be asked for in a language."""
    if language not in CAPTION_REQUEST:
        raise UserError(f"--language: '{language}' is not known; take one of {', '.join(CAPTION_REQUEST)}")


class PromptBuilder:
    """Words and tokenises prompts for one LLM.

    A tokenizer with a chat template is asked in it. Others get BLIP-2's prompts (arXiv 2301.12597, section 4):
    `Question: {} Answer:` for a causal LLM, `Question: {} Short answer:` for an encoder-decoder, `a photo of` for
    captions.

    Args:
        tokenizer: the LLM's.
        num_queries: vectors an image becomes.
        answer_vectors: vectors that a reader answers a question with, for each image; they follow the last image.
        is_encoder_decoder: as the LLM says.
        style: the wording.
        end_id: the token that ends an answer; left out, the tokenizer's end token.
    """

    def __init__(
        self,
        tokenizer: Any,
        num_queries: int,
        *,
        answer_vectors: int = 0,
        is_encoder_decoder: bool = False,
        style: PromptStyle | None = None,
        end_id: int | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.end_id: int = tokenizer.eos_token_id if end_id is None else end_id
        self.num_queries = num_queries
        self.answer_vectors = answer_vectors
        self.is_encoder_decoder = is_encoder_decoder
        self.style = style or PromptStyle()
        self.has_template = bool(getattr(tokenizer, "chat_template", None))
        self._control = _any_of(
            {
                *tokenizer.all_special_tokens,
                *(str(one) for one in tokenizer.added_tokens_decoder.values() if one.special),
            }
        )

    @property
    def closing_tokens(self) -> int:
        """End tokens that a plain tokenizer puts behind every prompt, such as T5's one."""
        ids = self._tokens("a", special=True)
        return int(not self.has_template and bool(ids) and ids[-1] == self.tokenizer.eos_token_id)

    def vqa(
        self,
        question: str,
        num_images: int = 1,
        *,
        context: str = "",
        choices: Sequence[str] = (),
        where: str = "question",
    ) -> Prompt:
        """The prompt of a question about pictures; choices have no letters, for they are answered in words."""
        asked = self._asked(question, context, choices, where, letters=False)
        return self._encode(self._question(asked), num_images, where, question)

    def chat(self, turns: Sequence[Turn]) -> Prompt:
        """The prompt of a conversation that ends with the user's turn; of one such turn, that of a question.

        A tokenizer without a chat template gets questions and answers one after the other, as BLIP-2 does
        (arXiv 2301.12597, section 4.1).

        Raises:
            UserError: the last turn is not the user's, a system turn is not the first, or marks and pictures differ.
        """
        if not turns or turns[-1].role != "user":
            raise UserError("messages: the last one must be the user's")
        if any(turn.role == "system" for turn in turns[1:]):
            raise UserError("messages: only the first may be the system's")
        said: list[dict[str, str]] = []
        for number, turn in enumerate(turns, start=1):
            where = f"message {number}"
            text = self._plain(self._question(turn.text) if turn.role == "user" else turn.text.strip(), where)
            said.append({"role": turn.role, "content": _marked(text, len(turn.images), where)})
        count, instruction = sum(len(turn.images) for turn in turns), turns[-1].text
        if not self.has_template:
            around = {"system": "{}\n", "user": "{}", "assistant": " {}\n"}
            return self._split("".join(around[one["role"]].format(one["content"]) for one in said), count, instruction)
        if self.style.system is not None and turns[0].role != "system":
            said.insert(0, {"role": "system", "content": self.style.system})
        return self._split(self._render(said, add_generation_prompt=True), count, instruction)

    def rationale(
        self,
        question: str,
        num_images: int = 1,
        *,
        context: str = "",
        choices: Sequence[str] = (),
        where: str = "question",
    ) -> Prompt:
        """The first stage of a chain of thought (arXiv 2302.00923, section 4): a question that asks for the reasons."""
        asked = self._asked(question, context, choices, where)
        if self.has_template:
            return self._encode(f"{self._question(asked)}\n{REASON_REQUEST}", num_images, where, question)
        self._check_plain_reasons()
        return self._encode(f"Question: {asked} Reasoning:", num_images, where, question)

    def answer(
        self,
        question: str,
        num_images: int = 1,
        *,
        context: str = "",
        choices: Sequence[str] = (),
        rationale: str = "",
        where: str = "question",
    ) -> Prompt:
        """The second stage: the same question with the reasons given; without any, as it is asked directly."""
        asked = self._asked(question, context, choices, where)
        reasons = rationale.replace(IMAGE_MARK, "").strip()  # a model may write what stands for a picture
        if not reasons:
            return self._encode(self._question(asked), num_images, where, question)
        if self.has_template:
            text = f"{self._question(asked)}\nReasoning: {reasons}\n{ANSWER_REQUEST}"
            return self._encode(text, num_images, where, question)
        self._check_plain_reasons()
        closing = "Short answer:" if self.is_encoder_decoder else "Answer:"
        return self._encode(f"Question: {asked} Reasoning: {reasons} {closing}", num_images, where, question)

    def choice(self, answer: str, choices: Sequence[str]) -> str:
        """The words in which an answer is given: itself, or its letter if choices have letters."""
        if not self.style.letters or answer not in choices:
            return answer
        return choice_letter(choices.index(answer))

    def caption(self, language: str = "en", num_images: int = 1, *, where: str = "caption") -> Prompt:
        """The prompt that asks for a caption, in English ("en") or Chinese ("zh")."""
        check_language(language)
        if self.style.caption is not None and language == "en":
            wording = self.style.caption
        elif self.has_template or language != "en":
            wording = CAPTION_REQUEST[language]
        else:
            wording = "a photo of"
        return self._encode(wording, num_images, where, wording)

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of an answer, its end token included."""
        answer = self._plain(answer, "answer")
        if not self.has_template:
            text = answer if self.is_encoder_decoder else " " + answer
            return [*self._tokens(text), self.end_id]
        asked: list[dict[str, str]] = [{"role": "user", "content": "x"}]
        opening = self._render(asked, add_generation_prompt=True)
        whole = self._render([*asked, {"role": "assistant", "content": answer}], add_generation_prompt=False)
        text = whole[len(opening) :].rstrip() if whole.startswith(opening) else ""
        if not text.startswith(answer.strip()):  # a template that rewrites what the assistant said
            return [*self._tokens(answer), self.end_id]
        ids = self._tokens(text)
        return ids if len(text) > len(answer.strip()) else [*ids, self.end_id]

    def decode(self, ids: Sequence[int]) -> str:
        """Generated ids back to text, special tokens left out."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True)).strip()

    def _asked(
        self, question: str, context: str, choices: Sequence[str], where: str, *, letters: bool | None = None
    ) -> str:
        """A question with what belongs to it, a line each if there is a chat template; letters as the style says."""
        letters = self.style.letters if letters is None else letters
        if letters and len(choices) > len(LETTERS):
            raise UserError(f"{where}: {len(choices)} choices and {len(LETTERS)} letters; set prompt.letters to false")
        parts = [question.strip()]
        if context.strip():
            parts.append(f"Context: {context.strip()}")
        if letters and choices:
            parts.append("Choices: " + " ".join(f"{choice_letter(n)} {choice}" for n, choice in enumerate(choices)))
        elif choices:
            parts.append(f"Choices: {', '.join(choices)}")
        return ("\n" if self.has_template else " ").join(parts)

    def _check_plain_reasons(self) -> None:
        """Refuse a wording that ends where the answer begins: reasons have to stand between the two."""
        if self.style.question is not None:
            raise UserError(
                f"prompt.question is '{self.style.question}', which leaves no place for reasons: set it to null, or"
                " take an LLM with a chat template"
            )

    def _question(self, question: str) -> str:
        """A question in the model's own wording."""
        if self.style.question is not None:
            wording = self.style.question
        elif self.has_template:
            wording = "{question}"
        else:
            wording = (
                "Question: {question} Short answer:" if self.is_encoder_decoder else "Question: {question} Answer:"
            )
        return wording.replace("{question}", question.strip())

    def _plain(self, text: str, where: str) -> str:
        """Text that says nothing to the model but its words: what spells a control token is pulled apart.

        Else whoever writes a question could end it and begin a turn in another's name.

        Raises:
            UserError: it holds half a character, which no tokenizer reads.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = text[error.start].encode(errors="backslashreplace").decode()
            raise UserError(f"{where}: the text holds half a character ({half}): write the whole one") from None
        return self._control.sub(lambda found: f"{found[0][:1]} {found[0][1:]}", text)

    def _encode(self, text: str, num_images: int, where: str, instruction: str) -> Prompt:
        text = _marked(self._plain(text, where), num_images, where)
        if self.has_template:
            messages = [{"role": "user", "content": text}]
            if self.style.system is not None:
                messages.insert(0, {"role": "system", "content": self.style.system})
            text = self._render(messages, add_generation_prompt=True)
        return self._split(text, num_images, instruction)

    def _split(self, text: str, num_images: int, instruction: str) -> Prompt:
        """Tokenise a finished text around its marks."""
        pieces = text.split(IMAGE_MARK)
        slots = [IMAGE_SLOT] * self.num_queries
        shared: list[int] = []
        for piece in pieces[:-1]:
            shared += [*self._tokens(piece), *slots]
        # A plain tokenizer's own special tokens (OPT's start, T5's end) go around the text behind the images.
        own = [ANSWER_SLOT] * (self.answer_vectors * num_images)
        own += self._tokens(pieces[-1], special=not self.has_template)
        return Prompt(tuple(shared), tuple(own), num_images, instruction.replace(IMAGE_MARK, "").strip())

    def _render(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        return str(
            self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        )

    def _tokens(self, text: str, *, special: bool = False) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"]) if text or special else []


def words_between(parts: Sequence[str | None]) -> str:
    """A turn's text out of parts, None a picture: it has marks only if there are words between pictures.

    Else pictures come first, wherever they stand: adapters are taught so, and questions about one picture then share
    its keys and values.
    """
    runs = [(shows, list(run)) for shows, run in groupby(parts, key=lambda part: part is None)]
    apart = sum(shows for shows, _ in runs) > 1
    texts = [IMAGE_MARK * len(run) if shows else "\n".join(map(str, run)) for shows, run in runs if apart or not shows]
    return ("" if apart else "\n").join(texts)


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    """Finds control tokens in a text; the mark of a picture is none."""
    longest_first = sorted(tokens - {IMAGE_MARK}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _marked(text: str, num_images: int, where: str) -> str:
    """A text with a mark for each image: its own, or all in front.

    Raises:
        UserError: it has another number of marks.
    """
    marks = text.count(IMAGE_MARK)
    if marks == 0:
        return IMAGE_MARK * num_images + text
    if marks != num_images:
        raise UserError(f"{where}: {marks} {IMAGE_MARK} marks but {num_images} images; make the two numbers equal")
    return text
