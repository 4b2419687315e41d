"""`halfbyte init`: three questions at a terminal, or the same as options, and a recipe that fits their answers.

Why: a recipe to start from must pass `plan` and `data check` as it is written, so what decides that is looked at here:
the columns of the rows, the longest of them, and the machine's memory.
Cost: one pass over the rows; no torch.
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
import yaml

from halfbyte.cli import show
from halfbyte.cli.options import Json, Set, argument, option
from halfbyte.errors import DataError, HalfbyteError, RecipeError, typed
from halfbyte.recipe.start import START, preset, presets
from halfbyte.types import Document

if TYPE_CHECKING:
    from halfbyte.plan import Plan

MODEL, ROWS = "smollm2-135m", "train.jsonl"
HELD_OUT = ("test", "eval", "valid", "validation", "dev")
MOST_FIXES = 3
PAIRS = dict.fromkeys(("classify", "regress"), ("text", "label"))  # of other tasks
PAIRS |= {"tag": ("tokens", "tags"), "embed": ("query", "passage")}
COUNTED_WRONG = 1.3  # an estimate of tokens by characters, and a chat template, may be so many times too low


@dataclass
class Draft:
    """What the recipe will say beside its defaults: `values` by dotted name, `remarks` as comments at its top."""

    model: str
    data: str
    first: dict[str, object] = field(default_factory=dict)
    """Values that somebody gave, or a preset; stronger than `START`."""
    values: dict[str, object] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    plan: "Plan | None" = None

    def __post_init__(self) -> None:
        usual = {name: start.value for name, start in START.items() if not start.others & self.first.keys()}
        if "train.method" in self.first:  # else the template would write the fields' defaults over the method's
            from halfbyte.recipe.method import with_defaults

            of_method: Document = with_defaults({"train": {"method": self.first["train.method"]}})  # type: ignore[assignment]
            usual |= {f"{section}.{name}": v for section, values in of_method.items() for name, v in values.items()}
        self.values = self.values or usual | self.first

    @property
    def sets(self) -> list[str]:
        """The values as `--set` has them."""
        flow = {name: yaml.safe_dump(v, default_flow_style=True, width=10**6) for name, v in self.values.items()}
        return [f"{name}={text.removesuffix('...' + chr(10)).strip()}" for name, text in flow.items()]


def init(
    path: Path = argument(Path("recipe.yaml"), None, "Where to write the recipe."),
    model: str | None = option(None, "--model", "Hub id, folder, .gguf file or packaged name."),
    data: str | None = option(None, "--data", "The training rows."),
    machine: str | None = option(
        None, "--machine", "Where it will train: 24GB or 4x80GB for cards, cpu:16GB; default: here."
    ),
    kind: Annotated[
        str | None,
        typer.Option("--for", metavar="NAME", help=f"A preset: {', '.join(presets())}.", autocompletion=presets),
    ] = None,
    set_: Set = [],  # noqa: B006  typer copies it
    json_: Json = False,
) -> None:
    """Write a commented recipe to start from; at a terminal it asks for what is not given."""
    from halfbyte.recipe import command
    from halfbyte.recipe.file import init_template

    first = first_values(kind, set_)
    command.check_new(path)
    asks = sys.stdin.isatty() and show.out.is_terminal and None in (model, data, machine) and not json_
    draft = asked(model, data, machine, first) if asks else given(model, data, machine, first)
    if kind is not None:
        start = preset(kind)
        draft.remarks.insert(0, f"for {kind}: {start.what}" + (start.measured and f"; measured: {start.measured}"))
    run = Path("runs") / Path(draft.data).stem
    if run.exists():  # a run is never overwritten
        free = next(number for number in count(2) if not run.with_name(f"{run.name}-{number}").exists())
        draft.values["output"] = f"{run}-{free}"
    command.write_new(path, init_template(draft.model, draft.data, draft.values, draft.remarks))
    if json_:
        plan = None if draft.plan is None else draft.plan.to_json()
        show.document({"recipe": str(path), "remarks": draft.remarks, "plan": plan})
        return
    show.text(f"wrote {path}")
    for remark in draft.remarks:
        show.paragraph(f"  {remark}")
    show.text(f"  next: halfbyte data check {typed(path)}   then   halfbyte train {typed(path)}")


def import_config(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML of Axolotl, LLaMA-Factory, mlx-lm; .py, .ipynb.")],
    out: Path = option(Path("recipe.yaml"), "--out", "Where to write the recipe."), json_: Json = False,
) -> None:  # fmt: skip
    """Make a recipe of another tool's config, or of a script that trains with TRL or Unsloth, which is not run."""
    from halfbyte.data.reading import read
    from halfbyte.recipe import command, peers

    config = peers.read(file)
    rows, told = str(config.values["data.train"]), peers.ImportedField("data.mask", "default", "all, as trl does it")
    if told in config.items and Path(rows).is_file() and {"prompt", "completion"} <= {*read.columns(rows)}:
        config.values["data.mask"] = "completion"
        config.items[config.items.index(told)] = told._replace(text="completion, as trl does it with such columns")
    stops = [f"{item.name}: {item.text}" for item in config.items if item.kind == "stops"]
    if not stops:
        command.write_new(out, config.recipe(file.name), "--out NAME.yaml")
    if show.as_json(json_):
        show.document({"tool": config.tool, "recipe": None if stops else str(out), "values": config.values,
                       "fields": [item._asdict() for item in config.items]})  # fmt: skip
    else:
        fields = show.table("field", "", "")
        for item in config.items:
            fields.add_row(show.escaped(item.name), item.kind, show.escaped(item.text))
        show.out.print(fields)
    if stops:
        raise RecipeError(f"{file} asks for what halfbyte does not train:\n  - " + "\n  - ".join(stops))
    if not json_:
        counts = Counter(item.kind for item in config.items)
        show.text(f"wrote {out} ({', '.join(f'{count} {kind}' for kind, count in counts.items())})")
        needed = [i.name for i in config.items if i.kind == "refused" and i.name in peers.NEEDED]
        first = f"put in {', '.join(needed)}   then   " if needed else ""
        show.text(f"  next: {first}halfbyte data check {typed(out)}   then   halfbyte train {typed(out)}")


