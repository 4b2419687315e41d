"""Every field of a recipe does something: changed alone, it changes what a run does, writes or refuses.

A field that is accepted and never read is the worst kind of bug, so the table below has to hold a case for each.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.modules.module import register_module_forward_hook

from halfbyte import finetune
from halfbyte.cli import progress, show
from halfbyte.errors import HalfbyteError
from halfbyte.inference import load as opened_run
from halfbyte.layers.kernels.cpu.integer import products as integer
from halfbyte.models.sources import lookup
from halfbyte.recipe.file import load_recipe
from halfbyte.recipe.schema import SECTIONS, Recipe, leaves
from halfbyte.training import comparison, run
from tests import letters, pairs, scored, tiny_run

Change = dict[str, Any]


@dataclass
class Ran:
    """What one run left behind."""

    folder: Path
    lines: list[str]
    forwards: Counter[str]
    args: Any = None
    board: list[tuple[str, int]] = field(default_factory=list)

    @property
    def adapter(self) -> dict[str, torch.Tensor]:
        return load_file(self.folder / "adapter" / "adapter_model.safetensors")

    @property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "metrics.jsonl").read_text().splitlines()]


See = Callable[[Ran], Any]


def weights(ran: Ran) -> Any:
    return {name: tensor.float().sum().item() for name, tensor in ran.adapter.items()}


def shapes(ran: Ran) -> Any:
    return {name: tuple(tensor.shape) for name, tensor in ran.adapter.items()}


def dtypes(ran: Ran) -> Any:
    return {str(tensor.dtype) for tensor in ran.adapter.values()}


def file(name: str, key: str) -> See:
    return lambda ran: json.loads((ran.folder / name).read_text())[key]


def config(key: str) -> See:
    def see(ran: Ran) -> Any:
        value = file("adapter/adapter_config.json", key)(ran)
        return sorted(value) if isinstance(value, list) else value

    return see


def column(name: str) -> See:
    return lambda ran: [round(row[name], 9) for row in ran.metrics if "loss" in row]


def first_loss(ran: Ran) -> Any:
    return column("loss")(ran)[0]


def steps(ran: Ran) -> Any:
    return len(column("loss")(ran))


def evals(ran: Ran) -> Any:
    return [row["step"] for row in ran.metrics if "eval_loss" in row]


def checkpoints(ran: Ran) -> Any:
    return sorted(int(path.name[5:]) for path in (ran.folder / "checkpoints").glob("step-*"))


def forwards(name: str) -> See:
    return lambda ran: ran.forwards[name]


def line(start: str) -> See:
    return lambda ran: [text for text in ran.lines if text.startswith(start)]


def printed_steps(ran: Ran) -> Any:
    return [text[:8] for text in line("step ")(ran)]


def computing(ran: Ran) -> Any:
    (text,) = (text for text in line("base ")(ran) if "computing in" in text)
    return text.partition("computing in ")[2]


def argument(name: str) -> See:
    return lambda ran: getattr(ran.args, name)


def best_is_saved(ran: Ran) -> Any:
    best = load_file(ran.folder / "checkpoints" / "best" / "adapter_model.safetensors")
    return all(torch.equal(tensor, best[name]) for name, tensor in ran.adapter.items())


def names_with(part: str) -> See:
    """How many tensors of the adapter have `part` in their names and are not what the base holds there."""

    def see(ran: Ran) -> Any:
        base = load_file(ran.folder.parent / "base.safetensors")
        found = [n for n in ran.adapter if part in n]
        kept = [n for n in found if (o := base.get(_in_base(n))) is not None and torch.equal(o, ran.adapter[n])]
        return len(found) - len(kept)

    return see


def _in_base(name: str) -> str:
    return name.removeprefix("base_model.model.").replace(".base_layer", "")


@dataclass(frozen=True)
class Case:
    """`change` on top of `given` must change what `see` sees; to `want`, if that is given, or into `refused`.

    `alone`: the change cannot be taken back without an error, so there is nothing to compare with.
    """

    change: Change
    see: See = weights
    given: Change = field(default_factory=dict)
    want: Any = ...
    refused: str = ""
    model: str = "llama"
    alone: bool = False


EVAL: Change = {"data__eval": "EVAL"}
SGD: Change = {"train__optim": "sgd"}
SAVE: Change = {"train__save_strategy": "steps", "train__save_steps": 1, "train__save_total_limit": 9}
EACH: Change = {**EVAL, "train__eval_strategy": "steps", "train__eval_steps": 1}
WORSE: Change = {**EACH, "train__early_stopping_threshold": 9}
BOARD: Change = {"train__report_to": ["tensorboard"], "train__logging_steps": 3}
PAIRS: Change = {"data__train": "BOTH", "data__format": "prompt_completion"}
VECTORS: Change = {"task": "embed", "data__train": "BOTH"}
LABELS: Change = {"task": "classify", "data__train": "BOTH"}
TAGS: Change = {"task": "tag", "data__train": "BOTH"}
SHARED: Change = {"data__train": "BOTH", "data__format": "sharegpt"}
NUMBERS: Change = {"data__eval": "FORMS", "eval__metrics": ["number"]}
AUTO: Change = {"quant__compute_dtype": "auto"}
FORMS: Change = {"data__eval": "FORMS"}
BETTER: Change = {"data__train": "PREFERENCES", "train__method": "dpo"}
RANKED: Change = {"data__train": "RANKED", "train__method": "dpo"}
VERDICTS: Change = {"data__train": "VERDICTS", "train__method": "kto"}
GRPO: Change = {"train__method": "grpo", "train__rewards": f"{letters.__file__}:score", "train__num_generations": 2,
                "train__max_completion_length": 4, "train__mask_truncated_completions": False}  # fmt: skip


def scored_names(ran: Ran) -> Any:
    return {name for row in ran.metrics if "eval_loss" in row for name in row if name.endswith("_match")}


def written(ran: Ran) -> Any:
    return [len(text) for text in scored.texts(scored.evaluated(ran.folder))]


def interval(ran: Ran) -> Any:
    score = scored.evaluated(ran.folder, sure=True).scores[0]
    return score.adapter and score.adapter.interval


def board(ran: Ran) -> Any:
    return [step for name, step in ran.board if name == "train/loss"]


CASES: dict[str, tuple[Case, ...]] = {
    "lora.r": (Case({"lora__r": 8}, shapes), Case({"lora__r": 8}, config("r"), want=8)),
    "lora.lora_alpha": (Case({"lora__lora_alpha": 32}), Case({"lora__lora_alpha": 32}, config("lora_alpha"), want=32)),
    "lora.target_modules": (
        Case({"lora__target_modules": ["q_proj"]}, config("target_modules"), want=["q_proj"]),
        Case({"lora__target_modules": r".*\.1\.mlp\.up_proj"}, names_with("layers.1.mlp.up_proj"), want=2),
        Case({"lora__target_modules": "all-linear"}, names_with("lora_A"), want=14),
    ),
    "lora.target_parameters": (
        Case({"lora__target_parameters": ["down_proj"]}, refused="no parameter of llama ends in 'down_proj'"),
        Case({"lora__target_parameters": ["down_proj"]}, names_with("experts.lora_A"), want=2, model="mixtral"),
    ),
    "lora.lora_dropout": (
        Case({"lora__lora_dropout": 0.5}),
        Case({"lora__lora_dropout": 0.5}, config("lora_dropout"), want=0.5),
    ),
    "lora.bias": (
        Case({"lora__bias": "lora_only"}, names_with("c_attn.base_layer.bias"), model="gpt2", want=2),
        Case({"lora__bias": "all"}, names_with("ln_1.bias"), model="gpt2", want=2),
        Case({"lora__bias": "all"}, refused="lora.bias all: there is no bias to train"),
        Case({"lora__bias": "lora_only"}, refused="lora.bias lora_only: there is no bias to train"),
        Case({"lora__bias": "all"}, names_with("q_proj.base_layer.bias"), model="opt", want=2),
    ),
    "lora.task_type": (Case({"lora__task_type": "SEQ_CLS"}, refused="lora.task_type must be CAUSAL_LM"),),
    "lora.use_rslora": (Case({"lora__use_rslora": True}),),
    "lora.use_dora": (Case({"lora__use_dora": True}, names_with("lora_magnitude_vector"), want=8),),
    "lora.lora_bias": (Case({"lora__lora_bias": True}, names_with("lora_B.bias"), want=8),),
    "lora.init_lora_weights": (
        Case({"lora__init_lora_weights": "gaussian"}),
        Case({"lora__init_lora_weights": False}, first_loss),
        Case({"lora__init_lora_weights": "orthogonal"}, given={"quant__type": "none"}),
        Case({"lora__init_lora_weights": "residual"}, first_loss),
        Case({"lora__init_lora_weights": "pissa_niter_4"}, refused="cannot be 'pissa_niter_4'"),
    ),
    "lora.rank_pattern": (
        Case({"lora__rank_pattern": {"q_proj": 2}}, shapes),
        Case({"lora__rank_pattern": {"q": 2}}, refused="lora.rank_pattern: 'q' is the key of no layer"),
    ),
    "lora.alpha_pattern": (
        Case({"lora__alpha_pattern": {"q_proj": 64}}),
        Case({"lora__alpha_pattern": {"lm_head": 2}}, refused="lora.alpha_pattern: 'lm_head' is the key of no layer"),
    ),
    "lora.layers_to_transform": (
        Case({"lora__layers_to_transform": [1]}, names_with("layers.0."), want=0),
        Case({"lora__layers_to_transform": 0}, names_with("layers.1."), want=0),
        Case({"lora__layers_to_transform": [0, 9]}, refused="the model has no layer 9"),
    ),
    "lora.layers_pattern": (
        Case({"lora__layers_pattern": "h"}, given={"lora__layers_to_transform": [0]}, refused="nothing is left"),
    ),
    "lora.exclude_modules": (
        Case({"lora__exclude_modules": ["o_proj"]}, names_with("o_proj"), want=0),
        Case({"lora__exclude_modules": r".*\.0\..*"}, names_with("layers.0."), want=0),
        Case({"lora__exclude_modules": ["out_proj"]}, refused="lora.exclude_modules: 'out_proj' matches no module"),
        Case({"lora__exclude_modules": ".*out_proj"}, refused="lora.exclude_modules: '.\\*out_proj' matches no module"),
    ),
    "lora.modules_to_save": (
        Case({"lora__modules_to_save": ["lm_head"]}, names_with("lm_head"), want=1),
        Case({"lora__modules_to_save": ["embed_tokens"]}, names_with("embed_tokens"), want=1),
        Case({"lora__modules_to_save": ["nothing"]}, refused="lora.modules_to_save names"),
    ),
    "lora.trainable_token_indices": (
        Case({"lora__trainable_token_indices": [3, 4]}, names_with("token_adapter.trainable_tokens_delta"), want=1),
        Case({"lora__trainable_token_indices": [3, 320]}, refused="320 is beyond the 320 rows of the embedding"),
    ),
    "lora.adapter": (Case({"lora__adapter": "nowhere"}, refused="nowhere is not an adapter"),),  # and test_adapter.py
    "lora.save_dtype": (Case({"lora__save_dtype": "bf16"}, dtypes, want={"torch.bfloat16"}),),
    "train.per_device_train_batch_size": (Case({"train__per_device_train_batch_size": 1}, column("tokens")),),
    "train.gradient_accumulation_steps": (Case({"train__gradient_accumulation_steps": 1}, column("tokens")),),
    "train.per_device_eval_batch_size": (Case({"train__per_device_eval_batch_size": 1}, forwards("LlamaModel"), EVAL),),
    "train.num_train_epochs": (
        Case({"train__num_train_epochs": 2}, steps, {"train__max_steps": -1, "train__num_train_epochs": 1}, want=8),
        Case({"train__num_train_epochs": 0.5}, steps, {"train__max_steps": -1, "train__num_train_epochs": 1}, want=2),
    ),
    "train.max_steps": (Case({"train__max_steps": 2}, steps, want=2),),
    "train.learning_rate": (
        Case({"train__learning_rate": 4e-3}, column("learning_rate"), want=[0.004, 0.003, 0.002, 0.001]),
        Case({"train__learning_rate": "auto"}, column("learning_rate"), want=[0.003, 0.00225, 0.0015, 0.00075]),
    ),
    "train.lr_scheduler_type": (
        Case({"train__lr_scheduler_type": "constant"}, column("learning_rate"), want=[0.01] * 4),
    ),
    "train.lr_scheduler_kwargs": (
        Case({"train__lr_scheduler_kwargs": {"power": 2.0, "lr_end": 0.0}}, column("learning_rate"),
             {"train__lr_scheduler_type": "polynomial"}, want=[0.01, 0.005625, 0.0025, 0.000625]),
    ),
    "train.warmup_steps": (
        Case({"train__warmup_steps": 1}, column("learning_rate"), {"train__lr_scheduler_type": "constant_with_warmup"},
             want=[0.0, 0.01, 0.01, 0.01]),
        Case({"train__warmup_steps": 0.5}, column("learning_rate"),
             {"train__lr_scheduler_type": "constant_with_warmup"}, want=[0.0, 0.005, 0.01, 0.01]),
    ),
    "train.weight_decay": (Case({"train__weight_decay": 0.5}),),
    "train.max_grad_norm": (
        Case({"train__max_grad_norm": 0.01}, given=SGD),
        Case({"train__max_grad_norm": 0}, given=SGD),
    ),
    "train.adam_beta1": (Case({"train__adam_beta1": 0.5}),),
    "train.adam_beta2": (Case({"train__adam_beta2": 0.5}),),
    "train.adam_epsilon": (Case({"train__adam_epsilon": 0.1}),),
    "train.optim": (
        *(Case({"train__optim": name}) for name in ("adafactor", "sgd", "adagrad", "rmsprop", "lion_8bit")),
        Case({"train__optim": "adamw_torch_fused"}, argument("optim"), given=SGD, want="adamw_torch_fused"),
    ),
    "train.optim_args": (
        Case({"train__optim_args": "momentum=0.9"}, given=SGD),
        Case({"train__optim_args": "momentum=0.9"}, refused="train.optim_args"),
    ),
    "train.label_smoothing_factor": (Case({"train__label_smoothing_factor": 0.5}, first_loss),),
    "train.seed": (Case({"train__seed": 7}), Case({"train__seed": 7}, column("tokens"))),
    "train.data_seed": (Case({"train__data_seed": 7}, column("tokens")),),
    "train.logging_steps": (
        Case({"train__logging_steps": 2}, printed_steps, want=["step 2/4", "step 4/4"]),
        Case({"train__logging_steps": 2}, board, BOARD),
    ),
    "train.logging_first_step": (Case({"train__logging_first_step": True}, board, BOARD),),
    "train.report_to": (Case({"train__report_to": ["tensorboard"]}, board),),
    "train.run_name": (Case({"train__run_name": "mine"}, argument("run_name"), BOARD, want="mine"),),
    "train.eval_strategy": (
        Case({"train__eval_strategy": "no"}, evals, EVAL, want=[]),
        Case({"train__eval_strategy": "steps"}, evals, EVAL, want=[1, 2, 3, 4]),
        Case({"train__eval_strategy": "epoch", "train__num_train_epochs": 2, "train__max_steps": -1}, evals, EVAL,
             want=[4, 8]),
        Case({"train__eval_strategy": "epoch"}, refused="data.eval"),
    ),
    "train.eval_steps": (
        Case({"train__eval_steps": 3}, evals, EVAL, want=[3, 4]),  # and at the end
        Case({"train__eval_steps": 0.5}, evals, EVAL, want=[2, 4]),
    ),
    "train.eval_on_start": (Case({"train__eval_on_start": True}, evals, EVAL, want=[0, 4]),),
    "train.save_strategy": (
        Case({"train__save_strategy": "epoch"}, checkpoints, {**SAVE, "train__per_device_train_batch_size": 1,
             "train__num_train_epochs": 2, "train__max_steps": -1}, want=[8, 16]),
        Case({"train__save_strategy": "no"}, checkpoints, SAVE, want=[]),
    ),
    "train.save_steps": (
        Case({"train__save_steps": 3}, checkpoints, SAVE, want=[3, 4]),
        Case({"train__save_steps": 0.5}, checkpoints, SAVE, want=[2, 4]),
    ),
    "train.save_total_limit": (Case({"train__save_total_limit": 2}, checkpoints, SAVE, want=[3, 4]),),
    "train.load_best_model_at_end": (
        Case({"train__load_best_model_at_end": False}, best_is_saved,
             {"data__train": "ONE WORD", "data__eval": "OTHER WORDS", "train__eval_steps": 1,
              "train__learning_rate": 0.05}, want=False),  # unlearns the other words: the first evaluation is the best
    ),
    "train.metric_for_best_model": (
        Case({"train__metric_for_best_model": "perplexity"}, file("checkpoints/best/best.json", "metric"), EVAL,
             want="eval_perplexity"),
    ),
    "train.rewards": (
        Case({"train__rewards": "length"}, column("reward"), GRPO),
        Case({"train__rewards": "length:-1"}, given=GRPO, refused="must name exact_match, .*, or a function"),
    ),
    "train.num_generations": (Case({"train__num_generations": 4}, column("written_tokens"), GRPO),),
    "train.max_completion_length": (Case({"train__max_completion_length": 2}, column("answer_tokens"), GRPO),),
    "train.temperature": (Case({"train__temperature": 0.2}, column("entropy"), GRPO),),
    "train.epsilon": (Case({"train__epsilon": 1.5}, given=GRPO, refused="train.epsilon must be < 1"),),  # test_grpo.py
    "train.epsilon_high": (Case({"train__epsilon_high": 0}, given=GRPO, refused="train.epsilon_high must be > 0"),),
    "train.scale_rewards": (Case({"train__scale_rewards": "none"}, column("grad_norm"), GRPO),),
    "train.mask_truncated_completions": (
        Case({"train__mask_truncated_completions": True}, column("labelled_tokens"), GRPO),
    ),
    "train.reward_seconds": (Case({"train__reward_seconds": 0}, given=GRPO, refused="reward_seconds must be > 0"),),
    "train.max_forgetting": (
        Case({"train__max_forgetting": 9.0}, lambda ran: ["eval_base_text_loss" in row for row in ran.metrics][-1],
             EVAL, want=True),
    ),
    "train.max_source_rise": (Case({"train__max_source_rise": 0.1}, given=EVAL, refused="is about sources"),),
    "train.greater_is_better": (
        Case({"train__greater_is_better": True}, refused="loss .* is better when smaller"),
        Case({"train__greater_is_better": False, "train__metric_for_best_model": "exact_match"},
             given={"eval__metrics": ["exact_match"]}, refused="exact_match .* is better when greater"),
    ),
    "train.early_stopping_patience": (
        Case({"train__early_stopping_patience": 1}, evals, WORSE, want=[1, 2]),
        Case({"train__early_stopping_patience": 2}, evals, WORSE, want=[1, 2, 3]),
        Case({"train__early_stopping_patience": 1, "data__eval": "none"}, refused="data.eval is none"),
        Case({"train__early_stopping_patience": 1, "train__eval_strategy": "no"}, refused="train.eval_strategy is no"),
    ),
    "train.early_stopping_threshold": (
        Case({"train__early_stopping_threshold": 9}, evals, {**EACH, "train__early_stopping_patience": 1}, want=[1, 2]),
    ),
    "train.bf16": (Case({"train__bf16": True}, computing, AUTO),),
    "train.fp16": (Case({"train__fp16": True}, computing, AUTO),),
    "train.gradient_checkpointing": (Case({"train__gradient_checkpointing": True}, forwards("LlamaAttention")),),
    "train.loraplus_lr_ratio": (Case({"train__loraplus_lr_ratio": 16}),),
    "train.save_minutes": (
        Case({"train__save_minutes": 1e-9}, checkpoints, {"train__save_total_limit": 9}, want=[1, 2, 3]),
    ),
    "train.within": (Case({"train__within": "1h"}, lambda ran: (ran.folder / "schedule.jsonl").is_file(), want=True),),
    "train.method": (Case({"train__method": "orpo"}, first_loss, BETTER),),
    "train.beta": (Case({"train__beta": 0.5}, given=BETTER),),
    "train.loss_type": (
        Case({"train__loss_type": "hinge"}, first_loss, BETTER),
        Case({"train__loss_type": "apo_zero_unpaired"}, given=VERDICTS),
    ),
    "train.label_smoothing": (Case({"train__label_smoothing": 0.2}, given=BETTER),),
    "train.ld_alpha": (Case({"train__ld_alpha": 0.1}, given=BETTER),),
    "train.rpo_alpha": (Case({"train__rpo_alpha": 1.0}, first_loss, BETTER),),
    "train.discopop_tau": (Case({"train__discopop_tau": 1.0}, given={**BETTER, "train__loss_type": "discopop"}),),
    "train.desirable_weight": (Case({"train__desirable_weight": 2.0}, first_loss, VERDICTS),),
    "train.undesirable_weight": (Case({"train__undesirable_weight": 2.0}, first_loss, VERDICTS),),
    "train.cpo_alpha": (Case({"train__cpo_alpha": 0.0}, first_loss, {**BETTER, "train__method": "cpo"}),),
    "train.simpo_gamma": (Case({"train__simpo_gamma": 0.0}, first_loss, {**BETTER, "train__method": "simpo"}),),
    "train.max_tokens_per_micro_batch": (Case({"train__max_tokens_per_micro_batch": 50}, column("micro_batches")),),
    "quant.type": (
        Case({"quant__type": "fp4"}, first_loss),
        Case({"quant__type": "int8"}, first_loss),
        Case({"quant__type": "none"}, first_loss),
    ),
    "quant.llm_int8_threshold": (
        Case({"quant__llm_int8_threshold": 1.0}, first_loss, {"quant__type": "int8"}),
        Case({"quant__llm_int8_threshold": 6.0}, refused="quant.llm_int8_threshold is not read with quant.type nf4"),
    ),
    "quant.double_quant": (Case({"quant__double_quant": False}, first_loss),),
    "quant.compute_dtype": (
        Case({"quant__compute_dtype": "bf16"}, first_loss),
        Case({"quant__compute_dtype": "bf16"}, computing),
    ),
    "quant.compute": (
        Case({"quant__compute": "int8"}, refused="quant.compute int8 is not possible")
        if integer.why_not()
        else Case({"quant__compute": "int8"}, first_loss),
    ),
    "quant.block_size": (Case({"quant__block_size": 128}, refused="quant.block_size must be 64"),),
    "quant.placement": (
        Case({"quant__placement": "streamed"}, line("placement"), {"quant__type": "none"}),
        Case({"quant__placement": "streamed"}, line("placement")),
    ),
    "quant.skip_modules": (Case({"quant__skip_modules": ["q_proj"]}, first_loss),),
    "quant.fp32_modules": (
        Case({"quant__fp32_modules": ["model.norm", "lm_head"]}, first_loss, {"quant__compute_dtype": "bf16"}),
    ),
    "data.train": (Case({"data__train": "EVAL"}, column("tokens")),),
    "data.eval": (Case(EVAL, evals, want=[4]),),
    "data.format": (Case({"data__format": "prompt_completion"}, column("tokens"), {"data__train": "BOTH"}),),
    "data.fields.prompt": (Case({"data__fields__prompt": "other"}, column("tokens"), PAIRS),),
    "data.fields.completion": (Case({"data__fields__completion": "other"}, column("tokens"), PAIRS),),
    "data.fields.messages": (
        Case({"data__fields__messages": "other_messages"}, column("tokens"),
             {"data__train": "BOTH", "data__format": "messages"}),
    ),
    "data.fields.role": (
        Case({"data__fields__role": "who"}, given=SHARED, refused=r"conversations\[0\]\.who: missing"),
    ),
    "data.fields.content": (
        Case({"data__fields__content": "said"}, given=SHARED, refused="'value' is not supported"),
    ),
    **{
        f"data.fields.{name}": (Case({f"data__fields__{name}": other}, column("tokens"), given),)
        for name, other, given in (
            ("conversations", "other_shared", SHARED),
            ("instruction", "other", {"data__train": "BOTH", "data__format": "alpaca"}),
            ("input", "other", {"data__train": "BOTH", "data__format": "alpaca"}),
            ("output", "other", {"data__train": "BOTH", "data__format": "alpaca"}),
            ("system", "other", {"data__train": "BOTH", "data__format": "alpaca"}),
            ("tools", "other_tools", {"data__train": "BOTH", "data__format": "messages",
                                      "data__chat_template": "{{ tools }}" + tiny_run.CHATML}),
            ("text", "other", {"data__train": "BOTH", "data__format": "text"}),
            ("chosen", "other", BETTER),
            ("rejected", "other", BETTER),
            ("answers", "others", RANKED),
        )
    },
    "data.fields.scores": (Case({"data__fields__scores": "other"}, first_loss, {**RANKED, "train__rpo_alpha": 1.0}),),
    "data.fields.label": (
        Case({"data__fields__label": "other"}, column("loss"), VERDICTS),
        Case({"data__fields__label": "other_label"}, shapes, LABELS),
    ),
    "data.max_length": (Case({"data__max_length": 19}, column("tokens"), {"data__overlong": "skip"}),),
    "data.mask": (Case({"data__mask": "all"}, column("labelled_tokens")),),
    "data.overlong": (
        Case({"data__overlong": "truncate"}, column("tokens"), {"data__max_length": 19, "data__overlong": "skip"}),
        Case({"data__overlong": "error", "data__max_length": 19}, refused="longer than data.max_length 19"),
    ),
    "data.packing": (
        Case({"data__packing": "stream"}, column("tokens"), {"data__train": "BOTH", "data__format": "text"}),
        Case({"data__packing": "stream"}, refused="data.packing stream is for plain text"),
    ),
    "data.weights": (Case({"data__weights": {"red": 0}}, column("labelled_tokens")),),
    "data.streaming": (
        Case({"data__streaming": True, "data__overlong": "skip"}, lambda ran: (ran.folder / "stream.json").exists()),
    ),
    "data.share_prefixes": (Case({"data__share_prefixes": "off"}, line("shared")),),
    "data.order": (
        Case({"data__order": "families"}, first_loss),
        Case({"data__order": "families", "data__packing": "stream"}, refused="data.order families puts rows"),
    ),
    "data.chat_template": (
        Case({"data__chat_template": tiny_run.CHATML.replace("role'] + '\n'", "role'] + '\n\n'")}, column("tokens")),
    ),
    "data.template_args": (
        Case({"data__template_args": {"tone": "hm"}}, column("tokens"),
             {"data__chat_template": "{{ tone }}" + tiny_run.CHATML}),
        Case({"data__template_args": {"tone": "hm"}}, refused="the chat template does not read it"),
    ),
    "data.thoughts": (Case({"data__thoughts": "strip"}, column("tokens"), {"data__train": "THOUGHTS"}),),
    "eval.metrics": (
        Case({"eval__metrics": ["exact_match"]}, scored_names, EVAL, want={"eval_exact_match"}),
        Case({"eval__metrics": ["exact_match"], "train__metric_for_best_model": "exact_match"},
             file("checkpoints/best/best.json", "metric"), EVAL, want="eval_exact_match"),
        Case({"train__metric_for_best_model": "exact_match"}, refused="is not among eval.metrics"),
    ),
    "eval.mark": (Case({"eval__mark": "=>"}, given=NUMBERS, refused="has a number after"),),
    "eval.pattern": (
        Case({"eval__pattern": "zzz"}, given={**FORMS, "eval__metrics": ["regex"]}, refused="'zzz' matches not one"),
    ),
    "eval.json_fields": (
        Case({"eval__json_fields": ["b"]}, given={**FORMS, "eval__metrics": ["json_fields"]}, refused="the field 'b'"),
    ),
    "eval.choices": (
        Case({"eval__choices": ["x", "y"]}, given={**FORMS, "eval__metrics": ["choice"]}, refused="not among eval"),
    ),
    "eval.rows": (  # the first has no number
        Case({"eval__rows": 1}, given=NUMBERS, refused="not one of the 1 expected"),
    ),
    "eval.max_new_tokens": (Case({"eval__max_new_tokens": 1}, written, EVAL),),
    "eval.resamples": (Case({"eval__resamples": 100}, interval, EVAL),),
    "eval.seed": (Case({"eval__seed": 1}, interval, EVAL),),
    "task": (
        Case({"task": "classify"}, config("task_type"), {"data__train": "BOTH"}, want="SEQ_CLS"),
        Case({"task": "tag"}, config("task_type"), {"data__train": "BOTH"}, want="TOKEN_CLS"),
    ),
    "labels": (Case({"labels": ["a", "b", "c"]}, shapes, LABELS),),
    "class_weight": (
        Case({"class_weight": {"a": 3.0}}, first_loss, {**LABELS, "train__per_device_train_batch_size": 8}),
    ),
    "data.fields.tokens": (Case({"data__fields__tokens": "other_tokens"}, column("tokens"), TAGS),),
    "data.fields.tags": (Case({"data__fields__tags": "other_tags"}, shapes, TAGS),),
    "data.fields.spans": (
        Case({"data__fields__spans": "other_spans"}, shapes, {**TAGS, "data__fields__tokens": "absent"}),
    ),
    "data.fields.text_pair": (Case({"data__fields__text_pair": "output"}, column("tokens"), LABELS),),
    "vectors.loss": (Case({"vectors__loss": "CoSENTLoss"}, first_loss, VECTORS),),
    "vectors.scale": (Case({"vectors__scale": 5.0}, first_loss, VECTORS),),
    "vectors.margin": (Case({"vectors__margin": 9.0}, first_loss, {**VECTORS, "vectors__loss": "TripletLoss"}),),
    "vectors.pooling": (Case({"vectors__pooling": "mean"}, first_loss, VECTORS),),
    "vectors.matryoshka_dims": (Case({"vectors__matryoshka_dims": [64, 8]}, first_loss, VECTORS),),
    "vectors.matryoshka_weights": (
        Case({"vectors__matryoshka_weights": [1.0, 0.2]}, first_loss, {**VECTORS, "vectors__matryoshka_dims": [64, 8]}),
    ),
    "data.query_prompt": (Case({"data__query_prompt": "ask "}, column("tokens"), VECTORS),),
    "data.passage_prompt": (Case({"data__passage_prompt": "say "}, column("tokens"), VECTORS),),
    **{
        f"data.fields.{name}": (Case({f"data__fields__{name}": "other"}, column("tokens"), VECTORS),)
        for name in ("query", "passage", "negative")
    },
    "data.fields.score": (
        Case({"data__fields__score": "other"}, given={**VECTORS, "vectors__loss": "CoSENTLoss"}, refused="a number is"),
    ),
    "model": (Case({"model": "OTHER"}, first_loss),),
    "revision": (Case({"revision": "v1"}, refused="revision"),),
    "output": (Case({"output": "ELSEWHERE"}, lambda ran: ran.folder.name, want="elsewhere"),),
    "allow_pickle": (
        Case({"model": "PICKLE"}, refused="pickle"),
        Case({"allow_pickle": True, "model": "PICKLE"}, steps, {"train__max_steps": 2}, want=2, alone=True),
    ),
    "trust_remote_code": (
        Case({"model": "CODE"}, refused="trust_remote_code"),
        Case({"trust_remote_code": True, "model": "CODE"}, forwards("TheirLM"), alone=True),
    ),
}  # fmt: skip

THEIR_CODE = """
from transformers import LlamaConfig, LlamaForCausalLM

