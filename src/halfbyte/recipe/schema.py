"""The recipe: frozen, validated, under the ecosystem's own names; and where each of its values came from.

Why: a typo in a field's name must be an error that names the nearest valid field, never a silent default. All problems
are reported at once.
Source: names under `lora:` are those of peft.LoraConfig, under `train:` those of transformers.TrainingArguments.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from halfbyte.recipe import fields, method, number_formats, rewards
from halfbyte.recipe import task as tasks
from halfbyte.recipe.data import Data, Fields, Int, Section, field, must
from halfbyte.recipe.evaluation import LOSSES, METRICS, Choices, Eval
from halfbyte.system.words import SPAN, seconds_of

from halfbyte.recipe.values import (  # isort: skip
    Bool, Count, Float, Index, Modules, ModulesOrNone, Names, NamesOrNone, NamesOrText, OffIsNo, Seed, Steps, assigns,
    init, integrations, is_path, is_span, one_of, settings,
)  # fmt: skip


_DTYPE_NAMES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}


class Origin(NamedTuple):
    """Where a value came from: `set` (command line) > `recipe` > `default`; `auto` was decided, and `why` says how."""

    kind: Literal["set", "recipe", "default", "auto", "command"]
    why: str


class Quant(Section):
    """How the frozen base is kept."""

    type: Annotated[str, BeforeValidator(number_formats.known)] = field(
        "nf4",
        "code of the frozen weights: nf4, fp4, int8, gguf (a GGUF file's own blocks), none (16 bits), or auto: the "
        "most exact of them that fits and costs no time that matters",
    )
    double_quant: Bool = field(
        True, "quantise the scales too: 4.127 instead of 4.5 bits a weight; int8 has no such thing: false"
    )
    compute_dtype: Annotated[
        Literal["auto", "bf16", "fp16", "fp32"],
        BeforeValidator(lambda v: _DTYPE_NAMES.get(v, v) if isinstance(v, str) else v),
    ] = field("auto", "dtype of the matrix products: auto, bf16, fp16 (cards only) or fp32")
    compute: Literal["auto", "exact", "int8"] = field(
        "exact",
        "the frozen base's products in training: exact (in compute_dtype), int8, or auto: int8 where this machine "
        "multiplies it faster and a proof on some of the rows finds loss and gradients within bounds",
    )
    block_size: Literal[64] | None = field(
        64, "weights that share a scale; transformers loads blocks of 64; int8 has a scale for each row: null"
    )
    llm_int8_threshold: Annotated[Float, Field(ge=0)] | None = field(
        None,
        "int8: activations below this size are rounded to 8 bits, token by token (LLM.int8 has 6.0); null: none are",
    )
    placement: Literal["auto", "resident", "mapped", "streamed", "sharded"] = field(
        "auto",
        "where the frozen base is kept: in RAM, memory-mapped, streamed layer by layer, or sharded over ranks (FSDP2)",
    )
    skip_modules: NamesOrNone = field((), "modules that are not quantised, by name")
    fp32_modules: NamesOrNone = field((), "modules that are kept in fp32, by name")

    @model_validator(mode="before")
    @classmethod
    def _defaults_of_format(cls, value: object) -> object:
        """A field that the format does not read is not set, where its default is for others."""
        if not isinstance(value, Mapping) or value.get("type") not in (*number_formats.FORMATS, number_formats.AUTO):
            return value
        info = number_formats.fields_of(str(value["type"]))
        unset = {name: off for name, off in info.unread.items() if cls.model_fields[name].default != off}
        return {**unset, **value}

    def in_type(self, name: str) -> "Quant":
        """The same in another number format, with that format's own defaults."""
        shared = {field: value for field, value in self if field not in ("type", *number_formats.UNSET)}
        return self if name == self.type else Quant(**shared, type=name)

    @property
    def quantises(self) -> bool:
        """Whether the base is held in fewer bits than 16."""
        return self.type != "none"

    @property
    def in_file(self) -> bool:
        """Whether the base is what the model's file holds, so that no store of it is built."""
        return self.type == "gguf"

    @property
    def exempt(self) -> tuple[str, ...]:
        """Modules that are not quantised."""
        return (*self.skip_modules, *self.fp32_modules)


