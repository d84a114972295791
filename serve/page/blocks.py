"""The page's frame: what programs send in the wrong form is told in one line, with no traceback in the log."""

from __future__ import annotations

from typing import Any

import gradio as gr
from pydantic import ValidationError


class Page(gr.Blocks):
    """Gradio's frame, which else takes a malformed argument for a fault of ours."""

    async def preprocess_data(self, *values: Any, **named: Any) -> Any:
        """Arguments as the page's functions get them.

        Raises:
            gr.Error: one of them is not of its form, or there are too few.
        """
        try:
            return await super().preprocess_data(*values, **named)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"])) or "it"
            raise gr.Error(f"An argument is malformed: {place}: {first['msg']}", print_exception=False) from error
        except ValueError as error:
            if "enough input values" not in str(error):
                raise
            said = str(error).split("\n", 1)[0].strip()
            raise gr.Error(f"Arguments are missing: {said}", print_exception=False) from error
