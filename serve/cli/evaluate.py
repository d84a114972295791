"""`querybridge evaluate` and `compare`: scores of one adapter, and of two on the same questions."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from qformer.errors import UserError
from serve.cli.common import (
    AdapterOption,
    AnswerAdapterOption,
    BeamsOption,
    ColumnsOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    MaxTokensOption,
    OfflineOption,
    OutsideOption,
    PresetOption,
    QuietOption,
    RationaleTokensOption,
    SkipOption,
    VotesOption,
    columns_of,
    decoding_over,
    progress,
    report,
)
from serve.cli.scores import describe_comparison, describe_scores

TASKS = ("vqa", "probes", "caption", "reason", "retrieval", "grounding")
_WRITTEN = ("vqa", "probes", "caption")
_KEPT = (*_WRITTEN, "reason")  # whose answers can be kept


def evaluate(
    data: Annotated[str, typer.Argument(help="A data file with answers, easy-vqa:test, or FOLDER:SPLIT of ScienceQA.")],
    adapter: AdapterOption = None,
    task: Annotated[str, typer.Option("--task", help=f"What to score: {', '.join(TASKS)}.")] = "vqa",
    answer_adapter: AnswerAdapterOption = None,
    controls: Annotated[
        bool,
        typer.Option(
            "--controls",
            help="Also ask about grey pictures and about other rows' pictures; for reason also without reasons and "
            "with given ones; for grounding look for other rows' phrases.",
        ),
    ] = False,
    blank_images: Annotated[
        bool, typer.Option("--blank-images", help="The control: every picture is replaced by a grey one.")
    ] = False,
    against: Annotated[
        str | None, typer.Option("--against", help="For vqa and probes: another adapter, compared on the same rows.")
    ] = None,
    rerank: Annotated[
        bool, typer.Option("--rerank/--no-rerank", help="For retrieval: let ITM rank the best 16 again.")
    ] = True,
    columns: ColumnsOption = None,
    limit: LimitOption = None,
    skip_bad_rows: SkipOption = False,
    allow_outside: OutsideOption = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts generated together.")] = 64,
    decoding: PresetOption = None,
    beams: BeamsOption = None,
    max_new_tokens: MaxTokensOption = None,
    rationale_tokens: RationaleTokensOption = None,
    votes: VotesOption = 1,
    predictions: Annotated[
        Path | None,
        typer.Option(
            "--save-predictions",
            "--predictions",
            help="A JSONL file, an answer a line; not of retrieval or grounding.",
        ),
    ] = None,
    report_file: Annotated[
        Path | None, typer.Option("--report", help="An HTML page, with pictures; not of retrieval or grounding.")
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option("--calibrate", help="For vqa and probes: fit the confidences' temperature, and keep it."),
    ] = False,
    match: Annotated[
        str, typer.Option("--match", help="For vqa: exact, or set: lists with commas, in any order.")
    ] = "exact",
    wordnet: Annotated[
        Path | None, typer.Option("--wordnet", help="For vqa: a folder of WordNet (index.noun, data.noun), for WUPS.")
    ] = None,
    boxes: Annotated[
        Path | None, typer.Option("--boxes", help="For grounding: a JSONL file of the boxes that a model gave.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    offline: OfflineOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score an adapter on a data set, with what language alone would score beside it."""
    from adapters.data.sources import check_source

    if task not in TASKS:
        raise UserError(f"--task {task}: take {', '.join(TASKS[:-1])} or {TASKS[-1]}")
    _check_flags(
        task,
        {
            "--answer-adapter": (answer_adapter, ("reason",)),
            "--rationale-tokens": (rationale_tokens, ("reason",)),
            "--votes": (votes > 1, ("reason",)),
            "--controls": (controls, (*_WRITTEN, "reason", "grounding")),
            "--against": (against, ("vqa", "probes")),
            "--no-rerank": (not rerank, ("retrieval",)),
            "--save-predictions": (predictions, _KEPT),
            "--report": (report_file, _KEPT),
            "--calibrate": (calibrate, ("vqa", "probes")),
            "--match": (match != "exact", ("vqa",)),
            "--wordnet": (wordnet, ("vqa",)),
            "--boxes": (boxes, ("grounding",)),
        },
    )
    if task in ("retrieval", "grounding") and not decoding is beams is max_new_tokens is None:
        raise UserError(f"--decoding, --beams and --max-new-tokens are for what an LLM writes, not for {task}")
    if controls and blank_images:
        raise UserError("--blank-images is one of the --controls; leave it out")
    named = columns_of(columns)
    check_source(data)
    over = decoding_over(decoding, beams, max_new_tokens)
    on_progress = None if quiet else progress("done")
    reading: Any = {
        "limit": limit, "skip_bad_rows": skip_bad_rows, "columns": named, "allow_outside": allow_outside,
        "offline": offline,
    }  # fmt: skip
    loading: Any = {"device": device, "dtype": dtype, "offline": offline}
    if task == "grounding":
        from serve.evaluation.grounding import boxes_of_file, evaluate_grounding, locate_with

        if boxes is not None:
            if adapter is not None or controls or blank_images:
                raise UserError(
                    "--boxes: the file is scored as it is; leave --adapter, --controls and --blank-images out"
                )
            locate = boxes_of_file(boxes)
        else:
            from serve.looking.grounding import NO_HEAD, load_grounder

            grounder = load_grounder(adapter, device=device, offline=offline)
            if not grounder.has_head and not quiet:
                typer.echo(NO_HEAD, err=True)
            locate = locate_with(grounder, on_progress=on_progress)
        scores = evaluate_grounding(locate, data, controls=controls, blank_images=blank_images, **reading)
    elif task == "reason":
        from qformer.decoding import Decoding
        from serve.evaluation.reasons import evaluate_reasons
        from serve.reasoning import load_pair

        first, second = load_pair(adapter, answer_adapter, **loading)
        scores = evaluate_reasons(
            first, data, answer_adapter=second, controls=controls, blank_images=blank_images, batch_size=batch_size,
            rationale_tokens=rationale_tokens, votes=votes, decoding=over(Decoding()), on_progress=on_progress,
            predictions=predictions, report=report_file, **reading,
        )  # fmt: skip
    elif task == "retrieval":
        from serve.evaluation.retrieval import evaluate_retrieval
        from serve.retrieval import load_retriever

        retriever, _ = load_retriever(adapter, **loading)
        scores = evaluate_retrieval(
            retriever, data, blank_images=blank_images, rerank=rerank, on_progress=on_progress, **reading
        )
    else:
        from adapters.artefact.artefact import find_artefact
        from adapters.artefact.facts import keep_temperature
        from adapters.evaluation.wordnet import WordNet
        from serve.adapter import default_adapter, load_adapter
        from serve.evaluation.predictions import check_outputs
        from serve.evaluation.run import check_match
        from serve.evaluation.run import evaluate as run

        check_match(match)
        check_outputs(predictions, report_file, data, task)
        meanings = WordNet(wordnet) if wordnet is not None else None
        loaded = load_adapter(adapter, **loading)
        other = load_adapter(against, **loading) if against is not None else None
        how = over(loaded.default_decoding("caption" if task == "caption" else "vqa"))
        scores = run(
            loaded, data, task=task, blank_images=blank_images, controls=controls, batch_size=batch_size, decoding=how,
            predictions=predictions, report=report_file, match=match, wordnet=meanings, against=other,
            calibrate=calibrate, on_progress=on_progress, tell=None if quiet else partial(typer.echo, err=True),
            **reading,
        )  # fmt: skip
        if calibrate:
            keep_temperature(find_artefact(adapter or default_adapter()), scores["temperature"])
    report(scores, as_json, describe_scores(scores))


def compare(
    first: Annotated[Path, typer.Argument(help="What evaluate --save-predictions wrote of one adapter.")],
    second: Annotated[Path, typer.Argument(help="The same of another adapter, on the same rows.")],
    as_json: JsonOption = False,
) -> None:
    """Compare what two adapters answered to the same rows, with a paired test."""
    from serve.evaluation.predictions import compare_predictions

    found = compare_predictions(first, second)
    report(found, as_json, describe_comparison(found, str(second)))


def _check_flags(task: str, flags: dict[str, tuple[object, tuple[str, ...]]]) -> None:
    """Refuse flags that were given and have no effect on the task."""
    for flag, (given, tasks) in flags.items():
        if given not in (None, False) and task not in tasks:
            raise UserError(f"{flag} goes with --task {', '.join(tasks)}, not {task}")
