"""`halfbyte import`: the config of another tool, or a script that trains with TRL, as a recipe.

What: each of its fields is translated, noted (it says nothing of what is learned) or refused, by the tables in
`peers.yaml`; what the tool does by default and a recipe does not is written out. A script is read and never run: the
arguments of a few calls, where their values stand in it.
Source: the example configs of Axolotl, LLaMA-Factory, mlx-lm and the notebooks of Unsloth, as of July 2026.
"""

import ast
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import yaml

from halfbyte.errors import RecipeError
from halfbyte.recipe.command import ROW_SUFFIXES
from halfbyte.recipe.fields import LORA_REFUSED, TRAIN_REFUSED, shown
from halfbyte.recipe.file import check_values, nested
from halfbyte.recipe.schema import Lora, Train
from halfbyte.types import Document, Value

CALLS = frozenset({"from_pretrained", "get_peft_model", "LoraConfig", "SFTConfig", "SFTTrainer", "TrainingArguments",
                   "UnslothTrainingArguments", "UnslothTrainer", "BitsAndBytesConfig", "train_on_responses_only",
                   "get_chat_template", "load_dataset"})  # fmt: skip
OF_METHOD = re.compile("(DPO|KTO|ORPO|CPO|GRPO|RLOO|Reward|OnlineDPO|PPO|PRM|BCO|XPO|NashMD|GKD)(Trainer|Config)")
FIRST = ("rl", "stage", "method", "task_type")  # what they say decides how others are read
NEEDED = ("model", "data.train", "train.rewards")  # fields of a recipe that somebody puts in where a config has none
SCRIPTS = (".py", ".ipynb")
UNKNOWN = "halfbyte knows no counterpart of it"
_CODE = object()  # a value that only running the script would tell


class ImportedField(NamedTuple):
    """What became of a field of the config: `kind` is translated, noted, refused or stops; default: of its tool."""

    name: str
    kind: str
    text: str


@dataclass
class ImportedConfig:
    """A config as values of a recipe, by dotted name, and what became of each of its fields."""

    tool: str
    folder: Path
    table: Document
    values: Document
    items: list[ImportedField] = field(default_factory=list)

    def put(self, name: str, target: str, value: object) -> None:
        self.values[target] = value
        self.told(name, "translated", f"{target}: {shown(value)}")

    def told(self, name: str, kind: str, text: str) -> None:
        self.items.append(ImportedField(name, kind, text))

    def recipe(self, name: str) -> str:
        """As YAML; what was refused stands at its top. `name`: the config's."""
        refused = [f"# not taken over: {item.name}: {item.text}" for item in self.items if item.kind == "refused"]
        text = yaml.safe_dump(nested(self.values), sort_keys=False, width=110, allow_unicode=True)
        return "\n".join([f"# from {name}, a config of {self.tool}; every field: docs/recipe.md", *refused, text])


def read(path: Path) -> ImportedConfig:
    """What became of a config's fields. Raises RecipeError: it cannot be read, or is of no tool that is known."""
    tables = yaml.safe_load(resources.files(__package__).joinpath("peers.yaml").read_text(encoding="utf-8"))
    try:
        text = path.read_text(encoding="utf-8")
        in_script = path.suffix in SCRIPTS
        given, calls = script(text, notebook=path.suffix == ".ipynb") if in_script else (yaml.safe_load(text), set())
    except (OSError, ValueError, yaml.YAMLError, RecursionError, SyntaxError) as error:
        mark = getattr(error, "problem_mark", None)  # YAML's; a script's error says its line itself
        where = path if mark is None else f"{path}:{mark.line + 1}"
        raise RecipeError(
            f"{where} cannot be read: {str(error).splitlines()[0]}.",
            fix="a config in YAML, a script (.py) or a notebook (.ipynb); of rows: halfbyte train MODEL ROWS",
        ) from None
    common, known = tables.pop("common"), set(given) if isinstance(given, dict) else set()
    tool = max(tables, key=lambda name: len(known & {*tables[name]["tells"]}))
    tool = "trl" if in_script else tool
    if not known or (tool != "trl" and not known & {*tables[tool]["tells"]}):
        kinds = "Axolotl, LLaMA-Factory or mlx-lm (YAML), nor a script or notebook that calls TRL or Unsloth"
        raise RecipeError(f"{path} is no config of {kinds}.", fix="`halfbyte init` writes a recipe to start from")
    every = {**common, **tables[tool]["fields"]}
    rules = {name: rule for names, rule in every.items() for name in names.split()}
    defaults = dict(tables[tool]["defaults"])
    for names, values in tables[tool].get("calls", {}).items():
        defaults |= values if calls & set(names.split()) else {}
    config = ImportedConfig(tool, path.parent, {**tables[tool], "fields": rules}, dict(defaults))
    flat = {**dict.fromkeys(tables[tool].get("needs", ())), **dict(flat_fields(given, rules))}
    for name, value in sorted(flat.items(), key=lambda item: item[0] not in FIRST):
        of_rows = name in tables[tool]["rows"] and value not in (None, _CODE)
        (_rows if of_rows else _field)(config, name, value, flat)
    _suit_method(config)
    translated = {item.text.partition(":")[0] for item in config.items if item.kind == "translated"}
    for target in [name for name in defaults if name in config.values and name not in translated]:
        config.told(target, "default", f"{shown(config.values[target])}, as {tool} does it")
    for name, value in (("model", "MODEL"), ("data.train", "train.jsonl")):
        if name not in config.values:
            config.values[name] = value
            config.told(name, "refused", f"the config does not name it; put it in the place of {value}")
    while wrong := check_values(config.values):  # what a recipe cannot hold is refused, until the rest is one
        for name in wrong:
            del config.values[name]
        targets = [item.text.partition(": ")[0] for item in config.items]
        pairs = zip(config.items, targets, strict=True)
        config.items = [
            ImportedField(i.name, "refused", wrong[target]) if target in wrong else i for i, target in pairs
        ]
    return config