class TheirConfig(LlamaConfig):
    model_type = "theirs"

class TheirLM(LlamaForCausalLM):
    config_class = TheirConfig
"""
SUMMARY_WRITER = """
points = []

class SummaryWriter:
    def __init__(self, log_dir=None): points.clear()
    def add_text(self, *args): pass
    def add_scalar(self, name, value, step): points.append((name, step))
    def flush(self): pass
    def close(self): pass
"""


class Lab:
    """Checkpoints and rows that every run shares, and the runs that several cases compare with."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.known: dict[str, Ran] = {}
        self.count = 0
        self.at = {
            "EVAL": tiny_run.rows(folder / "eval.jsonl", 6, seed=5),
            "BOTH": folder / "both.jsonl",
            "FORMS": folder / "forms.jsonl",
            "ONE WORD": self._pairs(folder / "one.jsonl", "cup", 16),
            "OTHER WORDS": self._pairs(folder / "words.jsonl", "tree road box green blue round small large old", 3),
            "THOUGHTS": self._pairs(folder / "thoughts.jsonl", "<think>old</think>cup", 16),
            "OTHER": tiny_run.checkpoint(folder / "other", seed=1),
            "PICKLE": self._pickle(tiny_run.checkpoint(folder / "pickle")),
            "CODE": self._code(tiny_run.checkpoint(folder / "code")),
            "ELSEWHERE": folder / "llama" / "elsewhere",
        }
        self.at["BOTH"].write_text("".join(json.dumps(self._row(i)) + "\n" for i in range(16)))

        for name, verdicts in (("PREFERENCES", False), ("VERDICTS", True)):
            self.at[name] = pairs.rows(folder / f"{name}.jsonl", verdicts=verdicts, other=True)
        answers = {"answers": ["red", "blue cup"], "scores": [1, 2], "other": [2, 1], "others": ["a longer one", "b"]}
        self.at["RANKED"] = folder / "ranked.jsonl"
        self.at["RANKED"].write_text((json.dumps({"prompt": "a cup", **answers}) + "\n") * 8)

        forms = [{"a": 1}, {"a": 2, "n": "#### 2"}, {"a": 3, "n": "#### 3"}]
        rows = [{"prompt": "red", "completion": json.dumps(form)} for form in forms]
        self.at["FORMS"].write_text("".join(json.dumps(row) + "\n" for row in rows))

    @staticmethod
    def _row(i: int) -> dict[str, Any]:
        def said(text: str) -> list[dict[str, str]]:
            return [{"role": "user", "content": text}, {"role": "assistant", "content": text * 2}]

        row = {"prompt": "red " * (1 + i % 3), "completion": "cup", "other": "a longer text in its place"}
        row |= {"instruction": "red", "input": "cup", "output": "box", "text": "tree"}
        shared = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
        row |= {
            "tokens": ["a", "cup"],
            "other_tokens": ["a long", "cup"],
            "tags": ["O", "X"],
            "other_tags": ["O", "B-x"],
        }
        row |= {name: [{"start": 0, "end": 2, "label": f"x{i % n}"}] for n, name in ((1, "spans"), (2, "other_spans"))}
        row |= {"label": "ab"[i % 2], "other_label": "abc"[i % 3], "query": "red", "passage": f"cup {i}"}
        row |= {"negative": "box", "score": i}
        row |= {"conversations": shared, "other_shared": shared * 3, "tools": [{"a": 1}], "other_tools": [{"bb": 22}]}
        return {**row, "messages": said("tree road"), "other_messages": said("small box of cups")}

    @staticmethod
    def _pairs(path: Path, completion: str, n: int) -> Path:
        path.write_text((json.dumps({"prompt": "red", "completion": completion}) + "\n") * n)
        return path

    @staticmethod
    def _pickle(folder: Path) -> Path:
        torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
        return folder

    @staticmethod
    def _code(folder: Path) -> Path:
        config = json.loads((folder / "config.json").read_text())
        there = {"AutoConfig": "theirs.TheirConfig", "AutoModelForCausalLM": "theirs.TheirLM"}
        changed = {**config, "model_type": "theirs", "architectures": ["TheirLM"], "auto_map": there}
        (folder / "config.json").write_text(json.dumps(changed))
        (folder / "theirs.py").write_text(THEIR_CODE)
        return folder

    def ran(self, changes: Mapping[str, Any], model: str) -> Ran:
        """Train with these changes; once for each set of them."""
        key = json.dumps([changes, model], sort_keys=True)
        if key not in self.known:
            self.known[key] = self._train(changes, model)
        return self.known[key]

    def _train(self, changes: Mapping[str, Any], model: str) -> Ran:
        folder = self.folder / model
        if not (folder / "model").exists():
            tiny_run.checkpoint(folder / "model", model)
            shutil.copy(folder / "model" / "model.safetensors", folder / "base.safetensors")
        self.count += 1
        values = {"output": folder / f"run{self.count}", **changes}
        values = {k: self.at[v] if isinstance(v, str) and v in self.at else v for k, v in values.items()}
        ran = Ran(Path(values["output"]), [], Counter())
        loaded = tiny_run.recipe(folder, **values)
        make = run.training_arguments

        def spied(*args: Any, **kwargs: Any) -> Any:
            ran.args = make(*args, **kwargs)
            return ran.args

        def count(module: Any, inputs: Any, output: Any) -> None:
            ran.forwards[type(module).__name__] += 1

        hook = register_module_forward_hook(count)
        try:
            with pytest.MonkeyPatch.context() as patch, show.out.capture() as captured:
                patch.setattr(run, "training_arguments", spied)
                if "train__max_forgetting" not in changes:
                    patch.setattr(comparison, "text_rows", lambda *_: "no field asks for it")
                finetune.train(loaded, listener=progress.PlainListener(quiet=False), proofs="remembered")
        finally:
            hook.remove()
        ran.lines = captured.get().splitlines()
        if loaded.recipe.train.report_to != "none":
            import tensorboardX  # type: ignore[import-not-found]  # the one written below

            ran.board = list(tensorboardX.points)
        return ran


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """What all cases share. TensorBoard's writer is one that keeps what it is given."""
    folder = tmp_path_factory.mktemp("fields")
    (folder / "tensorboardX.py").write_text(SUMMARY_WRITER)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        patch.setenv("HF_MODULES_CACHE", str(folder / "modules"))
        yield Lab(folder)


