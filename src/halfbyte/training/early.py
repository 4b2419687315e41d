"""What can be told of a run before a library is loaded, a model looked for or a base opened.

Why: a missing file or a folder that is taken must not cost the half minute in which a model is converted.
Cost: the first rows of each file, milliseconds; no torch.
"""

from pathlib import Path

from halfbyte.data.reading import read
from halfbyte.errors import typed
from halfbyte.models.sources import lookup
from halfbyte.recipe import adapter
from halfbyte.recipe.schema import Recipe
from halfbyte.runs import points
from halfbyte.runs.folder import RunFolder
from halfbyte.types import Document


def check(recipe: Recipe, *, resume: bool = False, writes: bool = True) -> None:
    """Refuse a run whose folder is taken (or, to resume, is none), whose rows are missing or have other fields, or
    whose model is not there.

    Args:
        writes: False where nothing is trained, so that the folder does not matter.

    Raises:
        RunError, DataError, SourceError: as the run itself would say it.
    """
    if resume:
        point = points.newest(RunFolder.open(Path(recipe.output), need_adapter=False).checkpoints)
        if point is not None:
            points.check_recipe(point, recipe)
    elif writes or not Path(recipe.output).exists():  # a dry run of a run that is there already shows what it did
        RunFolder.check_free(Path(recipe.output))
    if recipe.lora.adapter is not None and not resume:
        adapter.read_config(adapter.folder_of(recipe.lora.adapter))
    rows(recipe)
    lookup.look(recipe)


def complete(recipe: Recipe) -> Document | None:
    """The report of a finished run of which no more is asked; a RunError where other values are asked for."""
    return points.complete(recipe)


def more(recipe: Recipe) -> str:
    """The command with which a finished run goes on, for twice its length; without a checkpoint, a new run."""
    run, train = recipe.output, recipe.train
    if not points.checkpoints(RunFolder(Path(run)).checkpoints):
        return (
            f"halfbyte train {typed(f'{run}/recipe.yaml')} --output {typed(f'{run}-2')} "
            f"--set {typed(f'lora.adapter={run}/adapter')}"
        )
    name, now = ("max_steps", train.max_steps) if train.max_steps > 0 else ("num_train_epochs", train.num_train_epochs)
    return f"halfbyte train {typed(run)} --resume --set train.{name}={2 * now:g}"


def rows(recipe: Recipe) -> None:
    """A DataError where the recipe's rows are missing or have other fields than it says."""
    for names in (recipe.data.train, recipe.data.eval_names):
        if names:
            read.look(names, recipe.data)
