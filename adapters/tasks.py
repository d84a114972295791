"""The names of tasks and of the stages of reasoning, as recipes, data and prompts use them."""

from __future__ import annotations

from typing import Literal

Task = Literal["vqa", "caption", "reason"]
"""What a row is for."""
Mixed = Literal["mixed"]
"""The task of a recipe or a data set whose rows name their own."""
Stage = Literal["rationale", "answer", "direct"]
"""What a row with reasons is asked: for them; for the answer, with them; for the answer without them."""
