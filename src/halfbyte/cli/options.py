"""Options that several commands take, and how a run is opened for those that use one."""

import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from halfbyte.cli import progress, show
from halfbyte.errors import RecipeError
from halfbyte.system import libraries

if TYPE_CHECKING:
    from halfbyte.inference.load import Opened
    from halfbyte.inference.speaker import Speaker
    from halfbyte.proofs.memory import Proofs

Json = Annotated[bool, typer.Option("--json", callback=show.as_json, help="Print one JSON document instead of text.")]
Set = Annotated[list[str], typer.Option("--set", metavar="a.b=c", help="Change a value of the recipe; repeatable.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Plain lines only, and few of them.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run folder, an adapter's folder, or a model.")]
Tokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="The longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy.")]
TopK = Annotated[int, typer.Option("--top-k", min=0, help="Draw only from so many likeliest tokens; 0: from all.")]
TopP = Annotated[float, typer.Option("--top-p", min=1e-9, max=1.0, help="Only from the likeliest of this probability.")]
MinP = Annotated[float, typer.Option("--min-p", min=0.0, max=1.0, help="Only from those of this share of the first.")]
Repetition = Annotated[
    float | None, typer.Option("--repetition-penalty", min=0.01, max=10.0, help="Default: the model's own.")
]
Force = Annotated[bool, typer.Option("--force", help="Also where base or tokenizer are not those of the adapter.")]
Host = Annotated[str, typer.Option("--host", help="An address other than this machine's own needs a key.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any that is free.")]
KeyFile = Annotated[
    Path | None, typer.Option("--api-key-file", help="A key that clients must send; or HALFBYTE_API_KEY.")
]
AllowHost = Annotated[
    list[str], typer.Option("--allow-host", help="A name that clients use for this machine; repeatable.")
]
Prove = Annotated[bool, typer.Option("--prove", help="Prove again what is remembered as proven on this machine.")]
NAMES = frozenset({"--out", "-o", "--output", "--within", "--data", "--corpus", "--device", "--machine"})
BaseOnly = Annotated[bool, typer.Option("--base", help="The base alone, without the adapter.")]


_Value = TypeVar("_Value")


def option(
    default: _Value, names: str, words: str, *, metavar: str | None = None, min: float | None = None,
    max: float | None = None,
) -> _Value:  # fmt: skip
    """An option of one command, as the default of its parameter."""
    return typer.Option(default, *names.split(), help=words, metavar=metavar, min=min, max=max)


def flag(name: str, words: str) -> bool:
    return option(False, name, words)


def argument(default: _Value, metavar: str | None, words: str) -> _Value:
    """The same of a word without a name."""
    return typer.Argument(default, metavar=metavar, help=words)


class Commands(TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        check_named(args)
        return super().parse_args(ctx, one_each(args))


def check_named(words: list[str]) -> None:
    """A RecipeError for an empty name or time, as an unset variable of a shell gives it."""
    for before, word in zip(["", *words], words, strict=False):
        name = before if not word else word.removesuffix("=") if word.endswith("=") else ""
        if name in NAMES:
            show.as_json("--json" in words)
            raise RecipeError(f"{name} is given nothing.", fix=f"give it a value, or leave {name} out")


def one_each(words: list[str]) -> list[str]:
    """A command's words with a `--set` before each of several values after one: `--set lora.r=8 train.seed=3`."""
    if "--set" not in words:  # nothing is imported for `--help`
        return words
    from halfbyte.recipe.schema import Recipe

    spread, is_value = list[str](), False
    for before, word in zip(["", *words], words, strict=False):
        follows = is_value and "=" in word and re.split("[.=]", word)[0] in Recipe.model_fields
        spread += ["--set", word] if follows else [word]
        is_value = follows or before == "--set"
    return spread


def speaker(
    run: Path, overrides: list[str], *, silent: bool, force: bool, prove: bool, base: bool = False,
    asks: tuple[list[list[dict[str, str]]], int] = ([], 0), tasks: tuple[str, ...] = ("causal_lm",),
    opened: bool = False,
) -> "Speaker":  # fmt: skip
    """What answers of a run, an adapter or a base. That there is none is said before a library is loaded. `asks`:
    conversations, and the tokens of an answer; too long ones are refused before the base is opened. `opened`: it will
    be, whatever is remembered of its answers."""
    from halfbyte.inference import target

    subject = target.find(run, overrides, tasks)
    from halfbyte.inference import speaker as speakers

    def opens() -> "Opened":
        if answers.changed:
            show.aside(f"proven again, since this has changed: {', '.join(answers.changed)}")
        with progress.waiting("opening base and adapter", silent=silent) as tell:
            with libraries.loading():
                from halfbyte.inference import generate, load

            proofs: Proofs = "every" if force else "again" if prove else "remembered"
            check = partial(generate.check, asks)
            return load.open_target(subject, tell, check, force=force, alone=bool(asks[0]), proofs=proofs)

    answers = speakers.Speaker(subject, opens, base=base, prove=prove or force or opened, keeps=not force)
    answers.check(*asks)
    return answers


def open_run(
    run: Path, overrides: list[str], *, silent: bool, force: bool, prove: bool = False,
    tasks: tuple[str, ...] = ("causal_lm",),
) -> "Opened":  # fmt: skip
    """A run, an adapter or a base, ready to be scored."""
    return speaker(run, overrides, silent=silent, force=force, prove=prove, tasks=tasks, opened=True).opened
