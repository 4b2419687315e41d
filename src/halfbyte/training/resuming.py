"""What is said and refused when a run goes on: the step, damaged checkpoints, other rows, another length."""

from halfbyte.errors import RunError, typed
from halfbyte.recipe.fields import shown
from halfbyte.recipe.schema import Recipe
from halfbyte.runs import points
from halfbyte.training.events import Listener
from halfbyte.types import Document


def check(point: points.Point, recipe: Recipe, rows: Document, total: int, tell: Listener) -> list[str]:
    """Compare rows and length with those of the run; says from where it goes on. Returns what the report notes.

    Args:
        rows: as `prepare.fingerprints` makes them.
        total: steps that the recipe asks for.

    Raises:
        RunError: the rows are others, or more steps are done than are asked for.
    """
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
