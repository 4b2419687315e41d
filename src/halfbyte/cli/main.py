"""The command line: parse, call, print. Every heavy import is inside a command, so that `--help` is instant.

The only room that prints. A mistake of the user ends with one message and exit code 2, a failed run with 1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from halfbyte.cli.store import stores

if TYPE_CHECKING:
    from halfbyte.recipe.schema import Loaded

app = typer.Typer(
    name="halfbyte",
    help="Fine-tune a language model at half a byte per weight, on the machine you have.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(stores, name="store")
rows = typer.Typer(help="The rows that a model would be trained on.", no_args_is_help=True)
app.add_typer(rows, name="data")

Set = Annotated[list[str], typer.Option("--set", metavar="a.b=c", help="Change one value of the recipe; repeatable.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Plain lines only, and few of them.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, as `halfbyte train` made it.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")]
BaseOnly = Annotated[bool, typer.Option("--base", help="The base alone, without the adapter.")]


@app.command()
def train(
    recipe: Annotated[
        str,
        typer.Argument(metavar="RECIPE.yaml | MODEL | RUN", help="A recipe, a model, or with --resume a run folder."),
    ],
    data: Annotated[
        str | None, typer.Argument(metavar="[DATA.jsonl]", help="With a MODEL: the rows to train on.")
    ] = None,
    set_: Set = [],  # noqa: B006  typer copies it
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="The run folder; short for --set output=...")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue from the newest checkpoint of the run folder.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print every resolved value and where it came from; train nothing.")
    ] = False,
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Fine-tune: a recipe in, a working adapter out."""
    from halfbyte.cli import show, show_plan
    from halfbyte.recipe.file import to_yaml

    overrides = [*set_, *([f"output={output}"] if output is not None else [])]
    loaded = _load(recipe, data, overrides, resume=resume)
    if dry_run:
        _tame_libraries()
        from halfbyte.training import preview

        resolution = preview.resolve(loaded)
        show.document(resolution.to_json()) if json_ else show_plan.resolution(resolution)
        return
    for warning in loaded.warnings:
        show.warning(warning)
    if loaded.path is None and not (json_ or quiet):
        show.text("No recipe given; this one is used:\n\n" + to_yaml(loaded.recipe))
    with show.progress(quiet=quiet, silent=json_) as listener:
        _tame_libraries()
        from halfbyte import finetune

        outcome = finetune.train(loaded, resume=resume, listener=listener)
    if outcome.stopped_by is not None:
        show.warning(
            f"stopped by {outcome.signal_name} after step {outcome.step}; nothing is lost.\n"
            f"  continue: halfbyte train {outcome.run} --resume"
        )
        raise typer.Exit(128 + outcome.stopped_by)
    show.document(outcome.report) if json_ else show.report(outcome)


@app.command()
def plan(
    target: Annotated[
        str,
        typer.Argument(metavar="MODEL | RECIPE.yaml", help="Hub id, folder, .gguf file, bundled shape, or a recipe."),
    ],
    set_: Set = [],  # noqa: B006  typer copies it
    device: Annotated[
        str | None, typer.Option("--device", help="A machine that is not here: 24GB, 4x80GB, or cpu:16GB.")
    ] = None,
    length: Annotated[
        int | None, typer.Option("--length", min=2, help="Tokens of each row, instead of the data.")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Full fine-tuning, 16-bit LoRA and 4-bit QLoRA side by side.")
    ] = False,
    json_: Json = False,
) -> None:
    """What a training takes (memory, disk, time) and how it fits, before anything is downloaded or loaded."""
    from halfbyte.cli import show, show_plan
    from halfbyte.plan import ahead

    found = ahead.plan_model(_recipe_or_model(target, set_), device=device, length=length, side_by_side=compare)
    show.document(found.to_json()) if json_ else show_plan.planned(found)


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL | RECIPE.yaml]", help="Also prove everything on it.")
    ] = None,
    set_: Set = [],  # noqa: B006  typer copies it
    json_: Json = False,
) -> None:
    """What this machine is and does; with a model, proofs on a few of its layers. Exit code 1 if one fails."""
    from halfbyte.cli import show, show_doctor

    recipe = _recipe_or_model(model, set_).recipe if model else None
    _tame_libraries()
    from halfbyte import doctor

    found = doctor.examine(recipe, tell=(lambda text: None) if json_ else show.aside)
    show.document(found.to_json()) if json_ else show_doctor.diagnosis(found)
    if not found.ok:
        raise typer.Exit(1)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write the recipe.")] = Path("recipe.yaml"),
    model: Annotated[str, typer.Option(help="Hub id, folder, .gguf file or packaged name.")] = "smollm2-135m",
    data: Annotated[str, typer.Option(help="The training rows.")] = "train.jsonl",
) -> None:
    """Write a commented recipe to start from."""
    from halfbyte.cli import show
    from halfbyte.errors import RecipeError
    from halfbyte.recipe.file import init_template

    if path.exists():
        raise RecipeError(f"{path} exists and is not overwritten.", fix="name another file: halfbyte init NAME.yaml")
    try:
        path.write_text(init_template(model, data))
    except OSError as error:
        if path.is_file():
            path.unlink()  # the beginning of a recipe, on a full disk
        raise RecipeError(f"{path} cannot be written: {error.strerror}.") from error
    show.text(f"wrote {path}\n  next: halfbyte train {path} --dry-run")


