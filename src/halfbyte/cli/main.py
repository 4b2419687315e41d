"""The command line: parse, call, print. Every heavy import is inside a command, so that `--help` is instant.

The only room that prints. A mistake of the user ends with one message and exit code 2, a failed run with 1.
"""

import atexit
import os
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, NoReturn

import typer

from halfbyte.cli import begin, conversation, labels, progress, reports, scores, ship, show, show_plan, train
from halfbyte.cli import options as shared
from halfbyte.cli.options import argument, flag, option
from halfbyte.cli.store import stores
from halfbyte.errors import HalfbyteError, RecipeError, typed
from halfbyte.system import files, libraries

app = typer.Typer(
    name="halfbyte",
    cls=shared.Commands,
    help="Fine-tune a language model at half a byte per weight, on the machine you have.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)

app.add_typer(stores, name="store")
rows = typer.Typer(help="The rows that a model would be trained on.", no_args_is_help=True)
app.add_typer(rows, name="data")
for command in (train.train, train.tune, ship.merge, ship.export, ship.push, ship.serve):
    app.command()(command)
for page in (reports.report, reports.compare, reports.runs):
    app.command()(page)
app.command(name="eval")(scores.evaluate)
app.command(name="studio")(ship.serve_studio)
app.command()(labels.predict)
app.command()(begin.init)
app.command(name="import")(begin.import_config)


def _version(asked: bool) -> None:
    if asked:
        show.text(f"halfbyte {libraries.version('halfbyte')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="The version of halfbyte, and leave.")
    ] = False,
) -> None:
    show.hear()
    show.as_json(False)


@app.command()
def plan(
    target: Annotated[
        str,
        typer.Argument(metavar="MODEL | RECIPE.yaml", help="Hub id, folder, .gguf file, bundled shape, or a recipe."),
    ],
    set_: shared.Set = [],  # noqa: B006  typer copies it
    device: str | None = option(None, "--device", "A machine that is not here: 24GB, 4x80GB, or cpu:16GB."),
    length: int | None = option(None, "--length", "Tokens of each row, instead of the data.", min=2),
    compare: bool = flag("--compare", "Full fine-tuning, 16-bit LoRA and 4-bit QLoRA side by side."),
    nodes: int | None = option(None, "--nodes", "Also on so many machines like this one.", min=1, max=4096),
    link: str | None = option(
        None, "--link", "With --nodes: what joins them, 1Gb/s (the default) or 125MB/s; with a delay 1Gb/s,5ms."
    ),
    json_: shared.Json = False,
) -> None:
    """What a training takes (memory, disk, time) and how it fits, before anything is downloaded or loaded. Exit code 3
    if it does not fit."""
    from halfbyte.models.sources.lookup import at_hand
    from halfbyte.plan import estimate, number_format
    from halfbyte.plan.scaling import of_plan
    from halfbyte.recipe.command import NO_ROWS, recipe_or_model
    from halfbyte.recipe.start import START

    if link is not None and nodes is None:
        raise RecipeError(f"--link {link} is not read without --nodes.", fix=f"--nodes 2 --link {typed(link)}")
    loaded = number_format.settle(recipe_or_model(target, set_, START), device=device, length=length)
    if device is None and length is None and loaded.recipe.data.train != NO_ROWS and at_hand(loaded.recipe):
        with libraries.loading():
            from halfbyte.training import preview

        planned = preview.estimate(loaded, side_by_side=compare)
    else:
        planned = estimate.plan_model(loaded, device=device, length=length, side_by_side=compare)
    scaled = None
    if nodes is not None:
        from halfbyte.distributed import scaling

        scaled = scaling.expect(planned, nodes, scaling.link_of(link or "1Gb/s"))
    cores = of_plan(planned.plan, planned.job, planned.device) if device is None else None
    if json_:
        more = {"nodes": scaled and scaled.to_json(), "cores": cores and asdict(cores)}
        show.document(planned.to_json() | {name: value for name, value in more.items() if value})
    else:
        show_plan.estimate(planned)
        if cores is not None:
            show_plan.cores(cores)
        if scaled is not None:
            show_plan.scaling(scaled)
    if planned.plan.short_bytes:
        raise typer.Exit(3)


