"""A recipe as text: read it with `--set` on top, report every problem with its line, write it, write a commented one.

Source: YAML 1.1 through PyYAML's safe loader; precedence is `--set` > recipe > default.
"""

import glob
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import yaml
from pydantic import ValidationError

from halfbyte.errors import RecipeError, typed
from halfbyte.recipe import adapter
from halfbyte.recipe.data import DataEntry
from halfbyte.recipe.fields import INIT_SHOWN, shown
from halfbyte.recipe.messages import Problem, field_of, fields_in, first_of_each, sentences, unusual
from halfbyte.recipe.number_formats import AUTO, UNSET
from halfbyte.recipe.schema import SECTIONS, Loaded, Origin, Recipe, leaves
from halfbyte.recipe.start import StartValue
from halfbyte.recipe.task import EMBED
from halfbyte.recipe.values import is_path
from halfbyte.system import files
from halfbyte.types import Document

MOST_BYTES, MOST_VALUES = 100_000, 20_000  # PyYAML reads 100 kB a second
_KEY_TAGS = ("tag:yaml.org,2002:str", "tag:yaml.org,2002:merge")
_NOTHING = yaml.ScalarNode("", "")
_WHEN = ("train.eval_strategy", "train.eval_steps")
# What `halfbyte init` writes of each section, and the values of what it comments out.
_INIT_SHOWN = {"quant": (*SECTIONS["quant"].model_fields,), **INIT_SHOWN}
_EXAMPLES = {
    "modules_to_save": "[lm_head]",
    "metrics": "[exact_match]",
    "rows": "64",
    "eval": "test.jsonl",
    "fields": "{prompt: question, completion: answer}",
}


def load_recipe(path: Path, overrides: Sequence[str] = (), *, of_run: bool = False) -> Loaded:
    """Read a recipe file; `overrides` are `a.b=c` and win over it. `of_run`: it is a run's own, whose relative paths
    are meant from its folder (`relative_to_run`). Raises RecipeError: every problem at once, with its line in the
    file."""
    try:
        with path.open("rb") as file:
            raw = file.read(MOST_BYTES + 1)
        if len(raw) > MOST_BYTES:
            raise RecipeError(f"{path} is longer than {MOST_BYTES:,} bytes; a recipe is a page of text.")
        text = raw.decode("utf-8-sig")
    except FileNotFoundError as error:
        near = files.near_name(path, [p.name for p in path.parent.glob("*.y*ml")])
        hint = f"; did you mean {path.with_name(near)}?" if near else "."
        raise RecipeError(
            f"there is no recipe {path}{hint}", fix=f"`halfbyte init {typed(path)}` writes one"
        ) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path} is not UTF-8 text (byte {error.start}).") from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"{path} cannot be read: {getattr(error, 'strerror', error)}.") from error
    values, lines = _parse(text, str(path))
    if of_run and values.get("task") != EMBED:
        values.pop("vectors", None)  # not read; an older version's defaults of it
    return _build(values, lines, overrides, path, of_run=of_run)


def recipe_from(
    model: str, data: str, overrides: Sequence[str] = (), start: Mapping[str, StartValue] = MappingProxyType({})
) -> Loaded:
    """A recipe of defaults for a model and a file of rows. `start`: values that are stronger than the defaults, by
    field; with `START` it is the one of `halfbyte train MODEL DATA.jsonl`."""
    rows = re.sub(r"[^\w.-]+", "-", Path(data).stem).strip("-")  # a glob or a hub dataset is no name of a folder
    name = f"{Path(model.partition('@')[0]).name.removesuffix('.gguf') or 'model'}-{rows}"
    values = {"model": model, "data": {"train": data}, "output": f"runs/{name}"}
    loaded = _build(values, {}, overrides, None, start=start)
    given = {"model", "data.train", "output"}
    origins = {
        field: Origin("command", "") if field in given and origin.kind == "recipe" else origin
        for field, origin in loaded.origins.items()
    }
    return loaded._replace(origins=origins)