@app.command()
def generate(
    run: Run,
    prompt: Annotated[list[str], typer.Option("--prompt", "-p", help="What to say to the model; repeatable.")],
    base: BaseOnly = False,
    max_new_tokens: Tokens = 256,
    temperature: Temperature = 0.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    json_: Json = False,
) -> None:
    """Answer prompts with the adapter on its base, or with the base alone."""
    from halfbyte.cli import show

    with show.waiting("opening base and adapter", silent=json_) as tell:
        _tame_libraries()
        from halfbyte.inference import load as opening
        from halfbyte.inference.generate import Sampling, chat_ids
        from halfbyte.inference.generate import generate as write

        opened = opening.open_run(run, tell)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    answers = []
    for text in prompt:
        ids = chat_ids(opened.tokenizer, [{"role": "user", "content": text}])
        with opened.base_only() if base else opened.adapted():
            emit = None if json_ else show.stream
            answers.append(write(opened.model, opened.tokenizer, [ids], sampling, emit=emit)[0])
        if not json_:
            show.text("")
    if json_:
        rows = [{"prompt": p, "output": a} for p, a in zip(prompt, answers, strict=True)]
        show.document({"run": str(run), "with_adapter": not base, "answers": rows})


@app.command()
def chat(
    run: Run,
    system: Annotated[str | None, typer.Option(help="A system message to begin with.")] = None,
    max_new_tokens: Tokens = 512,
    temperature: Temperature = 0.0,
) -> None:
    """Talk to the adapter. /base asks the base alone the same, /reset forgets, /quit leaves."""
    from halfbyte.cli import show

    with show.waiting("opening base and adapter", silent=False) as tell:
        _tame_libraries()
        from halfbyte.inference import load as opening
        from halfbyte.inference.generate import Sampling, chat_ids
        from halfbyte.inference.generate import generate as write

        opened = opening.open_run(run, tell)
    sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature)
    first = [{"role": "system", "content": system}] if system else []
    history = list(first)
    show.text("/base  the same of the base alone    /reset  forget    /quit  leave")

    def answer(messages: list[dict[str, str]]) -> str:
        text = write(opened.model, opened.tokenizer, [chat_ids(opened.tokenizer, messages)], sampling, emit=show.stream)
        show.text("")
        return text[0]

    while True:
        try:
            line = show.ask()
        except (EOFError, KeyboardInterrupt):
            show.text("")
            return
        if line in ("/quit", "/exit"):
            return
        if line == "/reset":
            history = list(first)
        elif line == "/base":
            asked = [i for i, m in enumerate(history) if m["role"] == "user"]
            if not asked:
                show.text("say something first")
                continue
            with opened.base_only():
                answer(history[: asked[-1] + 1])
        elif line.startswith("/"):
            show.text(f"no such command {line}; there are /base, /reset, /quit")
        elif line:
            history.append({"role": "user", "content": line})
            try:
                with opened.adapted():
                    history.append({"role": "assistant", "content": answer(history)})
            except KeyboardInterrupt:
                history.pop()
                show.text("\n(stopped)")


@app.command(name="eval")
def evaluate(
    run: Run,
    base: Annotated[bool, typer.Option("--base", help="Score the base alone too, side by side.")] = False,
    data: Annotated[Path | None, typer.Option(help="Rows to score; default: the recipe's data.eval.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first rows.")] = None,
    samples: Annotated[int, typer.Option(min=0, help="How many outputs to show.")] = 3,
    max_new_tokens: Tokens = 256,
    json_: Json = False,
) -> None:
    """Completion loss, perplexity and exact match on held-out rows; with --base beside the base alone."""
    from halfbyte.cli import show

    with show.waiting("opening base and adapter", silent=json_) as tell:
        _tame_libraries()
        from halfbyte.inference import load as opening

        opened = opening.open_run(run, tell)
    with show.counting("rows", silent=json_) as progress:
        scores = opening.evaluate(
            opened, data=data, limit=limit, with_base=base, max_new_tokens=max_new_tokens, progress=progress
        )
    if json_:
        show.document({name: s.to_json() for name, s in scores.items()})
    else:
        show.scores(scores, samples)