@app.command()
def doctor(
    model: str | None = argument(None, "[MODEL | RECIPE.yaml]", "Also prove everything on it."),
    compile_: bool = flag("--compile", "Compile all kernels now, which the first run would do on its way."),
    set_: shared.Set = [],  # noqa: B006  typer copies it
    json_: shared.Json = False,
) -> None:
    """What this machine is and does; with a model, proofs on a few of its layers. Exit code 1 if one fails."""
    from halfbyte.models.sources import lookup
    from halfbyte.plan import number_format
    from halfbyte.recipe.command import recipe_or_model

    recipe = number_format.settle(recipe_or_model(model, set_)).recipe if model else None
    if recipe is not None:
        lookup.look(recipe)
    with libraries.loading():
        from halfbyte import doctor

    if compile_:
        doctor.compile_kernels()
    diagnosis = doctor.examine(recipe, tell=(lambda text: None) if json_ else show.aside)
    show.document(diagnosis.to_json()) if json_ else show.diagnosis(diagnosis)
    if not diagnosis.ok:
        raise typer.Exit(1)


@app.command()
def generate(
    run: shared.Run,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to say to the model; repeatable.")],
    base: shared.BaseOnly = False,
    max_new_tokens: shared.Tokens = 256,
    temperature: shared.Temperature = 0.0,
    top_k: shared.TopK = 0,
    top_p: shared.TopP = 1.0,
    min_p: shared.MinP = 0.0,
    repetition_penalty: shared.Repetition = None,
    seed: int | None = option(None, "--seed", "Makes sampling repeatable."),
    set_: shared.Set = [],  # noqa: B006
    force: shared.Force = False,
    prove: shared.Prove = False,
    json_: shared.Json = False,
) -> None:
    """Answer prompts with the adapter on its base, or with the base alone."""
    for number, text in enumerate(prompt, 1):
        conversation.check_text(text, f"--prompt {number}")
    talks = [[{"role": "user", "content": text}] for text in prompt]
    asks = talks, max_new_tokens
    ready = shared.speaker(run, set_, silent=json_, force=force, prove=prove, base=base, asks=asks)
    from halfbyte.writing.sampling import SamplingParams
    from halfbyte.writing.text import Session

    params = SamplingParams(
        max_new_tokens, temperature, top_p, seed, top_k=top_k, min_p=min_p, repetition_penalty=repetition_penalty
    )
    answers, session = list[str](), Session(exact=True)
    for number, talk in enumerate(talks, 1):
        if len(talks) > 1 and not json_:
            show.text(f"{'' if number == 1 else chr(10)}prompt {number}: {prompt[number - 1]}")
        answers.append(conversation.answer(ready, talk, params, session, base=base, silent=json_))
    if json_:
        rows = [{"prompt": p, "output": a} for p, a in zip(prompt, answers, strict=True)]
        show.document({"run": str(run), "with_adapter": not (base or ready.alone), "answers": rows})


@app.command()
def chat(
    run: shared.Run,
    system: str | None = option(None, "--system", "A system message to begin with."),
    max_new_tokens: shared.Tokens = 512,
    temperature: shared.Temperature = 0.0,
    set_: shared.Set = [],  # noqa: B006
    force: shared.Force = False,
    prove: shared.Prove = False,
) -> None:
    """Talk to the adapter. /base and /both ask the base too, /save keeps the talk, /reset forgets, /quit leaves."""
    conversation.check_text(system or "", "--system")
    ready = shared.speaker(run, set_, silent=False, force=force, prove=prove)
    from halfbyte.writing.sampling import SamplingParams

    conversation.Chat(ready, SamplingParams(max_new_tokens, temperature), system).run()


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The folder of a finished run.")],
    quick: bool = flag("--quick", "Only what the adapter says; no hashes."),
    set_: shared.Set = [],  # noqa: B006
    json_: shared.Json = False,
) -> None:
    """Is a run as it was written, and does its adapter say what it said when it was trained? Exit code 1 if not."""
    from halfbyte.inference import target
    from halfbyte.recipe.task import TASKS
    from halfbyte.runs.folder import RunFolder

    RunFolder.open(run)
    if set_:
        target.find(run, set_, TASKS)
    with progress.waiting("hashing, and opening base and adapter", silent=json_):
        with libraries.loading():
            from halfbyte.inference import verify as verifying

        verified = verifying.verify(run, set_, hashes=not quick)
    show.document(verified.to_json()) if json_ else show.checks(verified.checks)
    if not verified.ok:
        raise typer.Exit(1)


