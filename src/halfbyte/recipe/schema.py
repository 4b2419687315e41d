"""The recipe: frozen, validated, under the ecosystem's own names; and where each of its values came from.

Why: a typo in a field's name must be an error that names the nearest valid field, never a silent default. All problems
are reported at once.
Source: names under `lora:` are those of peft.LoraConfig, under `train:` those of transformers.TrainingArguments.
Cost: no torch; pydantic and YAML.
"""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Collection, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from halfbyte.recipe.data import Data, Fields, Int, Section, is_list_of_names, number
from halfbyte.recipe.fields import (
    INIT_NAMES,
    INIT_REFUSED,
    INTEGRATIONS,
    LORA_FIELDS,
    OPTIMIZERS,
    SCHEDULES,
    SCHEDULES_NEED,
    SCHEDULES_REFUSED,
    TRAIN_FIELDS,
    FieldInfo,
)

Contradiction = tuple[tuple[str, ...], str]
"""Fields whose values exclude each other, and what is wrong in one sentence."""
Dtype = Literal["auto", "bf16", "fp16", "fp32"]
METRICS = ("loss", "eval_loss", "perplexity", "eval_perplexity")
_DTYPE_NAMES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}


class Origin(NamedTuple):
    """Where a value came from: `set` (command line) > `recipe` > `default`; `auto` was decided, and `why` says how."""

    kind: Literal["set", "recipe", "default", "auto", "command"]
    why: str


def _names(value: object) -> object:
    """A list of names, as a tuple."""
    if value is None or is_list_of_names(value):
        return value if value is None else tuple(value)
    raise ValueError("must be a list of names, such as [q_proj, v_proj]")


def _names_or_text(value: object) -> object:
    if isinstance(value, str) and value.strip():
        return value
    if is_list_of_names(value):
        return tuple(value)
    raise ValueError("must be a name, a regular expression or a list of names, such as [q_proj, v_proj]")


def _modules(value: object) -> object:
    """Names of modules, or a regular expression over full names."""
    value = _names_or_text(value)
    if isinstance(value, str):
        if re.fullmatch(r"[\w.]+(\s*,\s*[\w.]+)+", value):
            raise ValueError(f"must be a list: write [{value}]")
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"must be a list of names or a regular expression ({error})") from None
    return value


def _off_is_no(value: object) -> object:
    """YAML 1.1 reads a bare `no` as false."""
    return "no" if value is False else value


def _init(value: object) -> object:
    if isinstance(value, str):
        reason = next((why for name, why in INIT_REFUSED.items() if value.lower().startswith(name)), None)
        if reason is not None:
            raise ValueError(f"cannot be {value!r}: {reason}")
    if not isinstance(value, bool) and value not in INIT_NAMES:
        raise ValueError(f"must be true, false, {' or '.join(INIT_NAMES)}")
    return value


def _one_of(allowed: Collection[str], refused: Mapping[str, str] = MappingProxyType({})) -> BeforeValidator:
    """One of a few words; a word that is refused says why."""

    def check(value: object) -> object:
        if isinstance(value, str) and value in refused:
            raise ValueError(f"cannot be {value!r}: {refused[value]}")
        if not isinstance(value, str) or value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return value

    return BeforeValidator(check)


def _smaller_is_better(value: object) -> object:
    if value is not None and value is not False:
        raise ValueError("must be false: loss and perplexity are better when smaller")
    return value


def _integrations(value: object) -> object:
    """`none`, `all`, or names of integrations whose library is here."""
    if value is None or value in ("none", "all", [], ["none"], (), ("none",)):
        return value if value == "all" else "none"
    names = (value,) if isinstance(value, str) else value
    if not isinstance(names, (list, tuple)) or not all(
        isinstance(name, str) and name in INTEGRATIONS for name in names
    ):
        raise ValueError(f"must be none, all, or a list of {', '.join(INTEGRATIONS)}")
    for name in names:
        if not any(importlib.util.find_spec(module) for module in INTEGRATIONS[name]):
            raise ValueError(f"names {name}, which is not installed: pip install {INTEGRATIONS[name][0]}")
    return tuple(names)


