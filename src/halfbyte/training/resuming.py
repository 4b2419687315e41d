"""What is said and refused when a run goes on: the step, damaged checkpoints, other rows, another length."""

from pathlib import Path

from halfbyte.adapters import passport
from halfbyte.adapters.assembly import Assembled
from halfbyte.data.encoding.chatml import chat_template
from halfbyte.errors import RunError, typed
from halfbyte.objectives.objective import Objective
from halfbyte.recipe.fields import shown
from halfbyte.recipe.schema import Recipe
from halfbyte.runs import points
from halfbyte.runs.folder import RunFolder
from halfbyte.training.events import Listener
from halfbyte.training.prepare import Prepared
from halfbyte.types import Document


def begin(recipe: Recipe, *, resume: bool) -> Document:
    """Where a run begins: `report`, if it is complete and no more is asked; `point`, the fields of its newest
    checkpoint; both None from the beginning. JSON.

    Raises:
        RunError: the folder is taken; or it is no run, or one that was trained otherwise.
    """
    out = Path(recipe.output)
    if not resume:
        RunFolder.check_free(out)
        return {"report": None, "point": None}
    folder = RunFolder.open(out, need_adapter=False)
    if (report := points.complete(recipe)) is not None:
        return {"report": report, "point": None}
    point = points.newest(folder.checkpoints)
    if point is not None:
        points.check_recipe(point, recipe)
    return {"report": None, "point": None if point is None else {**vars(point), "path": str(point.path)}}


def point_of(fields: Document | None) -> points.Point | None:
    """The checkpoint of `begin`."""
    if fields is None:
        return None
    return points.Point(Path(fields["path"]), fields["step"], fields["trained"], tuple(fields["passed_over"]))


def check(
    point: points.Point, recipe: Recipe, objective: Objective, rows: Document, total: int, tell: Listener
) -> list[str]:
    """Compare objective, rows and length with those of the run; says from where it goes on. Returns what the report
    notes.

    Args:
        rows: as `prepare.fingerprints` makes them.
        total: steps that the recipe asks for.

    Raises:
        RunError: the rows are others, or more steps are done than are asked for.
    """
    points.check_objective(point, recipe, objective.name)
    points.check_rows(point, recipe, rows)
    if point.step > total:
        raise RunError(
            f"the run {recipe.output} is at step {point.step}, and the recipe asks for {total}.",
            fix=f"more: halfbyte train {typed(recipe.output)} --resume --set train.max_steps={2 * point.step}",
        )
    tell.note("resume", f"from step {point.step} of {total}, {point.path}")
    changes = point.changes(recipe)
    for name, (was, now) in changes.items():
        if name != "output":  # the folder was moved
            tell.note("resume", f"{name} {shown(was)} -> {shown(now)}")
    if {"train.max_steps", "train.num_train_epochs"} & set(changes):
        schedule = f"{recipe.train.lr_scheduler_type} learning rate"
        tell.note("resume", f"the {schedule} is computed anew over {total} steps, from step {point.step + 1} on")
    notices = [f"checkpoint {damaged} is damaged and passed over" for damaged in point.passed_over]
    if not point.trained:
        notices.append("the checkpoint does not say what it was trained with, so recipe and rows are not compared")
    for notice in notices:
        tell.warn(f"{notice}; going on from step {point.step}")
    return notices


def belongs(
    prepared: Prepared,
    base: Assembled,
    notices: list[str],
    start: Path | None,
    point: points.Point | None,
    *,
    force: bool,
) -> Document:
    """What the adapter will belong to. A checkpoint of something else is refused unless forced; an adapter that the
    run begins with (`start`) only noted."""
    tokenizer, recipe = prepared.tokenizer, prepared.recipe
    made = passport.belongs_to(base.base, recipe.quant, tokenizer, chat_template(tokenizer, recipe.data))
    if point is not None and "belongs_to" in point.trained:
        found = passport.differences(point.trained["belongs_to"], made)
        notices += passport.refuse(f"the checkpoint {point.path}", found, force=force)
    if start is not None:
        notices += passport.check(start, made, force=True)
    return made
