"""Where a run begins, and what can be checked before a library is loaded, a model looked for or a base opened.

Why: a missing file or a folder that is taken must not cost the half minute in which a model is converted. A run that
goes on ends as it would have ended, or says why it cannot.
Cost: the first rows of each file, milliseconds; the hashes of one checkpoint; no torch.
"""

from dataclasses import dataclass
from pathlib import Path

from halfbyte.data.reading import read
from halfbyte.distributed.world import World
from halfbyte.errors import RunError, typed
from halfbyte.models.sources import lookup
from halfbyte.recipe import adapter, adapter_folder, rewards
from halfbyte.recipe.fields import shown
from halfbyte.recipe.schema import Recipe
from halfbyte.runs import points
from halfbyte.runs.folder import RunFolder, check_writable
from halfbyte.training.events import Listener
from halfbyte.types import Document


@dataclass(frozen=True)
class RunStart:
    """Where a run begins. Checkpoints are compared with `recipe`, which is as the user wrote it."""

    recipe: Recipe
    resume: bool
    point: points.Point | None = None  # the checkpoint to go on from; None at the first step
    report: Document | None = None  # of a finished run of which no more is asked

    @property
    def step(self) -> int:
        return 0 if self.point is None else self.point.step

    @property
    def adapter(self) -> Path | None:
        """The folder of a trained adapter whose weights the fresh ones begin with."""
        name = self.recipe.lora.adapter
        return adapter_folder.folder_of(name) if name is not None and self.point is None else None


def begin(world: World, recipe: Recipe, *, resume: bool) -> RunStart:
    """Where a run begins, decided by the first process. Raises RunError: the folder is taken; or it is no run, or one
    that was trained otherwise."""

    def decide() -> Document:
        if not resume:
            RunFolder.check_free(Path(recipe.output))
            return {}
        RunFolder.open(Path(recipe.output), need_adapter=False).check_idle()
        if (report := points.complete(recipe)) is not None:
            return {"report": report}
        point = _newest(recipe)
        return {} if point is None else {"point": {**vars(point), "path": str(point.path)}}

    decision = world.from_first(decide)
    point = decision.get("point")
    if point is not None:
        point = points.Point(Path(point["path"]), point["step"], point["trained"], tuple(point["passed_over"]))
    return RunStart(recipe, resume, point, decision.get("report"))


def _newest(recipe: Recipe) -> points.Point | None:
    """The newest whole checkpoint of the recipe's run, which has trained as the recipe says."""
    folder = RunFolder.open(Path(recipe.output), need_adapter=False).checkpoints
    point = points.newest(folder)
    if point is not None:
        points.check_recipe(point, recipe)
    points.check_best(folder)
    return point


def check(recipe: Recipe, *, resume: bool = False, writes: bool = True) -> None:
    """Refuse a run whose folder is taken (or, to resume, is none), whose rows are missing or have other fields, or
    whose model is not there.

    Args:
        writes: False where nothing is trained, so that the folder does not matter.
    """
    if resume:
        if writes:
            RunFolder(Path(recipe.output)).check_idle()
        _newest(recipe)
        if writes and points.complete(recipe) is None:
            check_writable(Path(recipe.output), "copy the run into a folder that can be written, and resume it there")
    elif writes or not Path(recipe.output).exists():  # a dry run of a run that is there already shows what it did
        RunFolder.check_free(Path(recipe.output))
    if recipe.lora.adapter is not None and not resume:
        adapter.read_config(adapter_folder.folder_of(recipe.lora.adapter))
    check_rows(recipe)
    lookup.look(recipe)


def check_rows(recipe: Recipe) -> None:
    """A DataError where the recipe's rows are missing or have other fields than it says; a RecipeError where a reward
    is a function that is not there."""
    for name in recipe.train.rewards or ():
        if ":" in name:
            rewards.check_function(name)
    names = [n for n in (recipe.data.train, recipe.data.eval_names) if n is not None]
    every = [name for some in names for name in ([some] if isinstance(some, str) else some)]
    read.look(every, recipe.data)
    read.check_fields(every, recipe.data)


def check_resumed(start: RunStart, objective: str, rows: Document, total_steps: int, tell: Listener) -> list[str]:
    """Compare objective, rows and length with those of the run that goes on; says from where. Returns what the report
    notes.

    Raises:
        RunError: the rows are others, or more steps are done than are asked for.
    """
    point, recipe = start.point, start.recipe
    if point is None:
        return []
    points.check_objective(point, recipe, objective)
    points.check_rows(point, recipe, rows)
    if point.step > total_steps:
        raise RunError(
            f"the run {recipe.output} is at step {point.step}, and the recipe asks for {total_steps}.",
            fix=f"more: halfbyte train {typed(recipe.output)} --resume --set train.max_steps={2 * point.step}",
        )
    tell.note("resume", f"from step {point.step} of {total_steps}, {point.path}")
    changes = point.changes(recipe)
    for name, (was, now) in changes.items():
        if name != "output":  # the folder was moved
            tell.note("resume", f"{name} {shown(was)} -> {shown(now)}")
    if {"train.max_steps", "train.num_train_epochs"} & set(changes):
        schedule = f"{recipe.train.lr_scheduler_type} learning rate"
        tell.note("resume", f"the {schedule} is computed anew over {total_steps} steps, from step {point.step + 1} on")
    notices = [f"checkpoint {damaged} is damaged and passed over" for damaged in point.passed_over]
    if not point.trained:
        notices.append("the checkpoint does not say what it was trained with, so recipe and rows are not compared")
    for notice in notices:
        tell.warn(f"{notice}; going on from step {point.step}")
    return notices


def how_to_go_on(recipe: Recipe) -> str:
    """How a finished run goes on, for twice its length; without a checkpoint, or where its time is over, a new run."""
    run, train = recipe.output, recipe.train
    if not points.checkpoints(RunFolder(Path(run)).checkpoints):
        return f"it has no checkpoint to go on from; a new run from its weights: {points.another_run(recipe)}"
    if train.within is not None:
        return f"to go on: {points.another_run(recipe)}"
    name, now = ("max_steps", train.max_steps) if train.max_steps > 0 else ("num_train_epochs", train.num_train_epochs)
    return f"to go on: halfbyte train {typed(run)} --resume --set train.{name}={2 * now:g}"