def _settings(value: object) -> object:
    """Named numbers and words. YAML 1.1 reads 1e-5, without a point, as text."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise ValueError("must be a mapping of names to values, such as {num_cycles: 2}")
    return {key: _read_number(inner) if isinstance(inner, str) else inner for key, inner in value.items()}


def _read_number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _optimizer_settings(value: object) -> object:
    if not isinstance(value, str) or not re.fullmatch(r"\s*\w+\s*=[^,=]+(,\s*\w+\s*=[^,=]+)*", value):
        raise ValueError("must be name=value,name=value")
    return value


def _whole_or_share(value: float) -> float:
    """Steps, or below 1 a share of all steps, as TrainingArguments reads them."""
    if value < 1:
        return value
    if value != int(value):
        raise ValueError("must be a whole number of steps, or a share of all steps below 1")
    return int(value)


def _by_epochs_or_count(value: int) -> int:
    if value == 0:
        raise ValueError("must be -1 (by epochs) or >= 1")
    return value


def _auto_or_count(value: object) -> object:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("must be auto, or a whole number >= 1")


def _recompute(value: object) -> object:
    if value in ("auto", "selective") or isinstance(value, bool):
        return value
    raise ValueError("must be auto, true, false or selective")


Float = Annotated[float, BeforeValidator(number)]
Bool = Annotated[bool, Field(strict=True)]
Seed = Annotated[Int, Field(ge=0, lt=2**32)]
Steps = Annotated[Float, AfterValidator(_whole_or_share)]
Modules = Annotated[str | tuple[str, ...], BeforeValidator(_modules)]
Names = Annotated[tuple[str, ...] | None, BeforeValidator(_names)]
NamesOrText = Annotated[str | tuple[str, ...], BeforeValidator(_names_or_text)]


def _field(table: Mapping[str, FieldInfo], name: str, **limits: Any) -> Any:
    """A field whose default and description are written in `fields`."""
    return Field(default=table[name].default, description=table[name].what, **limits)


_lora, _train = partial(_field, LORA_FIELDS), partial(_field, TRAIN_FIELDS)


class Quant(Section):
    """How the frozen base is kept."""

    type: Literal["nf4", "fp4", "none"] = Field("nf4", description="code of the frozen weights; none keeps 16 bits")
    double_quant: Bool = Field(True, description="quantise the scales too: 4.127 instead of 4.5 bits a weight")
    compute_dtype: Annotated[Dtype, BeforeValidator(lambda v: _DTYPE_NAMES.get(v, v) if isinstance(v, str) else v)] = (
        Field("auto", description="dtype of the matrix products: auto, bf16, fp16 (cards only) or fp32")
    )
    block_size: Literal[64] = Field(64, description="weights that share a scale; transformers loads blocks of 64")
    placement: Literal["auto", "resident", "mapped", "streamed"] = Field(
        "auto",
        description="where the frozen base is kept: in RAM, memory-mapped, or streamed layer by layer",
    )
    skip_modules: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (), description="modules that are not quantised, by name"
    )
    fp32_modules: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (), description="modules that are kept in fp32, by name"
    )

    @property
    def quantises(self) -> bool:
        """Whether the base is held in fewer bits than 16."""
        return self.type != "none"

    @model_validator(mode="before")
    @classmethod
    def _empty_lists(cls, value: object) -> object:
        if not isinstance(value, Mapping):
            return value
        lists = ("skip_modules", "fp32_modules")
        return {k: v for k, v in value.items() if not (k in lists and (v is None or v == [] or v == ()))}


class Lora(Section):
    """The adapters, under the names of peft.LoraConfig."""

    r: Int = _lora("r", ge=1)
    lora_alpha: Int = _lora("lora_alpha", ge=1)
    target_modules: Modules = _lora("target_modules")
    lora_dropout: Float = _lora("lora_dropout", ge=0, lt=1)
    bias: Literal["none", "all", "lora_only"] = _lora("bias")
    task_type: Literal["CAUSAL_LM"] = _lora("task_type")
    use_rslora: Bool = _lora("use_rslora")
    use_dora: Bool = _lora("use_dora")
    lora_bias: Bool = _lora("lora_bias")
    init_lora_weights: Annotated[bool | str, BeforeValidator(_init)] = _lora("init_lora_weights")
    rank_pattern: dict[str, Annotated[Int, Field(ge=1)]] = _lora("rank_pattern")
    alpha_pattern: dict[str, Annotated[Int, Field(ge=1)]] = _lora("alpha_pattern")
    layers_to_transform: tuple[Annotated[Int, Field(ge=0)], ...] | Annotated[Int, Field(ge=0)] | None = _lora(
        "layers_to_transform"
    )
    layers_pattern: NamesOrText | None = _lora("layers_pattern")
    exclude_modules: Modules | None = _lora("exclude_modules")
    modules_to_save: Names = _lora("modules_to_save")
    trainable_token_indices: tuple[Annotated[Int, Field(ge=0)], ...] | None = _lora("trainable_token_indices")
    save_dtype: Literal["fp32", "bf16"] = _lora("save_dtype")


class Train(Section):
    """The training, under the names of transformers.TrainingArguments."""

    per_device_train_batch_size: Int = _train("per_device_train_batch_size", ge=1)
    gradient_accumulation_steps: Int = _train("gradient_accumulation_steps", ge=1)
    per_device_eval_batch_size: Int = _train("per_device_eval_batch_size", ge=1)
    num_train_epochs: Float = _train("num_train_epochs", gt=0)
    max_steps: Annotated[Int, AfterValidator(_by_epochs_or_count)] = _train("max_steps", ge=-1)
    learning_rate: Float = _train("learning_rate", gt=0)
    lr_scheduler_type: Annotated[str, _one_of(SCHEDULES, SCHEDULES_REFUSED)] = _train("lr_scheduler_type")
    lr_scheduler_kwargs: Annotated[dict[str, Any], BeforeValidator(_settings)] | None = _train("lr_scheduler_kwargs")
    warmup_steps: Steps = _train("warmup_steps", ge=0)
    weight_decay: Float = _train("weight_decay", ge=0)
    max_grad_norm: Float = _train("max_grad_norm", ge=0)
    adam_beta1: Float = _train("adam_beta1", ge=0, lt=1)
    adam_beta2: Float = _train("adam_beta2", ge=0, lt=1)
    adam_epsilon: Float = _train("adam_epsilon", gt=0)
    optim: Annotated[str, _one_of(OPTIMIZERS)] = _train("optim")
    optim_args: Annotated[str, BeforeValidator(_optimizer_settings)] | None = _train("optim_args")
    label_smoothing_factor: Float = _train("label_smoothing_factor", ge=0, lt=1)
    seed: Seed = _train("seed")
    data_seed: Seed | None = _train("data_seed")
    logging_steps: Int = _train("logging_steps", ge=1)
    logging_first_step: Bool = _train("logging_first_step")
    report_to: Annotated[str | tuple[str, ...], BeforeValidator(_integrations)] = _train("report_to")
    run_name: str | None = _train("run_name")
    eval_strategy: Annotated[Literal["auto", "no", "steps", "epoch"], BeforeValidator(_off_is_no)] = _train(
        "eval_strategy"
    )
    eval_steps: Annotated[Steps, Field(gt=0)] | None = _train("eval_steps")
    eval_on_start: Bool = _train("eval_on_start")
    save_strategy: Annotated[Literal["no", "steps", "epoch"], BeforeValidator(_off_is_no)] = _train("save_strategy")
    save_steps: Steps = _train("save_steps", gt=0)
    save_total_limit: Annotated[Int, Field(ge=1)] | None = _train("save_total_limit")
    load_best_model_at_end: Bool = _train("load_best_model_at_end")
    metric_for_best_model: Annotated[str, _one_of(METRICS)] = _train("metric_for_best_model")
    greater_is_better: Annotated[bool | None, BeforeValidator(_smaller_is_better)] = _train("greater_is_better")
    bf16: Bool | None = _train("bf16")
    fp16: Bool | None = _train("fp16")
    gradient_checkpointing: Annotated[bool | str, BeforeValidator(_recompute)] = _train("gradient_checkpointing")
    loraplus_lr_ratio: Annotated[Float, Field(gt=0)] | None = _train("loraplus_lr_ratio")
    save_minutes: Annotated[Float, Field(gt=0)] | None = _train("save_minutes")
    max_tokens_per_micro_batch: Annotated[int | str, BeforeValidator(_auto_or_count)] = _train(
        "max_tokens_per_micro_batch"
    )

    @property
    def rows_per_step(self) -> int:
        """Examples that one optimiser step takes, however they are split into micro-batches."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