def _suit_method(config: ImportedConfig) -> None:
    """What a method other than supervised fine-tuning, or a head, takes otherwise than the tool's defaults say."""
    values, method = config.values, config.values.get("train.method")
    if config.values.get("task", method) is None:
        return
    if values.get("data.mask") == config.table["defaults"].get("data.mask"):
        values.pop("data.mask", None)
    if method is None:
        return
    if method not in ("grpo", "rloo"):
        return
    if "train.rewards" not in values:
        values["train.rewards"] = "rewards.py:reward"
        config.told("train.rewards", "refused", "rewards are code; put the function in the place of rewards.py:reward")
    batch, steps = "train.per_device_train_batch_size", int(values.get("train.gradient_accumulation_steps", 4))
    group = int(values.get("train.num_generations", 8 if method == "grpo" else 2))
    if int(values.get(batch, 4)) * steps % group:
        values[batch] = group
        config.told(batch, "default", f"{group}, as a step has whole groups of train.num_generations")


def flat_fields(given: Document, rules: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, Value]]:
    """The fields, those of mappings that the rules look into by their dotted names."""
    for key, value in given.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and any(known.startswith(f"{name}.") for known in rules):
            yield from flat_fields(value, rules, f"{name}.")
        else:
            yield name, value


def _field(config: ImportedConfig, name: str, value: Value, flat: Document) -> None:
    target, how = _rule(config.table["fields"], name)
    if target == "note":
        config.told(name, "noted", how)
    elif value in (None, "", [], {}) and not (target == "stop" and isinstance(how, dict)):
        config.told(name, "noted", "not set")
    elif value is _CODE:
        config.told(name, "refused", "its value is code, which is not run")
    elif target in ("stop", "refuse"):
        fine = value is False or (isinstance(how, dict) and value in how)
        reason = how if isinstance(how, str) else how.get(value, f"{shown(value)} is not trained")
        config.told(
            name, "noted" if fine else "stops" if target == "stop" else "refused", "off" if value is False else reason
        )
    elif isinstance(how, dict):
        ours = how.get(value if isinstance(value, str | int) else "*", how.get("*"))
        if ours in ("stop", "note"):
            done, why = ("stops", f"{shown(value)} is not trained") if ours == "stop" else ("noted", shown(value))
            config.told(name, done, why)
        elif ours is None:
            config.told(name, "refused" if value else "noted", f"{shown(value)} has no counterpart" if value else "off")
        else:
            changed = CHANGES[ours](value, flat) if isinstance(ours, str) and ours in CHANGES else ours
            config.put(name, target, value if ours == "same" else changed)
    else:
        config.put(name, target, CHANGES[how](value, flat) if how else value)


