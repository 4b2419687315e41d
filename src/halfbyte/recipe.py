"""The recipe: frozen, validated, under the ecosystem's own names; and where each of its values came from.

Why: a typo in a field's name must be an error with the nearest valid name, never a default in silence; and every
problem is reported at once, since each costs its user a round.
Source: names under `lora:` are those of peft.LoraConfig, under `train:` those of transformers.TrainingArguments.
Cost: no torch; pydantic and YAML.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from halfbyte.fields import (
    INIT_REFUSED,
    LORA_FIELDS,
    OPTIMIZERS_ANYWHERE,
    OPTIMIZERS_ON_CARDS,
    SCHEDULES,
    TRAIN_FIELDS,
)

Dtype = Literal["auto", "bf16", "fp16", "fp32"]
_DTYPE_NAMES = {"bfloat16": "bf16", "float16": "fp16", "half": "fp16", "float32": "fp32", "float": "fp32"}


class Origin(NamedTuple):
    """Where a value came from: `set` (command line) > `recipe` > `default`; `auto` was decided, and `why` says how."""

    kind: Literal["set", "recipe", "default", "auto", "command"]
    why: str


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("must be a number")
    return value


def _names(value: Any) -> Any:
    """A list of names, as a tuple."""
    if value is None or isinstance(value, (tuple, list)):
        if value is not None and not (value and all(isinstance(v, str) and v for v in value)):
            raise ValueError("must be a list of names")
        return tuple(value) if value is not None else None
    raise ValueError("must be a list of names, such as [q_proj, v_proj]")


def _names_or_text(value: Any) -> Any:
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, (tuple, list)) and value and all(isinstance(v, str) and v for v in value):
        return tuple(value)
    raise ValueError("must be a name, a regular expression or a list of names, such as [q_proj, v_proj]")


def _off_is_no(value: Any) -> Any:
    """YAML 1.1 reads a bare `no` as false."""
    return "no" if value is False else value


def _init(value: Any) -> Any:
    if isinstance(value, str):
        reason = next((why for name, why in INIT_REFUSED.items() if value.lower().startswith(name)), None)
        if reason is not None:
            raise ValueError(f"cannot be {value!r}: {reason}")
    if value not in (True, False, "gaussian", "orthogonal"):
        raise ValueError("must be true, false, gaussian or orthogonal")
    return value


def _optimizer(value: Any) -> Any:
    if value not in (*OPTIMIZERS_ANYWHERE, *OPTIMIZERS_ON_CARDS):
        anywhere, on_cards = ", ".join(OPTIMIZERS_ANYWHERE), ", ".join(OPTIMIZERS_ON_CARDS)
        raise ValueError(f"must be one of {anywhere}, or on a card {on_cards}")
    return value


def _one_of(*allowed: str) -> BeforeValidator:
    def check(value: Any) -> Any:
        if value not in allowed:
            raise ValueError(f"must be one of {', '.join(allowed)}")
        return value

    return BeforeValidator(check)


def _auto_or_count(value: Any) -> Any:
    if value == "auto" or (isinstance(value, int) and not isinstance(value, bool) and value >= 1):
        return value
    raise ValueError("must be auto, or a whole number >= 1")


def _auto_or_bool(value: Any) -> Any:
    if value == "auto" or isinstance(value, bool):
        return value
    raise ValueError("must be auto, true or false")


Int = Annotated[int, BeforeValidator(_number)]
Float = Annotated[float, BeforeValidator(_number)]
Names = Annotated[tuple[str, ...] | None, BeforeValidator(_names)]
NamesOrText = Annotated[str | tuple[str, ...], BeforeValidator(_names_or_text)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _lora(name: str, **limits: Any) -> Any:
    field = LORA_FIELDS[name]
    return Field(default=field.default, description=field.what, **limits)


def _train(name: str, **limits: Any) -> Any:
    field = TRAIN_FIELDS[name]
    return Field(default=field.default, description=field.what, **limits)


class Quant(_Section):
    """How the frozen base lies in memory."""

    type: Literal["nf4", "fp4", "none"] = Field("nf4", description="code of the frozen weights; none keeps 16 bits")
    double_quant: bool = Field(True, description="quantise the scales too: 4.127 instead of 4.5 bits a weight")
    compute_dtype: Annotated[Dtype, BeforeValidator(lambda v: _DTYPE_NAMES.get(v, v) if isinstance(v, str) else v)] = (
        Field("auto", description="dtype of the matrix products: auto, bf16, fp16 (cards only) or fp32")
    )
    block_size: Literal[64] = Field(64, description="weights that share a scale; transformers loads blocks of 64")
    skip_modules: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (), description="modules that are not quantised, by name"
    )
    fp32_modules: Annotated[tuple[str, ...], BeforeValidator(_names)] = Field(
        (), description="modules that are kept in fp32, by name"
    )

    @model_validator(mode="before")
    @classmethod
    def _empty_lists(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        lists = ("skip_modules", "fp32_modules")
        return {k: v for k, v in value.items() if not (k in lists and (v is None or v == [] or v == ()))}


class Lora(_Section):
    """The adapters, under the names of peft.LoraConfig."""

    r: Int = _lora("r", ge=1)
    lora_alpha: Int = _lora("lora_alpha", ge=1)
    target_modules: NamesOrText = _lora("target_modules")
    lora_dropout: Float = _lora("lora_dropout", ge=0, lt=1)
    bias: Literal["none", "all", "lora_only"] = _lora("bias")
    task_type: Literal["CAUSAL_LM"] = _lora("task_type")
    use_rslora: bool = _lora("use_rslora")
    use_dora: bool = _lora("use_dora")
    lora_bias: bool = _lora("lora_bias")
    init_lora_weights: Annotated[bool | str, BeforeValidator(_init)] = _lora("init_lora_weights")
    rank_pattern: dict[str, Annotated[Int, Field(ge=1)]] = _lora("rank_pattern")
    alpha_pattern: dict[str, Annotated[Int, Field(ge=1)]] = _lora("alpha_pattern")
    layers_to_transform: tuple[Annotated[Int, Field(ge=0)], ...] | Annotated[Int, Field(ge=0)] | None = _lora(
        "layers_to_transform"
    )
    layers_pattern: NamesOrText | None = _lora("layers_pattern")
    exclude_modules: NamesOrText | None = _lora("exclude_modules")
    modules_to_save: Names = _lora("modules_to_save")
    trainable_token_indices: tuple[Annotated[Int, Field(ge=0)], ...] | None = _lora("trainable_token_indices")
    save_dtype: Literal["fp32", "bf16"] = _lora("save_dtype")

    @model_validator(mode="after")
    def _together(self) -> Lora:
        if self.init_lora_weights == "orthogonal" and self.r % 2:
            raise ValueError(f"lora.init_lora_weights orthogonal needs an even lora.r, got {self.r}")
        if self.layers_pattern is not None and self.layers_to_transform is None:
            raise ValueError("lora.layers_pattern says where lora.layers_to_transform counts; give both or neither")
        return self


class Fields(_Section):
    """Which columns of a row hold what."""

    prompt: str = Field("prompt", min_length=1, description="the column with the question")
    completion: str = Field("completion", min_length=1, description="the column with the answer")
    messages: str = Field("messages", min_length=1, description="the column with the list of messages")


class Data(_Section):
    """What is trained on."""

    train: str = Field(min_length=1, description="the rows to train on, JSONL; relative to where halfbyte is run")
    eval: str | None = Field(None, min_length=1, description="held-out rows, for evaluation")
    format: Literal["auto", "messages", "prompt_completion"] = Field("auto", description="how a row is read")
    fields: Fields = Field(default_factory=Fields, description="which columns hold what")
    max_length: Int = Field(1024, ge=2, description="tokens of the longest row")
    mask: Literal["completion", "assistant", "all"] = Field(
        "completion", description="what is trained: the last assistant turn, every one, or all tokens"
    )
    overlong: Literal["error", "truncate", "skip"] = Field("error", description="what happens to a longer row")
    chat_template: str | None = Field(None, description="a Jinja template, or its file, instead of the model's own")


class Train(_Section):
    """The training, under the names of transformers.TrainingArguments."""

    per_device_train_batch_size: Int = _train("per_device_train_batch_size", ge=1)
    gradient_accumulation_steps: Int = _train("gradient_accumulation_steps", ge=1)
    per_device_eval_batch_size: Int = _train("per_device_eval_batch_size", ge=1)
    num_train_epochs: Float = _train("num_train_epochs", gt=0)
    max_steps: Int = _train("max_steps", ge=-1)
    learning_rate: Float = _train("learning_rate", gt=0)
    lr_scheduler_type: Annotated[str, _one_of(*SCHEDULES)] = _train("lr_scheduler_type")
    lr_scheduler_kwargs: dict[str, Any] | None = _train("lr_scheduler_kwargs")
    warmup_steps: Float = _train("warmup_steps", ge=0)
    weight_decay: Float = _train("weight_decay", ge=0)
    max_grad_norm: Float = _train("max_grad_norm", ge=0)
    adam_beta1: Float = _train("adam_beta1", ge=0, lt=1)
    adam_beta2: Float = _train("adam_beta2", ge=0, lt=1)
    adam_epsilon: Float = _train("adam_epsilon", gt=0)
    optim: Annotated[str, BeforeValidator(_optimizer)] = _train("optim")
    optim_args: str | None = _train("optim_args")
    label_smoothing_factor: Float = _train("label_smoothing_factor", ge=0, lt=1)
    neftune_noise_alpha: Annotated[Float, Field(gt=0)] | None = _train("neftune_noise_alpha")
    seed: Int = _train("seed", ge=0)
    data_seed: Annotated[Int, Field(ge=0)] | None = _train("data_seed")
    logging_steps: Int = _train("logging_steps", ge=1)
    report_to: NamesOrText = _train("report_to")
    run_name: str | None = _train("run_name")
    eval_strategy: Annotated[Literal["auto", "no", "steps", "epoch"], BeforeValidator(_off_is_no)] = _train(
        "eval_strategy"
    )
    eval_steps: Annotated[Float, Field(gt=0)] | None = _train("eval_steps")
    eval_on_start: bool = _train("eval_on_start")
    save_strategy: Annotated[Literal["no", "steps", "epoch"], BeforeValidator(_off_is_no)] = _train("save_strategy")
    save_steps: Float = _train("save_steps", gt=0)
    save_total_limit: Annotated[Int, Field(ge=1)] | None = _train("save_total_limit")
    load_best_model_at_end: bool = _train("load_best_model_at_end")
    metric_for_best_model: Annotated[str, _one_of("loss", "eval_loss", "perplexity", "eval_perplexity")] = _train(
        "metric_for_best_model"
    )
    bf16: bool | None = _train("bf16")
    fp16: bool | None = _train("fp16")
    gradient_checkpointing: Annotated[bool | str, BeforeValidator(_auto_or_bool)] = _train("gradient_checkpointing")
    loraplus_lr_ratio: Annotated[Float, Field(gt=0)] | None = _train("loraplus_lr_ratio")
    save_minutes: Annotated[Float, Field(gt=0)] | None = _train("save_minutes")
    max_tokens_per_pass: Annotated[int | str, BeforeValidator(_auto_or_count)] = _train("max_tokens_per_pass")

    @model_validator(mode="after")
    def _together(self) -> Train:
        if self.bf16 and self.fp16:
            raise ValueError("train.bf16 and train.fp16 cannot both be true; better give neither")
        if self.max_steps == 0:
            raise ValueError("train.max_steps must be -1 (by epochs) or >= 1, got 0")
        return self


class Recipe(_Section):
    """Everything a run depends on."""

    model: str = Field(min_length=1, description="hub id[@revision], local folder, .gguf file, or a packaged name")
    revision: str | None = Field(None, description="branch, tag or commit of a hub id; the same as model: id@revision")
    quant: Quant = Field(default_factory=Quant, description="how the frozen base lies in memory")
    lora: Lora = Field(default_factory=Lora, description="the adapters, as peft.LoraConfig names them")
    data: Data = Field(description="what is trained on")
    train: Train = Field(default_factory=Train, description="the training, as transformers.TrainingArguments names it")
    output: str = Field("runs/run", min_length=1, description="the run folder; never overwritten")
    allow_pickle: bool = Field(False, description="read a .bin checkpoint (with weights_only)")
    trust_remote_code: bool = Field(False, description="run Python code that the checkpoint brings")

    @model_validator(mode="after")
    def _together(self) -> Recipe:
        problems = []
        if self.data.eval is None and (self.train.eval_strategy in ("steps", "epoch") or self.train.eval_on_start):
            problems.append("train.eval_strategy asks for evaluations, but data.eval names no held-out rows")
        if self.train.eval_strategy in ("no", "epoch") and self.train.eval_steps is not None:
            chosen = self.train.eval_strategy
            problems.append(f"train.eval_steps is not read with train.eval_strategy {chosen}; say steps")
        if problems:
            raise ValueError("\n".join(problems))
        return self


class Loaded(NamedTuple):
    """A recipe with the origin of every leaf value (by dotted path), and what is allowed but unusual."""

    recipe: Recipe
    origins: dict[str, Origin]
    warnings: tuple[str, ...]
    path: Path | None


SECTIONS: dict[str, type[_Section]] = {
    "": Recipe, "quant": Quant, "lora": Lora, "data": Data, "data.fields": Fields, "train": Train,
}  # fmt: skip


def rows(loaded: Loaded) -> list[tuple[str, Any, Origin]]:
    """Every leaf as (dotted field, value, origin), in the recipe's order."""
    return [(field, value, loaded.origins[field]) for field, value in leaves(loaded.recipe)]


def leaves(section: BaseModel, prefix: str = "") -> list[tuple[str, Any]]:
    """Every leaf value with its dotted path; a mapping such as rank_pattern is one leaf."""
    found: list[tuple[str, Any]] = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            found += leaves(value, f"{prefix}{name}.")
        else:
            found.append((prefix + name, value))
    return found


def unusual(recipe: Recipe) -> tuple[str, ...]:
    """Values outside the ranges that usually serve. They are used all the same."""
    lora, said = recipe.lora, []
    if not 8 <= lora.r <= 64:
        said.append(f"lora.r {lora.r} is outside the usual 8 to 64")
    if lora.lora_alpha != 2 * lora.r:
        said.append(f"lora.lora_alpha {lora.lora_alpha:g} is not the usual 2 x r = {2 * lora.r}")
    if not 0.05 <= lora.lora_dropout <= 0.1:
        said.append(f"lora.lora_dropout {lora.lora_dropout:g} is outside the usual 0.05 to 0.1")
    return tuple(said)