def test_every_field_has_a_case() -> None:
    recipe = Recipe.model_validate({"model": "m", "data": {"train": "t"}})
    assert sorted(CASES) == sorted(name for name, _ in leaves(recipe))
    assert sum(len(section.model_fields) for section in SECTIONS.values()) == len(CASES) + len(SECTIONS) - 1


@pytest.mark.parametrize(
    ("name", "case"), [pytest.param(n, c, id=f"{n}-{i}") for n, cases in CASES.items() for i, c in enumerate(cases)]
)
def test_a_field_changes_what_a_run_does(name: str, case: Case, lab: Lab) -> None:
    if case.refused:
        with pytest.raises(HalfbyteError, match=case.refused):
            lab.ran({**case.given, **case.change}, case.model)
        return
    after = case.see(lab.ran({**case.given, **case.change}, case.model))
    if not case.alone:
        before = case.see(lab.ran(case.given, case.model))
        assert after != before, f"{case.change} changes nothing: {before}"
    assert case.want is ... or after == case.want


KEPT: dict[str, tuple[str, Change]] = {
    "plain": ("llama", {}),
    "rslora and patterns": (
        "llama",
        {
            "lora__use_rslora": True,
            "lora__rank_pattern": {"q_proj": 2},
            "lora__alpha_pattern": {r"layers\.1\.self_attn\.v_proj": 4},
        },
    ),
    "dora": ("llama", {"lora__use_dora": True}),
    "lora_bias": ("llama", {"lora__lora_bias": True}),
    "head": ("llama", {"lora__modules_to_save": ["lm_head"]}),
    "tied head": ("gemma3", {"lora__modules_to_save": ["lm_head"]}),
    "tied embedding": ("gemma3", {"lora__modules_to_save": ["embed_tokens"]}),
    "tied tokens": ("gemma3", {"lora__trainable_token_indices": [3, 4]}),
    "tokens": ("llama", {"lora__trainable_token_indices": [3, 4]}),
    "all biases": ("gpt2", {"lora__bias": "all"}),
    "biases of LoRA's layers": ("opt", {"lora__bias": "lora_only"}),
    "all linears": ("bloom", {"lora__target_modules": "all-linear"}),
}