def _rule(rules: Document, name: str) -> tuple[str, Value]:
    if name in rules:
        return tuple(rules[name]) if isinstance(rules[name], list) else (rules[name], None)
    for section, model, refused in (("train", Train, TRAIN_REFUSED), ("lora", Lora, LORA_REFUSED)):
        if name in model.model_fields:
            return f"{section}.{name}", None
        if name in refused:
            return "note" if section == "train" else "refuse", refused[name]
    return "refuse", UNKNOWN


def _targets(value: Value, flat: Document) -> object:
    names = value.split(",") if isinstance(value, str) and "," in value else value
    if isinstance(names, list):
        return list(dict.fromkeys(str(name).strip().rpartition(".")[2] for name in names))
    return "all-linear" if value in ("all", "linear") else value


def _labels(value: Value, flat: Document) -> object:
    return [str(label) for _, label in sorted(value.items())] if isinstance(value, dict) else value


def _rewards(value: Value, flat: Document) -> object:
    """Axolotl's FILE.FUNCTION and its weights."""
    names = [
        re.sub(r"^(.+)\.(\w+)$", r"\1.py:\2", str(name)) for name in (value if isinstance(value, list) else [value])
    ]
    return dict(zip(names, flat.get("trl.reward_weights") or [1.0] * len(names), strict=False))


def _method(value: Value, flat: Document) -> object:
    """SimPO and ORPO are losses elsewhere."""
    loss = flat.get("pref_loss", flat.get("loss_type"))
    return loss if value in ("dpo", "cpo") and loss in ("orpo", "simpo") else value


CHANGES: dict[str, Callable[[Value, Document], object]] = {
    "held_out": lambda v, _: "none" if not v else f"{100 * v:g}%" if v < 1 else str(int(v)),
    "targets": _targets,
    "names": lambda v, _: v if isinstance(v, list) else [name.strip() for name in str(v).split(",")],
    "scale": lambda v, flat: v * flat.get("lora_parameters.rank", 8),
    "thinking": lambda v, _: {"enable_thinking": v},
    "labels": _labels,
    "rewards": _rewards,
    "method": _method,
}


def _rows(config: ImportedConfig, name: str, value: Value, flat: Document) -> None:
    """Put the rows that a config names into `data.train` or `data.eval`."""
    if config.tool == "llamafactory":
        value = [*_of_info(config, [one.strip() for one in str(value).split(",")], flat)]
    types, names = config.table["types"], config.table["columns"]
    method, pairs = config.values.get("train.method"), config.table.get("pairs", {})
    entries = list[object]()
    for number, given in enumerate(value if isinstance(value, list) else [value]):
        one: Document = {"path": given} if isinstance(given, str) else dict(given or {})
        for key in ("message_property_mappings", "type", "columns", "tags"):
            one = {**one.pop(key), **one} if isinstance(one.get(key), dict) else one
        where, (kind, *more) = f"{name}[{number}]", re.split(r"[:.]", str(one.pop("type", "") or ""))
        shape, mask = types.get(kind, (None, None)) if method is None else (None, None)
        known = kind in types or (method is not None and more[:1] and more[0] in pairs)
        fields = dict(pairs.get(more[0], {})) if method is not None and more and kind != "chat_template" else {}
        if kind and not known:
            config.told(f"{where}.type", "refused", f"{kind}: data.fields or data.format says how these rows are read")
        fields |= {names[key]: one.pop(key) for key in [*one] if key in names and isinstance(one[key], str)}
        fields = {ours: theirs for ours, theirs in fields.items() if ours != theirs or method is None}
        split, part = one.pop("split", None) or one.pop("train_split", None), one.pop("name", None)
        mixed = {key: one.pop(key, None) for key in ("weight", "limit")}
        place, files = one.pop("path", None), one.pop("data_files", None)
        files = [*files.values()] if isinstance(files, dict) else files or place or "train.jsonl"
        for file in files if isinstance(files, list) else [files]:
            path = _place(config.folder, str(file), split, part)
            entry = {"path": path, "format": shape, "mask": mask, "fields": fields}
            filled = {key: v for key, v in {**entry, **mixed}.items() if v}
            entries.append(filled if len(filled) > 1 else path)
        ours = config.table.get("rows_as", {})
        for key, value_of in one.items():
            plain = key in ("ds_type", "hf_hub_url", "trust_remote_code", "ranking", "ms_hub_url")
            same = plain or (key in ours and ours[key] == value_of)
            why = "as it is here" if same else UNKNOWN if value_of else "not set"
            config.told(f"{where}.{key}", "noted" if same or not value_of else "refused", why)
    alone = len(entries) == 1 and isinstance(entries[0], str)
    config.put(name, "data.eval" if name == "test_datasets" else "data.train", entries[0] if alone else entries)


