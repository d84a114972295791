"""How an answer's tokens are chosen."""

from __future__ import annotations

from dataclasses import dataclass

from qformer.errors import UserError


@dataclass(frozen=True)
class Decoding:
    """How tokens are chosen.

    Attributes:
        max_new_tokens: the longest answer, in tokens of the LLM.
        num_beams: 1 is greedy search, more is beam search.
        length_penalty: exponent on the length that divides the sum of log-probabilities in beam search: 1 ranks by the
            mean over tokens, 0 by the sum, and the lower it is the shorter the answers.
        temperature: 0 never samples; above 0 samples at that temperature (with one beam).
        top_p: nucleus of the sampling.
        repetition_penalty: above 1 discourages tokens already written.
        seed: of the sampling, from -2**63 to 2**63 - 1: the same prompt gets the same answer, alone or beside others;
            None draws from torch's own generator.
    """

    max_new_tokens: int = 32
    num_beams: int = 1
    length_penalty: float = 1.0
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int | None = None

    @classmethod
    def preset(cls, name: str) -> Decoding:
        """Return "greedy", "paper-vqa", "likeliest" or "caption"; the last three search with five beams.

        "paper-vqa" is BLIP-2's (section 4), whose length penalty of -1 favours short answers; "likeliest" ranks
        answers by their probability as a whole. A caption's length penalty is 0.5: with 1, which ranks by the mean over
        tokens, longer captions win, and score lower (docs/photo-adapter.md has the scores).
        """
        presets = {
            "greedy": cls(),
            "paper-vqa": cls(max_new_tokens=10, num_beams=5, length_penalty=-1.0),
            "likeliest": cls(num_beams=5, length_penalty=0.0),
            "caption": cls(max_new_tokens=30, num_beams=5, length_penalty=0.5),
        }
        if name not in presets:
            raise UserError(f"decoding: there is no preset '{name}'; take one of {', '.join(presets)}")
        return presets[name]