@app.command()
def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL | RECIPE.yaml", help="As in a recipe; or a recipe's own base.")
    ],
    out: Path | None = option(None, "--out", "Write it there instead of into halfbyte's cache.", metavar="DIR"),
    report: bool = flag("--report", "Also measure what each number format costs: errors, and loss on a text."),
    text: Path | None = option(
        None, "--text", "With --report: rows or plain text; default: a small text.", metavar="F"
    ),
    limit: int | None = option(None, "--limit", "With --report: only the first rows.", min=1),
    set_: shared.Set = [],  # noqa: B006
    json_: shared.Json = False,
    quiet: shared.Quiet = False,
) -> None:
    """Quantise a base once, in bounded memory; train, eval and chat then open it at once."""
    from halfbyte.base.store import manifest
    from halfbyte.models.sources import lookup
    from halfbyte.plan import number_format
    from halfbyte.recipe.command import recipe_or_model

    if not report and (text is not None or limit is not None):
        raise RecipeError(
            "--text and --limit say what --report reads.", fix=f"halfbyte quantize {typed(model)} --report"
        )
    manifest.check_place(out)
    recipe = number_format.settle(recipe_or_model(model, set_)).recipe
    lookup.look(recipe)
    if text is not None:
        from halfbyte.data.reading import read

        read.look(text, recipe.data)
    measured = None
    with progress.quantizing(silent=json_ or quiet) as tell:
        with libraries.loading():
            from halfbyte.base.quantize import quantize as build

        built = build(recipe, out=out, tell=tell)
        if report:
            with libraries.loading():
                from halfbyte.inference import quality

            measured = quality.measure(recipe, text, store=built.path, limit=limit, tell=tell)
    if json_:
        show.document(built.to_json() | ({} if measured is None else {"quality": measured.to_json()}))
        return
    show.built_store(built)
    if measured is not None:
        scores.quality(measured)


@rows.command()
def check(
    target: Annotated[str, typer.Argument(metavar="RECIPE.yaml | DATA.jsonl", help="A recipe, or the rows alone.")],
    model: str | None = option(None, "--model -m", "Whose tokenizer and template; with a recipe, another one."),
    row: int | None = option(None, "--row", "Show this row, instead of the first two.", min=1),
    set_: shared.Set = [],  # noqa: B006  typer copies it
    json_: shared.Json = False,
) -> None:
    """What would be trained on: gates, lengths, steps, rows with their labels. Exit code 2 if it would be refused."""
    from halfbyte.recipe.command import recipe_or_rows

    loaded = recipe_or_rows(target, model, set_)
    from halfbyte.training import preflight

    preflight.check(loaded.recipe, writes=False)
    with libraries.loading():
        from halfbyte.training import preview

    checked, within = preview.check(loaded, row=row), list[str]()
    if loaded.recipe.train.within is not None:
        from halfbyte.tuning import fits

        fit = fits.forecast(loaded, 0.0)
        within = [] if fit is None else [line for line in (fit.line, fit.remark) if line]
    show.document(checked.to_json() | {"within": within}) if json_ else show_plan.data_check(checked, within)
    if checked.refused:
        raise typer.Exit(2)


@app.command()
def version() -> None:
    """The versions of halfbyte and of what it stands on."""
    show.text("\n".join(f"{name} {value}" for name, value in libraries.versions().items()))


def _guard(call: Callable[[], object], words: Sequence[str] = ()) -> int:
    """Run the app; a HalfbyteError, or what the system refuses, is one message on stderr and an exit code. The parser
    says itself what it refuses of `words`, except as JSON."""
    try:
        call()
    except SystemExit as left:
        usage = getattr(left.__context__, "format_message", None)
        if usage is not None and "--json" in words:
            show.error(usage(), int(left.code or 0), kind="UsageError")
        raise
    except HalfbyteError as error:
        show.report_error(error)
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        fix = "free some space, or write elsewhere" if files.is_full(error) else None
        refused = HalfbyteError(f"{where}{error.strerror or error}", fix=fix)
        show.failed(str(refused), 1, message=refused.message, fix=fix)
        return 1
    except Exception as error:
        if type(error).__module__.partition(".")[0] in ("click", "typer"):
            raise
        from halfbyte.runs import crash

        shown = crash.unforeseen(error)
        show.failed(str(shown), shown.exit_code, message=shown.message, fix=shown.fix, kind=type(shown).__name__)
        return shown.exit_code
    return 0


def main() -> None:
    try:
        code: object = _guard(app, sys.argv[1:])
    except SystemExit as left:
        code = left.code
    _leave(code)


def _leave(code: object) -> NoReturn:
    """End the process as `sys.exit` does, but for taking the interpreter apart: to free what four thousand modules
    hold takes a second or two, and the system does it at once. With a tracer or a profiler it ends as usual."""
    if sys.gettrace() is not None or sys.getprofile() is not None:
        sys.exit(code)  # type: ignore[arg-type]
    if code is not None and not isinstance(code, int):
        sys.stderr.write(f"{code}\n")
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are not daemons
    atexit._run_exitfuncs()
    number = code if isinstance(code, int) else int(code is not None)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):  # nobody reads it any more, or it was closed
            number = number or 120  # Python's own
    os._exit(number)