class Lora(Section):
    """The adapters, under the names of peft.LoraConfig."""

    r: Count = field(16, "rank: the adapter's width, r x (in + out) parameters a layer", "8 to 64")
    lora_alpha: Count = field(32, "scale: the adapter's output is multiplied by lora_alpha / r", "2 x r")
    target_modules: ModulesOrNone = field(
        "auto", "which layers: auto, all-linear, a list of name endings, or a regex", "auto"
    )
    target_parameters: Names | None = field(
        None, "stacks of a mixture's experts, which get an adapter too, such as [gate_up_proj, down_proj]"
    )
    lora_dropout: Float = field(
        0.05, "share of the adapter's input set to zero while training", "0, or 0.05 to 0.1", ge=0, lt=1
    )
    bias: Literal["none", "all", "lora_only"] = field(
        "none", "which biases of the base train: none, all, or lora_only (those of the target layers)", "none"
    )
    task_type: Literal["CAUSAL_LM"] = field(
        "CAUSAL_LM", "the kind of model; halfbyte trains causal language models", "CAUSAL_LM"
    )
    use_rslora: Bool = field(False, "rank-stabilised LoRA: scale by lora_alpha / sqrt(r)", "true above r 64")
    use_dora: Bool = field(
        False, "DoRA: train magnitude and direction apart; slower, often better at a low rank", "false"
    )
    lora_bias: Bool = field(False, "a trained bias in LoRA's B; can be merged only into layers with a bias", "false")
    init_lora_weights: Annotated[bool | str, BeforeValidator(init)] = field(
        True,
        "start: true (A Kaiming, B 0), gaussian, orthogonal (16-bit base), residual (what quantising has lost); false: "
        "A, B random",
    )
    rank_pattern: dict[str, Count] = field({}, "another rank for some layers: {name ending or regex: r}")
    alpha_pattern: dict[str, Count] = field({}, "another lora_alpha for some layers: {name ending or regex: alpha}")
    layers_to_transform: tuple[Index, ...] | Index | None = field(None, "only these decoder layers, by index")
    layers_pattern: NamesOrText | None = field(
        None, "the name of the list of layers, if layers_to_transform cannot find it"
    )
    exclude_modules: Modules | None = field(
        None, "layers that stay without an adapter: a list of name endings, or a regex"
    )
    modules_to_save: Names | None = field(
        None, "modules that train whole and are saved with the adapter, such as lm_head"
    )
    trainable_token_indices: tuple[Index, ...] | None = field(None, "token ids whose embedding rows train")
    adapter: str | None = field(
        None, "start from a trained adapter (a run or a PEFT folder), which decides rank, targets and the like"
    )
    save_dtype: Literal["fp32", "bf16"] = field(
        "fp32", "dtype of the saved adapter: fp32 or bf16 (half the file)", "fp32"
    )


