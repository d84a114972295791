"""The `querybridge` command: a thin shell over the Python calls of the same names.

Nothing heavy is imported before a command needs it, so `--help` answers at once.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Annotated, Any

import typer

from qformer.errors import UserError
from serve.cli import (
    batch,
    cache,
    data,
    demo,
    evaluate,
    export,
    ground,
    import_,
    look,
    push,
    reason,
    search,
    serve,
    train,
)
from serve.cli.common import (
    AdapterOption,
    BeamsOption,
    ChoicesOption,
    DeviceOption,
    DtypeOption,
    JsonOption,
    MaxTokensOption,
    OfflineOption,
    PresetOption,
    check_pictures,
    decoding_over,
    report,
    split_list,
)

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
app.command()(evaluate.evaluate)
app.command()(evaluate.compare)
app.command()(batch.batch)
app.command()(reason.reason)
app.command()(search.search)
app.command()(search.classify)
app.command()(look.look)
app.command()(ground.ground)
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
    show: Annotated[
        Path | None, typer.Option("--show", help="A .png or .jpg to write: where what the answer names is.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    offline: OfflineOption = False,
    as_json: JsonOption = False,
) -> None:
    """Ask a question about one or several pictures."""
    from adapters.inference.request import LOW
    from serve.adapter import checked_choices, load_adapter, user_turn

    *images, question = pictures
    if not images:
        raise UserError(f'ask: only "{question}" was given; write querybridge ask IMAGE "QUESTION"')
    ground.check_drawing(show, "--show")
    if show is not None and len(images) > 1:
        raise UserError(f"--show {show}: it goes with one picture, and {len(images)} were given")
    check_pictures(images)
    user_turn(images, question)  # a mistake is reported before the models are loaded
    asked = {"images": images, "question": question}
    if choices is not None:
        if decoding is not None or beams is not None or max_new_tokens is not None:
            raise UserError("--choices gives each its probability and writes nothing: leave the decoding's flags out")
        named = checked_choices(split_list(choices, "--choices"), where="--choices")
        loaded = load_adapter(adapter, device=device, dtype=dtype, offline=offline)
        shares = loaded.choose(images, question, named)
        lines = "\n".join(f"{share:6.1%}  {choice}" for choice, share in shares.items())
        shown, where = ground.show_answer(loaded, images[0], next(iter(shares)), show)
        report({**asked, "answer": next(iter(shares)), "choices": shares, **shown}, as_json, lines + where)
        return
    over = decoding_over(decoding, beams, max_new_tokens)
    loaded = load_adapter(adapter, device=device, dtype=dtype, offline=offline)
    said = loaded.complete(images, question, decoding=over(loaded.default_decoding("vqa")))
    shown, where = ground.show_answer(loaded, images[0], said.text, show)
    if said.confidence < LOW and not as_json:
        typer.echo(f"low confidence ({said.confidence:.0%}): check it", err=True)
    report({**asked, "answer": said.text, "confidence": said.confidence, **shown}, as_json, said.text + where)


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
    """Keep the libraries' chatter off the terminal, their errors apart, and their waiting threads off the cores.

    To be called before torch is imported.
    """
    # Threads that wait for each other spin for a short time only: beside two busy processes encoding is three times as
    # fast as with the usual long spin, on idle cores training is slower by a sixth; without any spin, by a third.
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "20000")
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