@pytest.mark.parametrize("kind", KEPT)
def test_what_was_trained_comes_back(kind: str, lab: Lab) -> None:
    """The losses before the first and after the last step are those of the base alone, and of it with the adapter."""
    model, changes = KEPT[kind]
    ran = lab.ran({**EVAL, "train__eval_on_start": True, "train__load_best_model_at_end": False, **changes}, model)
    untrained, trained = (row["eval_loss"] for row in ran.metrics if "eval_loss" in row)
    opened = opened_run.open_run(ran.folder)
    sheet = scored.scored(opened, with_base=True)
    assert untrained != pytest.approx(trained, rel=1e-3)
    assert scored.loss(sheet) == pytest.approx(trained, rel=1e-6)
    assert scored.loss(sheet, "base") == pytest.approx(untrained, rel=1e-6)


def test_a_trained_run_answers_under_the_template_it_was_trained_with(lab: Lab) -> None:
    own = tiny_run.CHATML.replace("assistant", "helper")
    ran = lab.ran({"data__chat_template": own}, "llama")
    assert opened_run.open_run(ran.folder).tokenizer.chat_template == own
    assert opened_run.open_run(lab.ran({}, "llama").folder).tokenizer.chat_template == tiny_run.CHATML


def test_a_run_opens_where_the_integration_it_reported_to_is_not_installed(
    lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = lab.ran(BOARD, "llama")
    monkeypatch.delitem(sys.modules, "tensorboardX")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry != str(lab.folder)])
    with pytest.raises(HalfbyteError, match="tensorboard, which is not installed"):
        load_recipe(ran.folder / "recipe.yaml")
    assert opened_run.open_run(ran.folder).recipe.train.report_to == "none"


def test_a_revision_is_part_of_what_is_looked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(lookup, "resolve", lambda model, **_: asked.append(model))
    recipe = Recipe.model_validate({"model": "org/name", "revision": "v1", "data": {"train": "t"}})
    lookup.find_model(recipe)
    assert asked == ["org/name@v1"]