def _of_info(config: ImportedConfig, names: list[str], flat: Document) -> Iterator[Document]:
    """Data sets of LLaMA-Factory by their names, as its dataset_info.json has them."""
    folder, info = str(flat.get("dataset_dir") or "data"), dict[str, Document]()
    for place in (Path(folder), config.folder / folder, config.folder):
        with suppress(OSError, ValueError):
            info = info or json.loads((place / "dataset_info.json").read_text(encoding="utf-8"))
    parts = str(flat.get("interleave_probs") or "").split(",") if "interleave" in str(flat.get("mix_strategy")) else []
    for number, name in enumerate(names):
        known = dict(info.get(name, {}))
        if not known:
            config.told(f"dataset {name}", "refused", f"no {folder}/dataset_info.json says which file it is: name it")
        file, hub, kind = (known.pop(key, None) for key in ("file_name", "hf_hub_url", "formatting"))
        path, weight = hub if hub and not file else str(Path(folder) / (file or f"{name}.json")), parts[number:][:1]
        yield {**known, "path": path, "type": kind or "alpaca", "limit": flat.get("max_samples"),
               "weight": float(weight[0]) if weight else None}  # fmt: skip


def _place(folder: Path, name: str, split: object, part: object) -> str:
    """A file, relative to where halfbyte runs; or a data set of the hub."""
    for path in (Path(name), folder / name):
        path = path / "train.jsonl" if path.is_dir() else path  # as mlx-lm has it
        if path.is_file():
            return str(path)
    if Path(name).suffix in ROW_SUFFIXES or name.startswith("hub:"):
        return name
    return f"hub:{name}?split={str(split or 'train').partition('[')[0]}" + (f"&name={part}" if part else "")


def script(text: str, *, notebook: bool) -> tuple[Document, set[str]]:
    """The arguments of the calls that set a training up, the first of each name; `_CODE` for what only running tells.
    And the calls, as `peers.yaml` has them. Raises ValueError, SyntaxError: it is no notebook, or no Python."""
    cells = json.loads(text).get("cells", []) if notebook else [{"cell_type": "code", "source": text}]
    given, known = Document(), Document()
    calls = set[str]()
    for cell in (cell for cell in cells if cell.get("cell_type") == "code"):
        try:
            tree = ast.parse(re.sub(r"(?m)^([ \t]*)[%!].*", r"\1pass", "".join(cell["source"])))
        except SyntaxError:
            if not notebook:
                raise
            continue
        for node in sorted((n for n in ast.walk(tree) if isinstance(n, ast.Assign | ast.Call)), key=lambda n: n.lineno):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                known[node.targets[0].id] = _value(node.value, known)
            elif isinstance(node, ast.Call):
                owner, _, name = ast.unparse(node.func).rpartition(".")
                method = OF_METHOD.fullmatch(name)
                if (name in CALLS or method) and not re.search("[Tt]okenizer|[Pp]rocessor", owner):
                    given = {**_arguments(name, node, known), **given}
                    calls |= {"method" if method else name, f"{owner}.{name}"}
                if method:
                    given.setdefault("method", method[1].lower())
                if name == "from_pretrained" and "ForSequenceClassification" in ast.unparse(node):
                    given.setdefault("task_type", "SEQ_CLS")
    return given, calls


def _arguments(name: str, node: ast.Call, known: Document) -> Document:
    values = {word.arg: _value(word.value, known) for word in node.keywords if word.arg}
    first = _value(node.args[0], known) if node.args else None
    if name == "load_dataset":
        files = values.get("data_files")
        local = first in ("json", "csv", "parquet", "text") and isinstance(files, str | list)
        rows = {"path": files if local else first, "split": values.get("split"), "name": values.get("name")}
        return {"load_dataset": {k: v for k, v in rows.items() if v is not _CODE}} if isinstance(first, str) else {}
    if name.endswith("Trainer") and isinstance(values.get("model", first), str):
        return {"model_name": values.pop("model", first), **values}
    return {"model_name": first, **values} if name == "from_pretrained" and isinstance(first, str) else values


def _value(node: ast.expr, known: Document) -> Value:
    if isinstance(node, ast.Name):
        return known.get(node.id, _CODE)
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "TaskType":
        return node.attr
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, RecursionError):
        return _CODE