@app.command()
def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL | RECIPE.yaml", help="As in a recipe; or a recipe's own base.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", metavar="DIR", help="Write it there instead of into halfbyte's cache.")
    ] = None,
    set_: Set = [],  # noqa: B006
    json_: Json = False,
    quiet: Quiet = False,
) -> None:
    """Quantise a base once, in bounded memory; train, eval and chat then open it at once."""
    from halfbyte.cli import show, show_store

    recipe = _recipe_or_model(model, set_).recipe
    with show_store.building(show.err, silent=json_ or quiet) as tell:
        _tame_libraries()
        from halfbyte.base.quantize import quantize as build

        built = build(recipe, out=out, tell=tell)
    show.document(built.to_json()) if json_ else show.text(show_store.built(built))


@rows.command()
def check(
    target: Annotated[str, typer.Argument(metavar="RECIPE.yaml | DATA.jsonl", help="A recipe, or the rows alone.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Whose tokenizer and template; with a recipe, another one.")
    ] = None,
    row: Annotated[int | None, typer.Option("--row", min=1, help="Show this row, instead of the first two.")] = None,
    set_: Set = [],  # noqa: B006  typer copies it
    json_: Json = False,
) -> None:
    """What would be trained on: gates, lengths, steps, rows with their labels. Exit code 2 if it would be refused."""
    from halfbyte.cli import show, show_data
    from halfbyte.errors import RecipeError
    from halfbyte.recipe.file import load_recipe, recipe_from

    if _is_recipe(target):
        loaded = load_recipe(Path(target), [*set_, *([f"model={model}"] if model else [])])
    elif model is None:
        raise RecipeError("rows alone say nothing about tokens.", fix=f"halfbyte data check {target} --model MODEL")
    else:
        loaded = recipe_from(model, target, set_)
    _tame_libraries()
    from halfbyte.training import preview

    found = preview.check(loaded, row=row)
    show.document(found.to_json()) if json_ else show_data.checked(found)
    if found.refused:
        raise typer.Exit(2)


@app.command()
def version() -> None:
    """The versions of halfbyte and of what it stands on."""
    from halfbyte.cli import show
    from halfbyte.system.versions import versions

    show.text("\n".join(f"{name} {value}" for name, value in versions().items()))


def _recipe_or_model(target: str, overrides: list[str]) -> Loaded:
    """A recipe file, or the default recipe for a model; its rows have no name, for commands that need not read any."""
    from halfbyte.recipe.file import load_recipe, recipe_from

    return load_recipe(Path(target), overrides) if _is_recipe(target) else recipe_from(target, "-", overrides)


def _is_recipe(target: str) -> bool:
    return Path(target).suffix in (".yaml", ".yml")


def _load(recipe: str, data: str | None, overrides: list[str], *, resume: bool) -> Loaded:
    from halfbyte.errors import RecipeError
    from halfbyte.recipe.file import load_recipe, recipe_from

    path = Path(recipe)
    if resume:
        if overrides or data is not None:
            raise RecipeError(
                "--resume continues a run with its own recipe; --set, --output and DATA cannot be given with it.",
                fix=f"halfbyte train {recipe} --resume",
            )
        if path.is_file():
            path = Path(load_recipe(path).recipe.output)
        if not (path / "recipe.yaml").is_file():
            raise RecipeError(
                f"{path} is not a run folder: it has no recipe.yaml.",
                fix="halfbyte train RUN --resume, RUN as train made it",
            )
        loaded = load_recipe(path / "recipe.yaml")
        # the folder may have been moved or copied since its recipe was written
        return loaded._replace(recipe=loaded.recipe.model_copy(update={"output": str(path)}))
    if data is not None:
        if _is_recipe(recipe):
            raise RecipeError(f"{recipe} is a recipe and names its own data; {data} is one argument too many.")
        return recipe_from(recipe, data, overrides)
    if path.is_dir() and (path / "recipe.yaml").is_file():
        raise RecipeError(f"{path} is a run folder.", fix=f"halfbyte train {path} --resume")
    if not _is_recipe(recipe) and not path.is_file():
        raise RecipeError(
            f"{recipe} is neither a recipe (.yaml) nor given with data.",
            fix=f"halfbyte train {recipe} DATA.jsonl, or write a recipe with `halfbyte init`",
        )
    return load_recipe(path, overrides)


def _tame_libraries() -> None:
    """No progress bars and no advice of libraries between our own lines; warnings meant for users come from us."""
    import logging
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    # bitsandbytes wraps its fallback functions in torch.compile; off, they run as written and no compiler is imported
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _guard(call: Callable[[], Any]) -> int:
    """Run the app; a HalfbyteError, or what the system refuses, is one message on stderr and an exit code."""
    from halfbyte.errors import HalfbyteError

    try:
        call()
    except HalfbyteError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        sys.stderr.write(f"error: {where}{error.strerror or error}\n")
        return 1
    return 0


def main() -> None:
    sys.exit(_guard(app))