def relative_to_run(recipe: Recipe, folder: Path, *, model: bool) -> Recipe:
    """The recipe as it is kept in a run's folder: relative paths that are there go from that folder, so that they are
    found whatever the working directory is, and when all of it is moved. `model`: its name is a path."""

    def seen(name: str | Path) -> object:
        return os.path.relpath(name, folder) if _is_there(name) else name

    rows = {name: each_path(getattr(recipe.data, name), seen) for name in ("train", "eval")}
    data = recipe.data.model_copy(update=rows)
    return recipe.model_copy(update={"data": data, "model": each_path(recipe.model, seen) if model else recipe.model})


def each_path(names: object, change: Callable[[str | Path], object]) -> object:
    """Names of rows, each relative one as `change` has it."""
    if isinstance(names, list | tuple):
        return type(names)(each_path(one, change) for one in names)
    if isinstance(names, DataEntry):
        return names.model_copy(update={"path": each_path(names.path, change)})
    return change(names) if isinstance(names, str | Path) and not Path(names).is_absolute() else names


def _is_there(name: str | Path) -> bool:
    try:
        return Path(name).exists() or bool(glob.glob(str(name)))
    except OSError:  # longer than the system allows a name to be
        return False


def to_yaml(recipe: Recipe) -> str:
    """The recipe as YAML, but for fields that are null by default and null; loading it gives an equal recipe."""
    values = recipe.model_dump(mode="json")
    for section, model in SECTIONS.items():
        inner = values
        for name in section.split(".") if section else ():
            inner = inner[name]
        for name, field in model.model_fields.items():
            if inner[name] is None and field.default is None:
                del inner[name]
    return yaml.safe_dump(values, sort_keys=False, width=110, allow_unicode=True)


def without_defaults(recipe: Recipe) -> str:
    """What of the recipe is no default, as YAML."""
    return yaml.safe_dump(
        recipe.model_dump(mode="json", exclude_defaults=True), sort_keys=False, width=110, allow_unicode=True
    )


def init_template(model: str, data: str, values: Mapping[str, object], remarks: Sequence[str]) -> str:
    """The commented recipe that `halfbyte init` writes. It loads as it is. `values`: what is not a default, by dotted
    name. `remarks`: comments at its top."""
    about = {name: field.description for name, field in Recipe.model_fields.items()}
    lines = [
        "# A halfbyte recipe. Every field, with what it does: docs/recipe.md and docs/lora.md",
        "# Check it before training:  halfbyte train THIS_FILE --dry-run",
        *(f"# {line}" for remark in remarks for line in remark.splitlines()),
        f"model: {_scalar(model)}    # {about['model']}",
        *(f"task: {_scalar(values[name])}    # {about[name]}" for name in ("task",) if name in values),
    ]
    for section in dict.fromkeys([*_INIT_SHOWN, *(name.partition(".")[0] for name in values if "." in name)]):
        names = _INIT_SHOWN.get(section, ())
        lines.append(f"{section}:    # {about[section]}")
        given = {name.partition(".")[2]: _scalar(v) for name, v in values.items() if name.startswith(f"{section}.")}
        for name in dict.fromkeys([*names, *given]):
            field = SECTIONS[section].model_fields[name]
            value = _scalar(data) if name == "train" else _EXAMPLES.get(name) or shown(field.default)
            usual = f"; usual: {', '.join(field.examples)}" if field.examples else ""
            open_format = given.get("type") == AUTO and name in UNSET  # it sets those of the format that it chooses
            off = "# " * (name not in given and (name in _EXAMPLES or open_format))
            lines.append(f"  {off}{name}: {given.get(name, value)}    # {field.description}{usual}")
    lines.append(f"output: {_scalar(str(values.get('output', f'runs/{Path(data).stem}')))}    # {about['output']}")
    return "\n".join(lines) + "\n"


def _scalar(value: object) -> str:
    return yaml.safe_dump(value, width=10**6, default_flow_style=True, allow_unicode=True).splitlines()[0].strip()


