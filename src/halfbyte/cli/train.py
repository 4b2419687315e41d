"""`halfbyte train` and `tune`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from halfbyte.cli import options as shared
from halfbyte.cli import progress, reports, show, show_plan
from halfbyte.cli.options import flag, option
from halfbyte.errors import RecipeError, typed
from halfbyte.system import libraries
from halfbyte.system.words import SPAN, seconds_of

if TYPE_CHECKING:
    from halfbyte.distributed.world import World
    from halfbyte.recipe.schema import Loaded

Target = Annotated[
    str, typer.Argument(metavar="RECIPE.yaml | MODEL | RUN", help="A recipe, a model, or with --resume a run folder.")
]
Data = Annotated[str | None, typer.Argument(metavar="DATA.jsonl", help="With a MODEL: the rows to train on.")]
Output = Annotated[Path | None, typer.Option("--output", "-o", help="The run folder; short for --set output=...")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue from the newest checkpoint of the run folder.")]
TUNES_IN = "20m"


def train(
    recipe: Target,
    data: Data = None,
    set_: shared.Set = [],  # noqa: B006  typer copies it
    output: Output = None,
    within: str | None = option(
        None, "--within", "The time for all of it: probe the rate, end on time.", metavar="30m"
    ),
    resume: Resume = False,
    force: shared.Force = False,
    prove: shared.Prove = False,
    dry_run: bool = flag("--dry-run", "Print every resolved value and where it came from; train nothing."),
    live: bool = flag("--live", "Serve the run's page on 127.0.0.1 while it trains."),
    json_: shared.Json = False,
    quiet: shared.Quiet = False,
) -> None:
    """Fine-tune: a recipe in, a working adapter out."""
    overrides = _overrides(recipe, data, set_, output, within, resume=resume)
    if not dry_run:
        told = {"live": live, "json_": json_, "quiet": quiet}
        raise typer.Exit(_run(recipe, data, overrides, resume=resume, force=force, prove=prove, **told))
    from halfbyte.recipe import command
    from halfbyte.training import preflight

    loaded = command.to_resume(recipe, overrides) if resume else command.to_train(recipe, data, overrides)
    preflight.check(loaded.recipe, resume=resume, writes=False)
    with libraries.loading():
        from halfbyte.training import preview
        from halfbyte.tuning import fits

    resolution = preview.resolve(loaded)
    fit = None if resume else fits.forecast(loaded, 0.0)
    if fit is not None and not json_:
        show.field("within", fit.line)
    show.document(resolution.to_json()) if json_ else show_plan.resolution(resolution)


def tune(
    recipe: Target,
    data: Data = None,
    set_: shared.Set = [],  # noqa: B006
    output: Output = None,
    within: str | None = option(None, "--within", f"The time for all probes; {TUNES_IN} by default.", metavar="20m"),
    resume: Resume = False,
    json_: shared.Json = False,
    quiet: shared.Quiet = False,
) -> None:
    """Which learning rate, layers, rows a step and rank: short runs on these rows, and a recipe of what has won."""
    overrides = _overrides(recipe, data, set_, output, within, resume=resume)
    raise typer.Exit(_run(recipe, data, overrides, resume=resume, json_=json_, quiet=quiet, alone=True))


def _overrides(
    recipe: str, data: str | None, values: list[str], output: Path | None, within: str | None, *, resume: bool
) -> list[str]:
    """Everything that the command sets."""
    if within is not None and seconds_of(within) is None:
        raise RecipeError(f"--within must be {SPAN}, got {within!r}.")
    named = {"output": output, "train.within": within}
    overrides = [*values, *(f"{name}={value}" for name, value in named.items() if value is not None)]
    if resume and (data is not None or any(value.startswith("output=") for value in overrides)):
        raise RecipeError(
            "--resume continues a run in its own folder on its own rows; --output and DATA cannot be given with it.",
            fix=f"halfbyte train {typed(recipe)} --resume",
        )
    return overrides


def _run(
    recipe: str, data: str | None, overrides: list[str], *, resume: bool, force: bool = False, live: bool = False,
    json_: bool, quiet: bool, alone: bool = False, prove: bool = False,
) -> int:  # fmt: skip
    """Train, or search for settings alone, unless the run is complete. Returns the exit code."""
    from halfbyte.distributed import world as worlds
    from halfbyte.recipe import command
    from halfbyte.runs import points
    from halfbyte.training import preflight

    with worlds.open_world(show.report_error) as world:
        loaded = _loaded(world, recipe, data, overrides, resume=resume)
        if alone and not resume:
            loaded = command.to_tune(loaded, TUNES_IN)
        run = Path(loaded.recipe.output)
        resume = world.goes_on(run, resume)
        begun = command.as_begun(loaded).recipe if resume else loaded.recipe
        report = world.from_first(lambda: points.complete(begun) if resume else None)
        if report is None:
            return _trained(
                world, loaded, resume=resume, force=force, live=live, json_=json_, quiet=quiet, alone=alone, prove=prove
            )
        if world.first:
            show.document(report) if json_ else show.complete(run, report, preflight.how_to_go_on(loaded.recipe))
    return 0


def _loaded(world: "World", recipe: str, data: str | None, overrides: list[str], *, resume: bool) -> "Loaded":
    """The recipe that is trained. That of a run is read by the first process, since others may not have its folder."""
    from halfbyte.recipe import command
    from halfbyte.recipe.schema import Loaded, Origin, Recipe

    if not resume:
        return command.to_train(recipe, data, overrides)
    loaded = command.to_resume(recipe, overrides) if world.first else None
    if world.alone and loaded is not None:
        return loaded
    sent = world.from_first(lambda: [loaded.recipe.model_dump(mode="json"), loaded.origins] if loaded else [])
    return loaded or Loaded(Recipe.model_validate(sent[0]), {k: Origin(*o) for k, o in sent[1].items()}, (), None)


def _trained(
    world: "World", loaded: "Loaded", *, resume: bool, force: bool, live: bool, json_: bool, quiet: bool, alone: bool,
    prove: bool,
) -> int:  # fmt: skip
    """Train, and show how it ends, in the world's first process. Returns the exit code."""
    from halfbyte.recipe.file import without_defaults
    from halfbyte.runs.folder import RunFolder
    from halfbyte.training import preflight
    from halfbyte.training.deadline import Clock

    first = world.first
    preflight.check(loaded.recipe, resume=resume and first, writes=first)
    clock = Clock.of_process()
    if loaded.recipe.train.within is not None and first and not (resume or alone):
        from halfbyte.tuning import fits

        if (fit := fits.forecast(loaded, clock.spent)) is not None and fit.remark:
            show.warning(fit.remark)
    for warning in loaded.warnings if first else ():
        show.warning(warning)
    if loaded.path is None and first and not (json_ or quiet):
        given, whole = without_defaults(loaded.recipe), RunFolder(Path(loaded.recipe.output)).recipe
        show.text(f"No recipe given; the defaults are used, and:\n\n{given}\nthe whole recipe: {whole}\n")
    shown = progress.training(quiet=quiet, silent=json_ or not first)
    with reports.live(Path(loaded.recipe.output), live and first), shown as listener:
        with libraries.loading():
            from halfbyte import finetune

        outcome = finetune.train(
            loaded, resume=resume, force=force, listener=listener, world=world, clock=clock, alone=alone,
            proofs="again" if prove or force else "remembered",
        )  # fmt: skip
    if first and outcome.stopped_by is not None:
        show.interruption(outcome, "tune" if alone else "train")
    elif first and json_:
        show.document(outcome.report)
    elif first:
        show.search(outcome) if alone else show.report(outcome)
    return outcome.exit_code if first or outcome.stopped_by is not None else 0