def first_values(kind: str | None, overrides: Sequence[str]) -> dict[str, object]:
    """What a preset and `--set` say, by dotted name. Raises RecipeError: no such preset, no such field."""
    from halfbyte.recipe.command import NO_ROWS
    from halfbyte.recipe.file import recipe_from

    values = dict(preset(kind).values) if kind is not None else {}
    values |= {name: yaml.safe_load(text) for name, _, text in (pair.partition("=") for pair in overrides)}
    recipe_from(MODEL, NO_ROWS, Draft("", "", values).sets)
    return values


def given(model: str | None, data: str | None, machine: str | None, first: dict[str, object]) -> Draft:
    """The draft of what the options say. Rows that are not named need not be there yet."""
    draft = Draft(model or MODEL, data or ROWS, first)
    if data is None and not Path(ROWS).is_file():
        draft.remarks.append(f"{ROWS} is not here yet: name your rows under data.train")
        return draft
    look_at_rows(draft)
    try:
        fit(draft, machine)
    except HalfbyteError as error:
        if model is not None and machine is not None:
            raise
        draft.remarks.append(f"not planned: {error.message}")
    return draft


def asked(model: str | None, data: str | None, machine: str | None, first: dict[str, object]) -> Draft:
    """The draft of three answers; one that cannot be is told at once and asked for again."""
    from halfbyte.models.sources.pypi import MODELS
    from halfbyte.system.device import detect

    draft = Draft(model or "", data or "", first)

    def model_is(answer: str) -> None:
        draft.model = answer
        look_at_model(answer)

    def rows_are(answer: str) -> None:
        draft.values, draft.remarks = Draft("", "", first).values, []
        draft.data = answer
        look_at_rows(draft, _agrees)

    here = sorted(str(p) for pattern in ("*.jsonl", "*.csv", "*.parquet") for p in Path().glob(pattern))
    rows = next((name for name in here if "train" in name), here[0] if here else ROWS)
    packaged = f"a hub id, a folder, a .gguf file, or packaged: {', '.join(MODELS)}"
    _ask(f"Which model? ({packaged})", MODEL, model_is, model)
    _ask("Which rows?" + (f" (here: {', '.join(here[:6])})" if here else ""), rows, rows_are, data)
    from halfbyte.cli.show_plan import machine as in_words

    _ask(
        f"Where will it train? (here: {in_words(detect())}; or 24GB for a card, cpu:16GB for a machine without)",
        "here",
        lambda answer: fit(draft, None if answer == "here" else answer),
        machine,
    )
    return draft


def _ask(question: str, default: str, take: Callable[[str], None], answer: str | None) -> None:
    """Ask until an answer is taken; `answer` is one that was given as an option, and is taken or refused."""
    if answer is not None:
        take(answer)
        return
    ask = show.questioner()
    show.paragraph(question)
    while True:
        try:
            take(ask(default) or default)
            return
        except HalfbyteError as error:
            show.warning(str(error))
        except EOFError:  # Ctrl-D leaves as Ctrl-C does, and nothing is written
            raise KeyboardInterrupt from None


def _agrees(question: str) -> bool:
    answers: list[str] = []

    def take(answer: str) -> None:
        if answer.lower() not in ("y", "yes", "n", "no"):
            raise RecipeError(f"yes or no is needed, got {answer!r}.")
        answers.append(answer.lower())

    _ask(question, "yes", take, None)
    return answers[-1].startswith("y")


def look_at_model(model: str) -> None:
    """A HalfbyteError where a run would not find the model, or its shape is not known."""
    from halfbyte.models import describe
    from halfbyte.models.sources import lookup
    from halfbyte.recipe.command import NO_ROWS
    from halfbyte.recipe.file import recipe_from

    recipe = recipe_from(model, NO_ROWS, ["data.eval=none"]).recipe
    lookup.look(recipe)
    describe.describe(recipe.model, recipe.revision)