class Recipe(Section):
    """Everything a run depends on."""

    model: str = Field(min_length=1, description="hub id[@revision], local folder, .gguf file, or a packaged name")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id; the same as model: id@revision")
    quant: Quant = Field(default_factory=Quant, description="how the frozen base is kept")
    lora: Lora = Field(default_factory=Lora, description="the adapters, as peft.LoraConfig names them")
    data: Data = Field(description="what is trained on")
    train: Train = Field(default_factory=Train, description="the training, as transformers.TrainingArguments names it")
    output: str = Field("runs/run", min_length=1, description="the run folder; never overwritten")
    allow_pickle: Bool = Field(False, description="read a .bin checkpoint (with weights_only)")
    trust_remote_code: Bool = Field(False, description="run Python code that the checkpoint brings")

    @model_validator(mode="after")
    def _together(self) -> Recipe:
        problems = list(contradictions(self))
        if problems:
            raise PydanticCustomError("together", "values that exclude each other", {"problems": problems})
        return self


def contradictions(recipe: Recipe) -> Iterator[Contradiction]:
    """Values that are each allowed, but not together."""
    yield from _in_source(recipe)
    yield from _in_lora(recipe)
    yield from _in_evaluation(recipe)
    yield from _in_data(recipe)
    train = recipe.train
    if train.bf16 and train.fp16:
        yield ("train.bf16", "train.fp16"), "train.bf16 and train.fp16 cannot both be true; better give neither"
    for name in ("bf16", "fp16"):
        if getattr(train, name) and recipe.quant.compute_dtype not in ("auto", name):
            said = f"train.{name} is true, but quant.compute_dtype is {recipe.quant.compute_dtype}; give one of them"
            yield (f"train.{name}", "quant.compute_dtype"), said
    schedule, given = train.lr_scheduler_type, train.lr_scheduler_kwargs or {}
    involved = ("train.lr_scheduler_type", "train.lr_scheduler_kwargs")
    if unknown := sorted(set(given) - set(SCHEDULES[schedule])):
        allowed = ", ".join(SCHEDULES[schedule]) or "nothing"
        yield involved, f"train.lr_scheduler_kwargs: {schedule} takes {allowed}, got {', '.join(unknown)}"
    needed = SCHEDULES_NEED.get(schedule, ())
    if needed and not set(needed) & set(given):
        yield involved, f"train.lr_scheduler_type {schedule} needs {' or '.join(needed)} in train.lr_scheduler_kwargs"
    names = re.findall(r"(\w+)\s*=", train.optim_args or "")
    if unknown := sorted(set(names) - set(OPTIMIZERS[train.optim])):
        allowed = ", ".join(OPTIMIZERS[train.optim]) or "nothing"
        yield ("train.optim", "train.optim_args"), f"train.optim_args: {train.optim} takes {allowed}, got {unknown[0]}"


