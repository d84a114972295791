"""The `querybridge` command: a thin shell over the Python calls of the same names.

Nothing heavy is imported before a command needs it, so `--help` answers at once.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from qformer.errors import UserError
from serve.cli import batch, cache, data, demo, export, import_, look, push, reason, search, serve, train
from serve.cli.common import (
    AdapterOption,
    AnswerAdapterOption,
    BeamsOption,
    ChoicesOption,
    ColumnsOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    LimitOption,
    MaxTokensOption,
    OfflineOption,
    PresetOption,
    QuietOption,
    RationaleTokensOption,
    SkipOption,
    check_pictures,
    columns_of,
    decoding_over,
    progress,
    report,
    split_list,
)
from serve.cli.scores import describe_scores

app = typer.Typer(
    help="A Q-Former bridges a frozen image encoder and a frozen 4-bit LLM: train it, ask it, serve it.",
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.command()(train.finetune)
app.command()(train.pretrain)
app.command("import")(import_.import_)
app.command()(export.export)
app.command()(push.push)
app.command()(batch.batch)
app.command()(reason.reason)
app.command()(search.search)
app.command()(search.classify)
app.command()(look.look)
app.command()(demo.demo)
app.command()(serve.serve)
app.add_typer(data.app, name="data")
app.add_typer(cache.app, name="cache")


@app.command()
def ask(
    pictures: Annotated[list[str], typer.Argument(metavar="IMAGE... QUESTION", help="Pictures, then one question.")],
    adapter: AdapterOption = None,
    choices: ChoicesOption = None,
    decoding: PresetOption = None,
    beams: BeamsOption = None,
    max_new_tokens: MaxTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ask a question about one or several pictures."""
    from serve.adapter import checked_choices, load_adapter, user_turn

    *images, question = pictures
    if not images:
        raise UserError(f'ask: only "{question}" was given; write querybridge ask IMAGE "QUESTION"')
    check_pictures(images)
    user_turn(images, question)  # a mistake is reported before the models are loaded
    asked = {"images": images, "question": question}
    if choices is not None:
        if decoding is not None or beams is not None or max_new_tokens is not None:
            raise UserError("--choices gives each its probability and writes nothing: leave the decoding's flags out")
        named = checked_choices(split_list(choices, "--choices"), where="--choices")
        shares = load_adapter(adapter, device=device, dtype=dtype, offline=offline).choose(images, question, named)
        lines = "\n".join(f"{share:6.1%}  {choice}" for choice, share in shares.items())
        report({**asked, "answer": next(iter(shares)), "choices": shares}, as_json, lines)
        return
    over = decoding_over(decoding, beams, max_new_tokens)
    loaded = load_adapter(adapter, device=device, dtype=dtype, offline=offline)
    said = loaded.complete(images, question, decoding=over(loaded.default_decoding("vqa")))
    report({**asked, "answer": said.text, "confidence": said.confidence}, as_json, said.text)