def look_at_rows(draft: Draft, ask: Callable[[str], bool] | None = None) -> None:
    """Which columns are read, of each file, and the held-out rows beside them. A DataError where the rows cannot be
    read. `ask`: a question to answer with yes or no; None: nobody is there."""
    from halfbyte.data.reading import files, read
    from halfbyte.recipe.task import EMBED, GROUPS

    names = draft.data
    try:
        sources = files.find(names)
    except files.IsFolder as folder:
        raise DataError(folder.message, fix=folder.fix and f"--data {typed(folder.pattern)}") from None
    ways = {str(s.path): _how_read(draft, str(s.path), ask) for s in sources if s.kind != "hub"}
    if len({str(way) for way in ways.values()}) == 1:  # all alike
        draft.values |= {f"data.{name}": value for name, value in next(iter(ways.values())).items()}
    elif ways:
        draft.values["data.train"] = [{"path": name, **way} if way else name for name, way in ways.items()]
    of_labels = ways and all({"text", "label"} <= {*read.columns(name)} for name in ways)
    if of_labels and draft.first.get("task") == EMBED and "vectors.loss" not in draft.first:
        draft.values["vectors.loss"] = GROUPS
        draft.remarks.append(f"texts with a label: {GROUPS}")
    path = Path(names)
    for word in HELD_OUT if "train" in path.stem else ():
        beside = path.with_name(path.name.replace("train", word))
        if beside.is_file():
            draft.values["data.eval"] = str(beside)
            draft.remarks.append(f"{beside} is held out")
            break


def _how_read(draft: Draft, name: str, ask: Callable[[str], bool] | None) -> Document:
    """What the recipe must say of how a file is read: its fields or its format; nothing where its columns say it."""
    from halfbyte.data.reading import read
    from halfbyte.recipe.file import recipe_from

    try:
        read.look(name, recipe_from(draft.model, name, draft.sets).recipe.data)
        return {}
    except read.Unclear as unclear:
        pair = unclear.asking, unclear.answering
        question = f"{name}: is {pair[0]} to be answered with {pair[1]}? (yes; or no: {pair[0]} is learned alone)"
        if ask is not None and not ask(question):
            draft.remarks.append(f"of {name} only {pair[0]} is learned, as plain text")
            return {"format": "text"}
        how = f"; to learn {pair[0]} alone: data.format: text"
    except DataError:
        guess, how = read.likely(name), ""
        if guess is None or {"data.fields", "data.format"} & draft.values.keys():
            raise
        pair = guess
    names = PAIRS.get(str(draft.values.get("task")), ("prompt", "completion"))
    way: Document = {"fields": dict(zip(names, pair, strict=True))}
    read.look(name, recipe_from(draft.model, name, [*draft.sets, f"data.fields={way['fields']}"]).recipe.data)
    draft.remarks.append(f"{name}: the column {pair[0]} asks, {pair[1]} answers{how}")
    return way


def fit(draft: Draft, machine: str | None) -> None:
    """Plan it, and change what keeps it from fitting: the longest row allowed, then what the plan proposes. A draft
    that does not fit stays as it is.

    Raises:
        HalfbyteError: the model cannot be planned, the machine is none, or nothing makes it fit.
    """
    from halfbyte.models import describe
    from halfbyte.models.context import context_in
    from halfbyte.plan import estimate, number_format
    from halfbyte.recipe.file import recipe_from

    def planned() -> estimate.Estimate:
        loaded = recipe_from(trial.model, trial.data, trial.sets)
        return estimate.plan_model(number_format.settle(loaded, device=machine), device=machine)

    if machine is not None:
        estimate.parse_device(machine, "--machine")
    trial = Draft(draft.model, draft.data, draft.first, dict(draft.values), list(draft.remarks))
    recipe = recipe_from(trial.model, trial.data, trial.sets).recipe
    context = context_in(describe.describe(recipe.model, recipe.revision).config)
    longest = round(COUNTED_WRONG * estimate.longest_row(recipe))
    if longest > recipe.data.max_length:
        room = 1 << (longest - 1).bit_length()
        trial.values["data.max_length"] = min(room, context.tokens) if context is not None else room
    estimated = planned()
    # rows that are longer than the limit would be refused
    fixes = [fix for fix in estimated.plan.fixes if not fix.setting.startswith("data.")]
    for fix in fixes[:MOST_FIXES]:
        name, _, value = fix.setting.partition("=")
        trial.values[name] = yaml.safe_load(value)
        trial.remarks.append(f"{fix.setting}, as memory is short: {fix.change}")
        estimated = planned()
        if not estimated.plan.short_bytes:
            break
    plan = estimated.plan
    if plan.short_bytes:
        raise RecipeError(
            f"{draft.model} does not fit {machine or 'here'}: {show.gb(plan.short_bytes)} are missing.",
            fix=f"a smaller model, or another machine; `halfbyte plan {typed(draft.model)}` says what would help",
        )
    needs = plan.memory_line
    trial.remarks.append("; ".join([f"planned for {machine or 'this machine'}: {needs}", *estimated.notes[:2]]))
    draft.values, draft.remarks = trial.values, trial.remarks
    draft.plan = plan