def _in_source(recipe: Recipe) -> Iterator[Contradiction]:
    if recipe.revision is not None:
        if os.path.exists(os.path.expanduser(recipe.model)):
            yield ("model", "revision"), f"revision is for hub ids, and model {recipe.model} is a path that exists"
        elif "@" in recipe.model:
            yield ("model", "revision"), f"model {recipe.model} and revision {recipe.revision}: give the revision once"


def _in_lora(recipe: Recipe) -> Iterator[Contradiction]:
    lora = recipe.lora
    if lora.init_lora_weights == "orthogonal":
        odd = [r for r in (lora.r, *lora.rank_pattern.values()) if r % 2]
        if recipe.quant.quantises:
            said = "lora.init_lora_weights orthogonal needs quant.type none: PEFT makes it in the dtype of the base"
            yield ("lora.init_lora_weights", "quant.type"), said
        elif odd:
            said = f"lora.init_lora_weights orthogonal needs even ranks, got {odd[0]}"
            yield ("lora.init_lora_weights", "lora.r", "lora.rank_pattern"), said
    if lora.lora_bias and lora.use_dora:
        yield ("lora.lora_bias", "lora.use_dora"), "lora.lora_bias and lora.use_dora cannot both be true"
    if lora.lora_bias and isinstance(lora.init_lora_weights, str):
        said = f"lora.lora_bias needs lora.init_lora_weights true or false, got {lora.init_lora_weights}"
        yield ("lora.lora_bias", "lora.init_lora_weights"), said
    if lora.layers_pattern is not None and lora.layers_to_transform is None:
        said = "lora.layers_pattern says where lora.layers_to_transform counts; give both or neither"
        yield ("lora.layers_pattern", "lora.layers_to_transform"), said
    target = lora.target_modules
    if lora.layers_to_transform is not None and isinstance(target, str) and target not in ("auto", "all-linear"):
        said = "lora.layers_to_transform is not read with a regular expression in lora.target_modules; give a list"
        yield ("lora.layers_to_transform", "lora.target_modules"), said