def _parse(text: str, name: str) -> tuple[Document, dict[str, int]]:
    """YAML text to nested dicts and the line of each dotted key."""
    init = "`halfbyte init NAME.yaml` writes a recipe to start from"
    lines: dict[str, int] = {}
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise RecipeError(f"{name} is empty.", fix=init)
        if not isinstance(node, yaml.MappingNode):
            kind = "a list" if isinstance(node, yaml.SequenceNode) else "a single value"
            keys = ", ".join(Recipe.model_fields)
            raise RecipeError(f"{name} holds {kind}; a recipe is a mapping with the keys {keys}.", fix=init)
        _check_size(node)
        if problems := [*_walk(node, "", lines, ())]:
            raise RecipeError(problems, where=name)
        return loader.construct_document(node), lines
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}:" if mark is not None else ""
        deep = isinstance(error, RecursionError)
        problem = "nested too deeply" if deep else getattr(error, "problem", None) or str(error).splitlines()[0]
        raise RecipeError(f"{name}:{where} not YAML: {problem}.") from error


def _check_size(root: yaml.Node) -> None:
    """A ValueError where aliases stand for more values than a recipe has: ten lines can name each other a billion
    times. What holds itself is said elsewhere."""
    sizes: dict[int, int] = {}

    def size(node: yaml.Node) -> int:
        if id(node) not in sizes:
            sizes[id(node)] = 1  # while it is counted
            sizes[id(node)] = min(1 + sum(map(size, _parts(node))), MOST_VALUES + 1)
        return sizes[id(node)]

    if size(root) > MOST_VALUES:
        raise ValueError(f"more than {MOST_VALUES:,} values, counted where aliases stand")


def _parts(node: yaml.Node) -> list[yaml.Node]:
    """The values of a list; the keys and values of a mapping."""
    children = [] if isinstance(node, yaml.ScalarNode) else node.value
    return [part for child in children for part in (child if isinstance(child, tuple) else (child,))]


def _holds_itself(node: yaml.Node, outer: tuple[yaml.Node, ...] = ()) -> bool:
    return node in outer or any(_holds_itself(part, (*outer, node)) for part in _parts(node))


def _walk(node: yaml.MappingNode, prefix: str, lines: dict[str, int], outer: tuple[yaml.Node, ...]) -> Iterator[str]:
    """Fills in the line of each dotted key; yields what YAML takes and a recipe does not."""
    for key, value in node.value:
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or key.tag not in _KEY_TAGS:
            shown_key = key.value if isinstance(key, yaml.ScalarNode) else "a list or mapping"
            yield f"line {line}: a key must be text, got {shown_key}"
            continue
        dotted = f"{prefix}{key.value}"
        if dotted in lines:
            yield f"line {line}: {dotted} is given twice, first in line {lines[dotted]}"
        lines[dotted] = line
        if value in (*outer, node) or (isinstance(value, yaml.SequenceNode) and _holds_itself(value)):
            yield f"line {line}: {dotted} holds itself"
        elif isinstance(value, yaml.MappingNode):
            yield from _walk(value, f"{dotted}.", lines, (*outer, node))


def _build(
    values: Document, lines: dict[str, int], overrides: Sequence[str], path: Path | None, *, of_run: bool = False,
    start: Mapping[str, StartValue] = MappingProxyType({}),
) -> Loaded:  # fmt: skip
    problems: list[str] = []
    given = {dotted: Origin("recipe", f"line {lines[dotted]}" if dotted in lines else "") for dotted in _dotted(values)}
    merged = _copy(values)
    for override in overrides:
        for dotted in _set(merged, override, problems):
            given[dotted] = Origin("set", "")
            lines = {k: v for k, v in lines.items() if k != dotted}
    _give_way(merged, given)
    open_fields = {field: one for field, one in start.items() if not given.keys() & {field, *one.others}}
    for field, one in open_fields.items():
        outer, _, name = field.rpartition(".")
        if (section := _inside(merged, [outer])) is not None:
            section[name] = one.value
    if _split_revision(merged):
        given["revision"] = given["model"]
    recipe, mistakes = _validate(merged)
    problems += [text for item in mistakes for text in sentences(item, lines, given)]
    if problems or recipe is None:
        required = any("is required" in problem for problem in problems)
        raise RecipeError(
            list(dict.fromkeys(problems)),
            where=str(path) if path is not None else None,
            fix="`halfbyte init NAME.yaml` writes a recipe with every required field" if required else None,
        )
    why = {field: one.why for field, one in open_fields.items()}
    origins = {field: given.get(field, Origin("default", why.get(field, ""))) for field, _ in leaves(recipe)}
    recipe, origins = adapter.apply(*_feed_dtype(recipe, origins))
    if path is not None:
        recipe = _beside(recipe, origins, path.parent, first=of_run)
    return Loaded(recipe, origins, (*unusual(recipe), *adapter.base_warning(recipe)), path)