class Train(method.MethodFields):
    """The training, under the names of transformers.TrainingArguments, and the method, under TRL's."""

    per_device_train_batch_size: Count = field(
        4, "examples that count as one batch", "with accumulation, 8 to 64 a step"
    )
    gradient_accumulation_steps: Count = field(4, "batches in one optimiser step; micro-batches are planned from both")
    per_device_eval_batch_size: Count = field(64, "the most held-out examples in one micro-batch")
    num_train_epochs: Float = field(3.0, "passes over the rows; may be a fraction", "1 to 5", gt=0)
    max_steps: Annotated[Int, must("-1 (by epochs) or >= 1", lambda v: v != 0, AfterValidator)] = field(
        -1, "optimiser steps; above 0 it overrides num_train_epochs", ge=-1
    )
    learning_rate: Annotated[Float, Field(gt=0)] | Literal["auto"] = field(
        2e-4,
        "the highest learning rate; auto: AdamW's by a law of the model's width, the adapter's scale and the rows of a "
        "step",
        "auto; 1e-4 to 3e-3, the lower the larger the model",
    )
    lr_scheduler_type: Annotated[str, one_of(fields.SCHEDULES, fields.SCHEDULES_REFUSED)] = field(
        "linear", "how the rate falls: linear, cosine, constant, ...", "linear or cosine"
    )
    lr_scheduler_kwargs: Annotated[dict[str, Any], BeforeValidator(settings)] | None = field(
        None, "arguments of the schedule, such as {num_cycles: 2} for cosine_with_restarts"
    )
    warmup_steps: Steps = field(0, "steps over which the rate rises; below 1 a share of all steps", "0.03", ge=0)
    weight_decay: Float = field(0.0, "decay of the adapter's weights (AdamW)", "0 to 0.1", ge=0)
    max_grad_norm: Float = field(1.0, "gradients are clipped to this norm; 0 for no clipping", "0.3 to 1", ge=0)
    adam_beta1: Float = field(0.9, "Adam's first moment", ge=0, lt=1)
    adam_beta2: Float = field(0.999, "Adam's second moment", ge=0, lt=1)
    adam_epsilon: Float = field(1e-8, "Adam's epsilon", gt=0)
    optim: Annotated[str, one_of(fields.OPTIMIZERS)] = field(
        "adamw_torch", "adamw_torch, adamw_torch_fused, adafactor, sgd, adagrad, rmsprop", "adamw_torch"
    )
    optim_args: Annotated[str, must("name=value,name=value", assigns)] | None = field(
        None, "arguments of sgd, adagrad or rmsprop, as name=value,name=value"
    )
    label_smoothing_factor: Float = field(0.0, "label smoothing of the training loss", "0", ge=0, lt=1)
    seed: Seed = field(
        42, "seed of the adapters' start, of dropout, and of the order of rows (unless data_seed is given)"
    )
    data_seed: Seed | None = field(None, "seed of the order of rows")
    logging_steps: Count = field(1, "steps between printed lines and reports; metrics.jsonl always has every step")
    logging_first_step: Bool = field(False, "report the first step to report_to too, whatever logging_steps")
    report_to: Annotated[str | tuple[str, ...], BeforeValidator(integrations)] = field(
        "none", "none, or installed integrations of transformers, such as [tensorboard]"
    )
    run_name: str | None = field(None, "the run's name for report_to")
    eval_strategy: Annotated[Literal["auto", "no", "steps", "epoch"], OffIsNo] = field(
        "auto", "auto (with held-out rows: by eval_steps, or each epoch, and at the end), no, steps, epoch"
    )
    eval_steps: Annotated[Steps, Field(gt=0)] | None = field(
        None, "steps between evaluations; below 1 a share of all; none given: logging_steps"
    )
    eval_on_start: Bool = field(False, "evaluate before the first step too")
    save_strategy: Annotated[Literal["no", "steps", "epoch"], OffIsNo] = field(
        "steps", "checkpoints by steps, epoch, or no (then by save_minutes and on a signal)"
    )
    save_steps: Steps = field(100, "steps between checkpoints; below 1 a share of all steps", gt=0)
    save_total_limit: Count | None = field(2, "how many checkpoints are kept; null for all")
    load_best_model_at_end: Bool = field(
        True, "with evaluations: the adapter is that of the best one, not of the last step"
    )
    metric_for_best_model: Annotated[
        str,
        one_of(
            lambda: [p + n for n in (*LOSSES, *METRICS, rewards.REWARD) for p in ("", "eval_")], ends=("loss", *METRICS)
        ),
    ] = field(
        "loss",
        "the best evaluation has the lowest loss or perplexity, or the highest of a score in eval.metrics; of one "
        "source NAME: NAME_loss, NAME_exact_match, ...",
    )
    max_forgetting: Annotated[Float, Field(ge=0)] | None = field(
        None,
        "only an evaluation whose loss on a text of the base's kind is at most this above the base's can be the best",
        "0.02 to 0.1",
    )
    max_source_rise: Annotated[Float, Field(ge=0)] | None = field(
        None,
        "only an evaluation in which no source has lost more than this above the base can be the best",
        "0.02 to 0.1",
    )
    greater_is_better: Bool | None = field(
        None, "follows from metric_for_best_model: false of loss and perplexity, true of a score"
    )
    early_stopping_patience: Count | None = field(
        None, "stop after so many evaluations in a row without a better metric_for_best_model", "2 to 5"
    )
    early_stopping_threshold: Float = field(0.0, "a metric is better by more than this", ge=0)
    bf16: Bool | None = field(None, "compute in bf16: feeds quant.compute_dtype, never autocast")
    fp16: Bool | None = field(
        None, "compute in fp16 with loss scaling on a card; a CPU computes in bf16 or fp32 instead"
    )
    gradient_checkpointing: Annotated[
        bool | str, must("auto, true, false or selective", lambda v: v in ("auto", "selective") or isinstance(v, bool))
    ] = field("auto", "recompute activations: auto (as memory asks), true, false, selective (what is cheap)", "auto")
    loraplus_lr_ratio: Annotated[Float, Field(gt=0)] | None = field(
        None, "LoRA+: learning rate of B over that of A", "16, with a lower rate"
    )
    save_minutes: Annotated[Float, Field(gt=0)] | None = field(
        15.0, "minutes between checkpoints, beside save_steps; null for none"
    )
    max_tokens_per_micro_batch: Annotated[
        int | str, must("auto, or a whole number >= 1", lambda v: v == "auto" or (type(v) is int and v >= 1))
    ] = field("auto", "tokens of a micro-batch: auto (what fits) or a number", "auto")
    within: Annotated[str, must(SPAN, is_span)] | None = field(
        None, "the time for all of it: an open learning rate is probed, and the rate falls to 0 with the time", "30m"
    )

    @property
    def within_s(self) -> float | None:
        """Seconds of `within`."""
        return None if self.within is None else seconds_of(self.within)

    @property
    def best_metric(self) -> str:
        """`metric_for_best_model` without the prefix that transformers allows."""
        return self.metric_for_best_model.removeprefix("eval_")

    @property
    def best_is_greatest(self) -> bool:
        """Whether the best evaluation is that with the greatest metric."""
        return not self.best_metric.endswith(LOSSES)

    @property
    def order_seed(self) -> int:
        return self.seed if self.data_seed is None else self.data_seed

    @property
    def rows_per_step(self) -> int:
        """Rows that one optimiser step takes, however they are split into micro-batches."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps // (self.num_generations or 1)


class Recipe(tasks.FormatOfTask):
    """Everything a run depends on."""

    model: str = field(..., "hub id[@revision], local folder, .gguf file, or a packaged name", min_length=1)
    revision: str | None = field(None, "branch, tag or commit of a hub id; the same as model: id@revision")
    task: tasks.Task = field(tasks.CAUSAL_LM, "what it becomes: causal_lm (writes), classify, regress, tag or embed")
    labels: Choices = field(None, "task classify, tag: all labels, in order; null: the training rows', sorted")
    class_weight: tasks.ClassWeight = field(None, "what labels count for: balanced, or {label: number}, others 1")
    vectors: tasks.VectorFields = field(tasks.VectorFields(), "task embed: the loss, and how a vector is made")
    quant: Quant = field(Quant(), "how the frozen base is kept")
    lora: Lora = field(Lora(), "the adapters, as peft.LoraConfig names them")
    data: Data = field(..., "what is trained on")
    train: Train = field(Train(), "the training, as transformers.TrainingArguments names it")
    eval: Eval = field(Eval(), "what answers are scored by")
    output: str = field("runs/run", "the run folder; never overwritten", min_length=1)
    allow_pickle: Bool = field(False, "read a .bin checkpoint (with weights_only)")
    trust_remote_code: Bool = field(False, "run Python code that the checkpoint brings")

    _defaults_of_method = model_validator(mode="before")(method.with_defaults)

    @model_validator(mode="after")
    def _together(self) -> "Recipe":
        problems = [*_in_source(self), *in_quant(self.quant), *_in_lora(self), *_in_train(self)]
        problems += [*self.data.problems(self.task, self.train.model_dump()), *method.problems(self.train, self.data)]
        problems += tasks.problems(self.model_dump(exclude_defaults=True))
        problems += rewards.problems(self.train, self.eval.pattern, self.lora.lora_dropout, self.quant.model_dump())
        if problems:
            raise PydanticCustomError("together", "values that exclude each other", {"problems": problems})
        return self


# Values that are each allowed, but not together: sentences, and each names the fields by their dotted names.


def _in_source(recipe: Recipe) -> Iterator[str]:
    if recipe.revision is not None:
        if is_path(recipe.model):
            yield f"revision is for hub ids, and model {recipe.model} is a path that exists"
        elif "@" in recipe.model:
            yield f"model {recipe.model} and revision {recipe.revision}: give the revision once"


def in_quant(quant: Quant) -> Iterator[str]:
    """What excludes each other in `quant:`, in sentences."""
    yield from number_formats.fields_of(quant.type).problems(quant)


def _in_lora(recipe: Recipe) -> Iterator[str]:
    lora, target = recipe.lora, recipe.lora.target_modules
    if lora.init_lora_weights == "orthogonal":
        odd = [r for r in (lora.r, *lora.rank_pattern.values()) if r % 2]
        if recipe.quant.quantises:
            yield "lora.init_lora_weights orthogonal needs quant.type none: PEFT makes it in the dtype of the base"
        elif odd:
            yield f"lora.init_lora_weights orthogonal needs even ranks, got {odd[0]}"
    quantises = recipe.quant.type not in ("none", "gguf", number_formats.AUTO)
    yield from fields.excluded_by_residual(lora.init_lora_weights, lora.use_dora, lora.adapter, quantises=quantises)
    if lora.lora_bias and lora.use_dora:
        yield "lora.lora_bias and lora.use_dora cannot both be true"
    if lora.lora_bias and isinstance(lora.init_lora_weights, str):
        yield f"lora.lora_bias needs lora.init_lora_weights true or false, got {lora.init_lora_weights}"
    if not target and not lora.target_parameters:
        yield "lora.target_modules is empty, and so is lora.target_parameters: nothing would train; auto"
    if lora.target_parameters:
        if lora.lora_dropout:
            yield (
                f"lora.lora_dropout {lora.lora_dropout:g} cannot be had with lora.target_parameters: PEFT adds such an "
                "adapter to the weight, where no input is left to drop; set lora.lora_dropout: 0"
            )
        for name in (name for name in ("use_dora", "lora_bias") if getattr(lora, name)):
            yield f"lora.{name} is not for lora.target_parameters: PEFT's adapter of a parameter knows none"
        if lora.init_lora_weights == "orthogonal":
            yield "lora.init_lora_weights orthogonal is not for lora.target_parameters; true or gaussian"
        if lora.layers_to_transform is not None:
            yield (
                "lora.layers_to_transform is not read for lora.target_parameters (PEFT adapts every layer's experts); "
                "name layers in lora.target_parameters, such as layers.0.mlp.experts.down_proj"
            )
    if lora.layers_pattern is not None and lora.layers_to_transform is None:
        yield "lora.layers_pattern says where lora.layers_to_transform counts; give both or neither"
    if lora.layers_to_transform is not None and isinstance(target, str) and target not in ("auto", "all-linear"):
        yield "lora.layers_to_transform is not read with a regular expression in lora.target_modules; give a list"


def _in_train(recipe: Recipe) -> Iterator[str]:
    train, dtype = recipe.train, recipe.quant.compute_dtype
    strategy = train.eval_strategy
    if recipe.data.eval == "none":
        asking = {
            f"eval_strategy {strategy}": strategy in ("steps", "epoch"),
            "eval_on_start true": train.eval_on_start,
            f"early_stopping_patience {train.early_stopping_patience}": train.early_stopping_patience is not None,
            f"max_forgetting {train.max_forgetting}": train.max_forgetting is not None,
            f"max_source_rise {train.max_source_rise}": train.max_source_rise is not None,
        }
        for name in (name for name, asks in asking.items() if asks):
            yield f"train.{name} asks for evaluations, but data.eval is none; data.eval: 5% holds rows out for them"
    if strategy in ("no", "epoch") and train.eval_steps is not None:
        yield f"train.eval_steps is not read with train.eval_strategy {strategy}; say steps"
    if strategy == "no" and train.early_stopping_patience is not None:
        yield "train.early_stopping_patience counts evaluations, and train.eval_strategy is no"
    name, greatest = train.best_metric, train.best_is_greatest
    of_answers = {*(recipe.eval.metrics or ()), rewards.REWARD}
    if greatest and name.removeprefix(recipe.data.source_of(name)) not in of_answers:
        yield f"train.metric_for_best_model {name} is not among eval.metrics, so no evaluation would have it"
    elif name not in (*LOSSES, *METRICS, rewards.REWARD) and not recipe.data.source_of(name):
        known = ", ".join(recipe.data.scored_sources) or "none, as no entry of data.train has a name"
        yield f"train.metric_for_best_model {name} is of no source of the held-out rows; they are of {known}"
    if train.max_source_rise is not None and not recipe.data.scored_sources:
        yield "train.max_source_rise is about sources, and data.train names none: a list of {path: FILE, name: NAME}"
    if train.greater_is_better is not None and train.greater_is_better != greatest:
        better = "greater" if greatest else "smaller"
        as_given = str(train.greater_is_better).lower()
        yield f"train.greater_is_better {as_given}: {name} (train.metric_for_best_model) is better when {better}"
    if "regex" in (recipe.eval.metrics or ()) and not recipe.eval.pattern:
        yield "eval.metrics has regex, which needs eval.pattern, a regular expression"
    if train.within is not None and train.lr_scheduler_type != "linear":
        yield f"train.within lets the rate fall linearly, and train.lr_scheduler_type is {train.lr_scheduler_type}"
    if train.bf16 and train.fp16:
        yield "train.bf16 and train.fp16 cannot both be true; better give neither"
    for name in ("bf16", "fp16"):
        if getattr(train, name) and dtype not in ("auto", name):
            yield f"train.{name} is true, but quant.compute_dtype is {dtype}; give one of them"
    for name, reads in (("optim", "adam" in train.optim), ("loraplus_lr_ratio", train.loraplus_lr_ratio is None)):
        if train.learning_rate == number_formats.AUTO and not reads:
            yield f"train.learning_rate auto is AdamW's, not that of train.{name} {getattr(train, name)}; give a number"
    schedule, given = train.lr_scheduler_type, set(train.lr_scheduler_kwargs or {})
    yield from fields.unread("lr_scheduler_kwargs", f"lr_scheduler_type {schedule}", fields.SCHEDULES[schedule], given)
    needed = fields.SCHEDULES_NEED.get(schedule, ())
    if needed and not given & set(needed):
        yield f"train.lr_scheduler_type {schedule} needs {' or '.join(needed)} in train.lr_scheduler_kwargs"
    given = set(re.findall(r"(\w+)\s*=", train.optim_args or ""))
    yield from fields.unread("optim_args", f"optim {train.optim}", fields.OPTIMIZERS[train.optim], given)


class Loaded(NamedTuple):
    """A recipe with the origin of every leaf value (by dotted path), and what is allowed but unusual."""

    recipe: Recipe
    origins: dict[str, Origin]
    warnings: tuple[str, ...]
    path: Path | None


SECTIONS: dict[str, type[Section]] = {
    "": Recipe, "quant": Quant, "lora": Lora, "data": Data, "data.fields": Fields, "train": Train, "eval": Eval,
    "vectors": tasks.VectorFields,
}  # fmt: skip


def rows(loaded: Loaded) -> list[tuple[str, object, Origin]]:
    """Every leaf as (dotted field, value, origin), in the recipe's order."""
    return [(name, value, loaded.origins[name]) for name, value in leaves(loaded.recipe)]


def leaves(section: BaseModel, prefix: str = "") -> list[tuple[str, object]]:
    """Every leaf value with its dotted path; a mapping such as rank_pattern is one leaf."""
    pairs: list[tuple[str, object]] = []
    for name, value in section:
        pairs += leaves(value, f"{prefix}{name}.") if isinstance(value, BaseModel) else [(prefix + name, value)]
    return pairs