def _in_data(recipe: Recipe) -> Iterator[Contradiction]:
    data = recipe.data
    if data.packing != "stream":
        return
    if data.format not in ("auto", "text"):
        said = f"data.packing stream is for plain text, and data.format is {data.format}; say rows, or format: text"
        yield ("data.packing", "data.format"), said
    if data.mask == "assistant":
        said = "data.packing stream is for plain text, in which no assistant speaks; data.mask: all"
        yield ("data.packing", "data.mask"), said
    if data.overlong != "error":
        said = f"data.overlong {data.overlong} is not read with data.packing stream: long texts are cut into blocks"
        yield ("data.packing", "data.overlong"), said


def _in_evaluation(recipe: Recipe) -> Iterator[Contradiction]:
    train, strategy = recipe.train, recipe.train.eval_strategy
    if recipe.data.eval is None:
        asking = {"eval_strategy": strategy in ("steps", "epoch"), "eval_on_start": train.eval_on_start}
        for name in (name for name, asks in asking.items() if asks):
            value = strategy if name == "eval_strategy" else "true"
            said = f"train.{name} {value} asks for evaluations, but data.eval names no held-out rows"
            yield (f"train.{name}", "data.eval"), said
    if strategy in ("no", "epoch") and train.eval_steps is not None:
        said = f"train.eval_steps is not read with train.eval_strategy {strategy}; say steps"
        yield ("train.eval_steps", "train.eval_strategy"), said


class Loaded(NamedTuple):
    """A recipe with the origin of every leaf value (by dotted path), and what is allowed but unusual."""

    recipe: Recipe
    origins: dict[str, Origin]
    warnings: tuple[str, ...]
    path: Path | None


SECTIONS: dict[str, type[Section]] = {
    "": Recipe, "quant": Quant, "lora": Lora, "data": Data, "data.fields": Fields, "train": Train,
}  # fmt: skip


def rows(loaded: Loaded) -> list[tuple[str, object, Origin]]:
    """Every leaf as (dotted field, value, origin), in the recipe's order."""
    return [(field, value, loaded.origins[field]) for field, value in leaves(loaded.recipe)]


def leaves(section: BaseModel, prefix: str = "") -> list[tuple[str, object]]:
    """Every leaf value with its dotted path; a mapping such as rank_pattern is one leaf."""
    pairs: list[tuple[str, object]] = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            pairs += leaves(value, f"{prefix}{name}.")
        else:
            pairs.append((prefix + name, value))
    return pairs
