"""The model card of an artefact, written from what was measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from adapters.artefact.facts import Facts
from adapters.recipe import Recipe, TowerSection


def write_card(recipe: Recipe, facts: Facts, name: str, *, grounding_terms: Sequence[str] | None = None) -> str:
    """The card as Markdown.

    Args:
        recipe: of the artefact.
        facts: likewise.
        name: what it is called.
        grounding_terms: of the data of its head for phrases; None if it has none.
    """
    towers = " and ".join(_tower(tower) for tower in recipe.vision.towers)
    bits = {"nf4": "4-bit NF4", "int8": "8-bit LLM.int8", "none": "unquantised"}[recipe.language.quantize]
    lora = recipe.language.lora
    lines = [
        f"# {name}",
        "",
        recipe.description or f"A querybridge adapter for {recipe.task}.",
        "",
        "| part | what |",
        "|---|---|",
        f"| image encoder, frozen | {towers} |",
        f"| bridge, trained | {_bridge(recipe)} |",
        *(
            [
                f"| language model, frozen | `{recipe.language.source}`, {bits} |",
                f"| LoRA, trained | {f'rank {lora.rank}, alpha {lora.alpha}, {lora.targets}' if lora else 'none'} |",
            ]
            if facts.kind == "language"
            else ["| language model | none: this is the first stage (BLIP-2, section 3.2) |"]
        ),
        *(
            []
            if grounding_terms is None
            else [f"| head for phrases, trained apart | its terms: {'; '.join(grounding_terms) or 'not stated'} |"]
        ),
        *([f"| mean of the weights of | {_shares(facts.averaged)} |"] if facts.averaged else []),
        f"| started from | {_origin(facts)} |",
        f"| steps | {facts.steps} |",
        "",
        "## Data",
        "",
        *[f"- {key}: {value}" for key, value in facts.data.items()],
        f"- terms: {'; '.join(facts.terms) or 'not stated: they are those of the data it was trained on'}",
        "",
        "## Measured",
        "",
    ]
    if facts.metrics:
        lines += ["| figure | value |", "|---|---|"]
        lines += [f"| {key} | {value:.4g} |" for key, value in facts.metrics.items()]
    else:
        lines.append("Nothing was measured.")
    lines += [
        "",
        "## Use",
        "",
        "```",
        f'querybridge {"reason" if recipe.task == "reason" else "ask"} PICTURE "QUESTION" --adapter THIS_FOLDER'
        if facts.kind == "language"
        else 'querybridge search FOLDER "TEXT" --adapter THIS_FOLDER',
        "```",
        "",
        "The frozen parts are not in this folder; they are fetched by name and checked against the fingerprints in"
        " `artefact.json`.",
        "",
    ]
    return "\n".join(lines)


def _origin(facts: Facts) -> str:
    if facts.imported is not None:
        return f"nothing: it is `{facts.imported}` as it was published"
    return facts.started_from or "fresh weights"


def _shares(averaged: Mapping[str, float]) -> str:
    return ", ".join(f"{name} ({share:g})" for name, share in averaged.items())


def _tower(tower: TowerSection) -> str:
    more = f", with the difference `{tower.difference}`" if tower.difference else ""
    more += f", at {tower.image_size} px" if tower.image_size else ""
    return f"`{tower.source}` (layer {tower.layer}{more})"


def _bridge(recipe: Recipe) -> str:
    bridge = recipe.bridge
    if bridge.kind != "qformer":
        return f"no Q-Former: {bridge.kind} and a linear layer"
    text = ", with its text side" if bridge.text_branch else ""
    return f"Q-Former, preset {bridge.preset}, started from `{bridge.start}`{text}"