@app.command()
def caption(
    pictures: Annotated[list[str], typer.Argument(metavar="IMAGE...", help="Pictures to describe, each by itself.")],
    adapter: AdapterOption = None,
    language: Annotated[str, typer.Option("--language", help="en or zh.")] = "en",
    decoding: PresetOption = None,
    beams: BeamsOption = None,
    max_new_tokens: MaxTokensOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Describe pictures."""
    from adapters.data.prompts import check_language
    from serve.adapter import load_adapter

    check_pictures(pictures)
    check_language(language)
    over = decoding_over(decoding, beams, max_new_tokens)
    loaded = load_adapter(adapter, device=device, dtype=dtype, offline=offline)
    how = over(loaded.default_decoding("caption"))
    captions = {picture: loaded.caption(picture, language=language, decoding=how) for picture in pictures}
    lines = list(captions.values()) if len(captions) == 1 else [f"{name}: {text}" for name, text in captions.items()]
    report({"captions": captions, "language": language}, as_json, "\n".join(lines))


@app.command()
def evaluate(
    data: Annotated[str, typer.Argument(help="A data file with answers, easy-vqa:test, or FOLDER:SPLIT of ScienceQA.")],
    adapter: AdapterOption = None,
    task: Annotated[str, typer.Option("--task", help="What to score: vqa, caption, reason or retrieval.")] = "vqa",
    answer_adapter: AnswerAdapterOption = None,
    controls: Annotated[
        bool, typer.Option("--controls", help="For reason: also without reasons, with given ones, without the picture.")
    ] = False,
    blank_images: Annotated[
        bool, typer.Option("--blank-images", help="The control: every picture is replaced by a grey one.")
    ] = False,
    rerank: Annotated[
        bool, typer.Option("--rerank/--no-rerank", help="For retrieval: let ITM rank the best 16 again.")
    ] = True,
    columns: ColumnsOption = None,
    limit: LimitOption = None,
    skip_bad_rows: SkipOption = False,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Prompts generated together.")] = 64,
    decoding: PresetOption = None,
    beams: BeamsOption = None,
    max_new_tokens: MaxTokensOption = None,
    rationale_tokens: RationaleTokensOption = None,
    predictions: Annotated[
        Path | None, typer.Option("--predictions", help="For vqa: a JSONL file to write, an answer a line.")
    ] = None,
    match: Annotated[
        str, typer.Option("--match", help="For vqa: exact, or set: lists with commas, in any order.")
    ] = "exact",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    offline: OfflineOption = False,
    quiet: QuietOption = False,
    as_json: JsonOption = False,
) -> None:
    """Score an adapter on a data set, with what language alone would score beside it."""
    from adapters.data.sources import check_source

    if task not in ("vqa", "caption", "reason", "retrieval"):
        raise UserError(f"--task {task}: take vqa, caption, reason or retrieval")
    if task != "reason" and (controls or answer_adapter is not None or rationale_tokens is not None):
        raise UserError(f"--controls, --answer-adapter and --rationale-tokens go with --task reason, not {task}")
    if task == "retrieval" and not decoding is beams is max_new_tokens is None:
        raise UserError("--decoding, --beams and --max-new-tokens are for what an LLM writes, not for retrieval")
    if task != "retrieval" and not rerank:
        raise UserError(f"--no-rerank goes with --task retrieval, not {task}")
    if task != "vqa" and match != "exact":
        raise UserError(f"--match goes with --task vqa, not {task}")
    named = columns_of(columns)
    check_source(data)
    if match != "exact":
        from serve.evaluate import check_match

        check_match(match)
    if predictions is not None:
        from serve.evaluate import check_predictions

        check_predictions(predictions, data, task)
    on_progress = None if quiet else progress("done")
    if task == "reason":
        from qformer.decoding import Decoding
        from serve.evaluate_reasons import evaluate_reasons
        from serve.reasoning import load_pair

        over = decoding_over(decoding, beams, max_new_tokens)
        first, second = load_pair(adapter, answer_adapter, device=device, dtype=dtype, offline=offline)
        scores = evaluate_reasons(
            first, data, answer_adapter=second, controls=controls, blank_images=blank_images, limit=limit,
            skip_bad_rows=skip_bad_rows, columns=named, offline=offline, batch_size=batch_size,
            rationale_tokens=rationale_tokens, decoding=over(Decoding()), on_progress=on_progress,
        )  # fmt: skip
    elif task == "retrieval":
        from serve.evaluate import evaluate_retrieval
        from serve.retrieval import load_retriever

        retriever, _ = load_retriever(adapter, device=device, dtype=dtype, offline=offline)
        scores = evaluate_retrieval(
            retriever, data, blank_images=blank_images, limit=limit, skip_bad_rows=skip_bad_rows, columns=named,
            offline=offline, rerank=rerank, on_progress=on_progress,
        )  # fmt: skip
    else:
        from serve.adapter import load_adapter
        from serve.evaluate import evaluate as run

        over = decoding_over(decoding, beams, max_new_tokens)
        loaded = load_adapter(adapter, device=device, dtype=dtype, offline=offline)
        scores = run(
            loaded, data, task=task, blank_images=blank_images, limit=limit, skip_bad_rows=skip_bad_rows,
            columns=named, offline=offline, batch_size=batch_size, decoding=over(loaded.default_decoding(task)),
            predictions=predictions, match=match, on_progress=on_progress,
            tell=None if quiet else partial(typer.echo, err=True),
        )  # fmt: skip
    report(scores, as_json, describe_scores(scores))


@app.command()
def models(
    keys: Annotated[bool, typer.Option("--keys", help="List a recipe's keys instead, as --set takes them.")] = False,
    as_json: JsonOption = False,
) -> None:
    """List frozen models that need no hub, recipes and adapters, and which are at hand."""
    from serve.inventory import describe_models, describe_recipe_keys, list_models, list_recipe_keys

    if keys:
        listed = list_recipe_keys()
        report({"keys": listed}, as_json, describe_recipe_keys(listed))
        return
    found = list_models()
    report(found, as_json, describe_models(found))


@app.command()
def doctor(
    target: Annotated[
        str | None, typer.Argument(metavar="[RECIPE_OR_ADAPTER]", help="Also load this and list its modules.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Tell what this machine can do, and of a model what is frozen, quantised and trained."""
    from serve.doctor import describe, examine

    found = examine(target, device=device, dtype=dtype, offline=offline)
    report(found, as_json, describe(found))


@app.command()
def estimate(
    recipe: Annotated[str, typer.Argument(help="A recipe: file or shipped name.")],
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override a recipe's key; may be repeated.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Calculate the memory a recipe needs."""
    from adapters.memory.estimate import describe_estimate, estimate_named

    found = estimate_named(recipe, set_ or [])
    report(found, as_json, describe_estimate(found))


def hush_libraries() -> None:
    """Keep the libraries' chatter off the terminal; their errors still come."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not sys.stderr.isatty() or {"--quiet", "--json"} & set(sys.argv):
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars heed it too
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        import warnings

        warnings.simplefilter("ignore")


def main() -> None:
    """Run the command. Exit codes: 0 done, 2 the user's mistake, 1 a fault of ours, 130 Ctrl-C."""
    hush_libraries()
    try:
        code = app(sys.argv[1:] or ["--help"], prog_name="querybridge", standalone_mode=False) or 0
    except UserError as error:
        print(f"querybridge: {error}", file=sys.stderr)
        code = 2
    except _UsageError as error:
        print(f"querybridge: {_usage_line(error)}", file=sys.stderr)
        code = 2
    except (KeyboardInterrupt, typer.Abort):
        code = 130
    except Exception as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            where = f"{error.filename}: " if error.filename else ""
            print(f"querybridge: {where}{error.strerror}; free space and run it again", file=sys.stderr)
            code = 2
        else:
            traceback.print_exc()
            print(
                "querybridge: this is a fault of querybridge, not yours; please report the lines above", file=sys.stderr
            )
            code = 1
    if code == 130:  # Typer may turn Ctrl-C into this code by itself
        print("querybridge: stopped", file=sys.stderr)
    sys.exit(code)


# The base of all that Typer says about a wrong flag. It has no public name: it lies in click, or in Typer's own copy.
_UsageError: Any = typer.BadParameter.__base__


def _usage_line(error: Any) -> str:
    command = error.ctx.command_path if error.ctx is not None else "querybridge"
    return f"{' '.join(error.format_message().split()).rstrip('.')}; see {command} --help"


if __name__ == "__main__":
    main()