def _set(values: Document, override: str, problems: list[str]) -> list[str]:
    """Put one `a.b=c` into the values; a section's mapping is merged. Returns the dotted fields that it set."""
    dotted, equals, text = override.partition("=")
    dotted = dotted.strip()
    try:
        value = text if _holds_itself(yaml.compose(text, yaml.SafeLoader) or _NOTHING) else yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        value = text
    if not equals or not dotted:
        problems.append(f"--set {override}: must be FIELD=VALUE, such as lora.r=32")
        return []
    put: list[str] = []
    for name, inner in _spread(dotted, value):
        if _is_text(name) and value is not None and not isinstance(inner, (str, dict, list)):
            inner = text.strip()  # a name such as 2024 is not meant as a number
        *outer, last = name.split(".")
        if (holder := _inside(values, outer)) is None:
            problems.append(f"--set {override}: {name} is inside a value that is not a section")
            continue
        holder[last] = inner
        put += [name, *(f"{name}.{key}" for key in _dotted(inner))]
        put += [".".join(outer[:depth]) for depth in range(1, len(outer) + 1)]
    return [name for name in put if name not in SECTIONS]


def _give_way(values: Document, given: dict[str, Origin]) -> None:
    """Of the two fields that say when to evaluate, one that `--set` gives is stronger than the recipe's other."""
    train, kinds = values.get("train"), {name: given[name].kind for name in _WHEN if name in given}
    if not isinstance(train, dict) or set(kinds.values()) != {"set", "recipe"}:
        return
    weaker, stronger = sorted(kinds, key=kinds.__getitem__)
    if train["eval_strategy"] in ("no", False, "epoch") and train["eval_steps"] is not None:
        del train[weaker.partition(".")[2]]
        given[weaker] = Origin("auto", f"--set {stronger} is stronger than the recipe's")


def _inside(values: Document, keys: Sequence[str]) -> Document | None:
    """The mapping at the end of these keys, made where there is none or null; None if another value is in the way."""
    for key in keys:
        inner = values[key] = {} if values.get(key) is None else values[key]
        if not isinstance(inner, dict):
            return None
        values = inner
    return values


def _spread(dotted: str, value: object) -> list[tuple[str, object]]:
    if dotted in SECTIONS and isinstance(value, dict):
        return [pair for key, inner in value.items() for pair in _spread(f"{dotted}.{key}", inner)]
    return [(dotted, value)]


def _is_text(dotted: str) -> bool:
    outer, _, name = dotted.rpartition(".")
    field = SECTIONS[outer].model_fields.get(name) if outer in SECTIONS else None
    return field is not None and (dotted in ("data.train", "data.eval") or field.annotation in (str, str | None))


def nested(values: Mapping[str, object]) -> Document:
    """Values by their dotted names as a recipe has them."""
    sections: Document = {}
    for dotted, value in values.items():
        *outer, name = dotted.split(".")
        if (section := _inside(sections, outer)) is not None:
            section[name] = value
    return sections


def check_values(values: Mapping[str, object]) -> dict[str, str]:
    """What is wrong with values, by their dotted names; of two that exclude each other, with the later one,
    but rather not with the method."""
    wrong = dict[str, str]()
    for item in _validate(nested(values))[1]:
        for text in sentences(item, {}, {}):
            names = fields_in(text) if item["type"] == "together" else [field_of(item)]
            last = sorted((n for n in names if n in values), key=lambda n: n not in ("task", "train.method"))[-1:]
            wrong |= dict.fromkeys(last, text)
    return wrong


