"""What is served under which name: runs, adapters or a base alone, all on one base. No torch.

A word of the command is RUN or NAME=RUN; a run's name is that of its folder, the base's that of the model.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from halfbyte.errors import AdapterError, RecipeError, typed
from halfbyte.inference import target
from halfbyte.inference.target import Target
from halfbyte.recipe.fields import shown
from halfbyte.recipe.schema import Recipe
from halfbyte.recipe.task import CAUSAL_LM, TAG, TASKS

_NAMED = re.compile(r"(?P<name>[\w.:@+-]+)=(?P<path>.+)")
# What an adapter computes with, beside the numbers of its own: two that differ in one of these need two servers.
_SHARED = ("model", "revision", "quant", "trust_remote_code")


@dataclass(frozen=True)
class Names:
    """The base's name, and what each other name stands for; none where the base is served alone."""

    base: str
    first: Target
    adapters: dict[str, Target]


def find(words: Sequence[str], overrides: Sequence[str] = ()) -> Names:
    """Raises RunError: there is no such run. AdapterError: different bases. RecipeError: a name is there twice."""
    adapters: dict[str, Target] = {}
    bases: list[Target] = []
    for word in words:
        name, one = _one(word, overrides)
        if one.adapter is None:
            bases.append(one)
        elif name in adapters:
            fix = f"name one of them: halfbyte serve {typed(f'OTHER={one.path}')}"
            raise RecipeError(f"two adapters would be served as {name}: {adapters[name].path}, {one.path}.", fix=fix)
        else:
            adapters[name] = one
    first = next(iter(adapters.values()), bases[0] if bases else None)
    if first is None:
        raise RecipeError("nothing is named that could be served.", fix="halfbyte serve RUN")
    for other in (*adapters.values(), *bases):
        check_same(first, other)
    if len(adapters) > 1 and (biased := [n for n, each in adapters.items() if each.recipe.lora.bias != "none"]):
        raise AdapterError(
            f"{biased[0]} has trained the base's biases (lora.bias), which its neighbours would get too.",
            fix=f"serve it alone: halfbyte serve {typed(adapters[biased[0]].path)}",
        )
    base = _base_name(first.recipe.model)
    if base in adapters:
        fix = f"halfbyte serve {typed(f'NAME={adapters[base].path}')}"
        raise RecipeError(f"the base and an adapter would both be served as {base}.", fix=fix)
    return Names(base, first, adapters)


def of_other_task(words: Sequence[str], overrides: Sequence[str] = ()) -> tuple[str, Target] | None:
    """The run that labels texts or gives vectors, with its name; None where all are causal language models. Raises
    RecipeError: it is not alone."""
    every = [_one(word, overrides, [task for task in TASKS if task != TAG]) for word in words]
    others = [(name, one) for name, one in every if one.recipe.task != CAUSAL_LM]
    if others and len(every) > 1:
        what = f"{others[0][1].path} is of task {others[0][1].recipe.task}, and is served alone."
        raise RecipeError(what, fix=f"halfbyte serve {typed(others[0][1].path)}")
    return others[0] if others else None


def _one(word: str, overrides: Sequence[str], tasks: Sequence[str] = (CAUSAL_LM,)) -> tuple[str, Target]:
    given = _NAMED.fullmatch(word)
    if given is not None and not Path(word).exists():
        return given["name"], target.find(Path(given["path"]), overrides, tasks)
    path = Path(word)
    one = target.find(path, overrides, tasks)
    folder = path.resolve()
    return (folder.parent if folder.name == "adapter" and one.run is None else folder).name, one


def _base_name(model: str) -> str:
    path = Path(model)
    return path.resolve().stem if path.suffix == ".gguf" else path.resolve().name if path.exists() else model


def check_same(one: Target, other: Target) -> None:
    """Raises AdapterError: two that cannot share a base."""
    for field in _SHARED:
        a, b = _value(one.recipe, field), _value(other.recipe, field)
        if a != b:
            raise AdapterError(
                f"{other.path} and {one.path} cannot share a base: {field} is {shown(b)} there and {shown(a)} here.",
                fix="serve them apart, each on a port of its own",
            )


def _value(recipe: Recipe, field: str) -> object:
    value = getattr(recipe, field)
    if field == "model":
        return str(Path(value).resolve()) if Path(value).exists() else value
    return value.model_dump(exclude={"placement"}) if field == "quant" else value