def _validate(values: Document) -> tuple[Recipe | None, list[Problem]]:
    """The recipe, or every problem: of single fields, then of the other fields together, with the bad ones left out."""
    try:
        return Recipe.model_validate(values), []
    except ValidationError as error:
        mistakes = first_of_each(error.errors(include_url=False))
    bad = {field_of(item) for item in mistakes if item["loc"]}
    if not bad:
        return None, mistakes
    rest = _copy(values)
    for dotted in bad:
        *outer, name = dotted.split(".")
        if (holder := _inside(rest, outer)) is not None:
            holder.pop(name, None)
    rest.setdefault("model", "unknown")
    rest["data"] = {"train": "unknown", **(rest.get("data") or {})}
    try:
        Recipe.model_validate(rest)
    except ValidationError as error:
        for item in error.errors(include_url=False):
            if item["type"] == "together":
                named = {text: fields_in(text) for text in item["ctx"]["problems"]}
                others = [t for t, names in named.items() if not bad & {*names, *(n.rpartition(".")[0] for n in names)}]
                mistakes.append({**item, "ctx": {"problems": others}})
    return None, mistakes


def _beside(recipe: Recipe, origins: Mapping[str, Origin], folder: Path, *, first: bool) -> Recipe:
    """A relative name of rows in a recipe that means nothing from here is meant from the recipe's own folder; so is
    every path of a run's recipe that is there, `first`."""

    def found(name: str | Path) -> object:
        if _is_there(name) and not first:
            return name
        # of a run that was moved alone, its paths go from where it was
        places = [Path(os.path.normpath(where / name)) for where in (folder, *([Path(recipe.output)] * first))]
        there = next((place for place in places if _is_there(place)), None)
        if there is None and first and str(name).startswith(os.pardir):
            there = places[0]  # a path for certain: it is missed under its name
        return name if there is None else str(there)

    names = ("train", "eval")
    moved = {n: each_path(getattr(recipe.data, n), found) for n in names if origins[f"data.{n}"].kind == "recipe"}
    model = each_path(recipe.model, found) if first and origins["model"].kind == "recipe" else recipe.model
    if model != recipe.model:
        model = os.path.join(os.curdir, str(model))  # a path, and no hub id or packaged name
    data = recipe.data.model_copy(update=moved)
    return recipe.model_copy(update={"data": data, "model": model})


def _feed_dtype(recipe: Recipe, origins: dict[str, Origin]) -> tuple[Recipe, dict[str, Origin]]:
    """`train.bf16` and `train.fp16` feed `quant.compute_dtype`; they never reach a Trainer's autocast."""
    asked = "bf16" if recipe.train.bf16 else "fp16" if recipe.train.fp16 else None
    if asked is None or recipe.quant.compute_dtype != "auto":
        return recipe, origins
    quant = recipe.quant.model_copy(update={"compute_dtype": asked})
    origins = {**origins, "quant.compute_dtype": Origin("auto", f"train.{asked} is true")}
    return recipe.model_copy(update={"quant": quant}), origins


def _split_revision(values: Document) -> bool:
    """`org/name@revision` -> model and revision. Not for a path that exists. Returns whether it was split."""
    model = values.get("model")
    if not isinstance(model, str) or values.get("revision") is not None or is_path(model):
        return False
    name, _, revision = model.rpartition("@")
    if name and revision:
        values["model"], values["revision"] = name, revision
    return bool(name and revision)


def _dotted(values: object, prefix: str = "") -> list[str]:
    if not isinstance(values, Mapping):
        return []
    return [name for key, inner in values.items() for name in (f"{prefix}{key}", *_dotted(inner, f"{prefix}{key}."))]


def _copy(values: Document) -> Document:
    """Nested mappings, each a copy of its own also where YAML aliases share one."""
    return {key: _copy(inner) if isinstance(inner, dict) else inner for key, inner in values.items()}
