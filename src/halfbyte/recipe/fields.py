"""The named tables: which fields of LoraConfig and TrainingArguments a recipe takes, and why each other is refused.

Why: a flag that is accepted and never read is the worst kind of bug; one that is silently dropped is the second worst.
A test compares these tables with the installed peft and transformers, both ways; `docs/` is generated from them.
Source: `peft/tuners/lora/config.py`, `transformers/training_args.py`.
Cost: none; nothing heavy is imported.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class FieldInfo:
    """One field: what it does, its default (written only here), values that usually serve, and whether it is ours."""

    name: str
    what: str
    default: Any
    recommended: str = ""
    ours: bool = False


def _table(*fields: FieldInfo) -> dict[str, FieldInfo]:
    return {field.name: field for field in fields}


F = FieldInfo
LORA_FIELDS = _table(
    F("r", "rank: the adapter's width, r x (in + out) parameters a layer", 16, "8 to 64"),
    F("lora_alpha", "scale: the adapter's output is multiplied by lora_alpha / r", 32, "2 x r"),
    F("target_modules", "which layers: auto, all-linear, a list of name endings, or a regex", "auto", "auto"),
    F("lora_dropout", "share of the adapter's input set to zero while training", 0.05, "0.05 to 0.1"),
    F("bias", "which biases of the base train: none, all, or lora_only (those of the target layers)", "none", "none"),
    F("task_type", "the kind of model; halfbyte trains causal language models", "CAUSAL_LM", "CAUSAL_LM"),
    F("use_rslora", "rank-stabilised LoRA: scale by lora_alpha / sqrt(r)", False, "true above r 64"),
    F("use_dora", "DoRA: train magnitude and direction apart; slower, often better at a low rank", False, "false"),
    F("lora_bias", "a trained bias in LoRA's B; can be merged only into layers with a bias", False, "false"),
    F("init_lora_weights", "start of A: true (Kaiming), gaussian, orthogonal (16-bit base); false: A, B random", True),
    F("rank_pattern", "another rank for some layers: {name ending or regex: r}", {}),
    F("alpha_pattern", "another lora_alpha for some layers: {name ending or regex: alpha}", {}),
    F("layers_to_transform", "only these decoder layers, by index", None),
    F("layers_pattern", "the name of the list of layers, if layers_to_transform cannot find it", None),
    F("exclude_modules", "layers that stay without an adapter: a list of name endings, or a regex", None),
    F("modules_to_save", "modules that train whole and are saved with the adapter, such as lm_head", None),
    F("trainable_token_indices", "token ids whose embedding rows train", None),
    F("save_dtype", "dtype of the saved adapter: fp32 or bf16 (half the file)", "fp32", "fp32", ours=True),
)  # fmt: skip

LORA_REFUSED = {
    "peft_type": "it is always LORA",
    "auto_mapping": "PEFT fills it in itself",
    "peft_version": "PEFT fills it in itself",
    "base_model_name_or_path": "halfbyte writes where the base came from: the recipe's model",
    "revision": "give it with the model, as in model: org/name@revision",
    "inference_mode": "halfbyte sets it: off while training, on in the saved adapter",
    "fan_in_fan_out": "it follows from the layer's type (GPT-2's Conv1D is transposed when it is quantised)",
    "megatron_config": "Megatron layers are not loaded here",
    "megatron_core": "Megatron layers are not loaded here",
    "loftq_config": "LoftQ needs the base in full precision to start from",
    "eva_config": "EVA needs passes over the data before training, which is not built",
    "corda_config": "CorDA changes the base's weights, which are frozen in 4 bits",
    "lora_ga_config": "LoRA-GA needs gradients of the full-precision weights",
    "velora_config": "it compresses saved activations; halfbyte plans memory by micro-batches and recomputation",
    "alora_invocation_tokens": "activated LoRA needs its own masks in packed micro-batches, which is not built",
    "use_qalora": "QA-LoRA is for GPTQ bases",
    "qalora_group_size": "QA-LoRA is for GPTQ bases",
    "monteclora_config": "its extra loss term is not part of the step's loss here",
    "layer_replication": "copied layers would share 4-bit weights that the memory plan counts once",
    "runtime_config": "it is for ephemeral GPU offload; placement is halfbyte's to plan",
    "target_parameters": "adapters on bare parameters do not work on 4-bit weights",
    "use_bdlora": "block-diagonal LoRA is for sharded serving",
    "arrow_config": "Arrow routes among several trained adapters; a run trains one",
    "kasa_config": "KaSA changes the base's weights, which are frozen in 4 bits",
    "ensure_weight_tying": "a tied embedding and head are frozen here, or trained through modules_to_save",
}

# Values of init_lora_weights that PEFT knows and that a frozen base rules out.
_CHANGES_BASE = "it starts from a decomposition of the base's weights and changes them; the frozen base stays as it is"
INIT_REFUSED = {
    "pissa": _CHANGES_BASE,
    "olora": _CHANGES_BASE,
    "corda": _CHANGES_BASE,
    "mica": "it starts from a decomposition of full-precision weights",
    "loftq": "LoftQ needs the base in full precision to start from",
    "eva": "EVA needs passes over the data before training, which is not built",
    "lora_ga": "LoRA-GA needs gradients of the full-precision weights",
}
INIT_NAMES = ("gaussian", "orthogonal")

TRAIN_FIELDS = _table(
    F("per_device_train_batch_size", "examples that count as one batch", 4, "with accumulation, 8 to 64 a step"),
    F("gradient_accumulation_steps", "batches in one optimiser step; micro-batches are planned from both", 4),
    F("per_device_eval_batch_size", "the most held-out examples in one micro-batch", 8),
    F("num_train_epochs", "passes over the rows; may be a fraction", 3.0, "1 to 5"),
    F("max_steps", "optimiser steps; above 0 it overrides num_train_epochs", -1),
    F("learning_rate", "the highest learning rate", 2e-4, "1e-4 to 1e-3"),
    F("lr_scheduler_type", "how the rate falls: linear, cosine, constant, ...", "linear", "linear or cosine"),
    F("lr_scheduler_kwargs", "arguments of the schedule, such as {num_cycles: 2} for cosine_with_restarts", None),
    F("warmup_steps", "steps over which the rate rises; below 1 a share of all steps", 0, "0.03"),
    F("weight_decay", "decay of the adapter's weights (AdamW)", 0.0, "0 to 0.1"),
    F("max_grad_norm", "gradients are clipped to this norm; 0 for no clipping", 1.0, "0.3 to 1"),
    F("adam_beta1", "Adam's first moment", 0.9),
    F("adam_beta2", "Adam's second moment", 0.999),
    F("adam_epsilon", "Adam's epsilon", 1e-8),
    F("optim", "adamw_torch, adamw_torch_fused, adafactor, sgd, adagrad, rmsprop", "adamw_torch", "adamw_torch"),
    F("optim_args", "arguments of sgd, adagrad or rmsprop, as name=value,name=value", None),
    F("label_smoothing_factor", "label smoothing of the training loss", 0.0, "0"),
    F("seed", "seed of the adapters' start, of dropout, and of the order of rows (unless data_seed is given)", 42),
    F("data_seed", "seed of the order of rows", None),
    F("logging_steps", "steps between printed lines and reports; metrics.jsonl always has every step", 1),
    F("logging_first_step", "report the first step to report_to too, whatever logging_steps", False),
    F("report_to", "none, or installed integrations of transformers, such as [tensorboard]", "none"),
    F("run_name", "the run's name for report_to", None),
    F("eval_strategy", "auto (with data.eval: by eval_steps, or each epoch), no, steps, epoch", "auto"),
    F("eval_steps", "steps between evaluations; below 1 a share of all; none given: logging_steps", None),
    F("eval_on_start", "evaluate before the first step too", False),
    F("save_strategy", "checkpoints by steps, epoch, or no (then by save_minutes and on a signal)", "steps"),
    F("save_steps", "steps between checkpoints; below 1 a share of all steps", 100),
    F("save_total_limit", "how many checkpoints are kept; null for all", 2),
    F("load_best_model_at_end", "with evaluations: the adapter is that of the best one, not of the last step", True),
    F("metric_for_best_model", "the best evaluation is the one with the lowest: loss or perplexity", "loss"),
    F("greater_is_better", "only false, as loss and perplexity are better when smaller", None),
    F("bf16", "compute in bf16: feeds quant.compute_dtype, never autocast", None),
    F("fp16", "compute in fp16 with loss scaling on a card; a CPU computes in bf16 or fp32 instead", None),
    F("gradient_checkpointing", "recompute activations: auto (as memory asks), true, false, selective (what is cheap)",
      "auto", "auto"),
    F("loraplus_lr_ratio", "LoRA+: learning rate of B over that of A", None, "16, with a lower rate", ours=True),
    F("save_minutes", "minutes between checkpoints, beside save_steps; null for none", 15.0, ours=True),
    F("max_tokens_per_micro_batch", "tokens of a micro-batch: auto (what fits) or a number", "auto", "auto", ours=True),
)  # fmt: skip

_NO_SHARDING = "sharding over processes is not built; one process uses every card it sees"
_NO_HUB = "a run ends in a folder; upload adapter/ with `hf upload`"
_OUR_LOADER = "rows are tokenised before training and a step is one item; there is no loader to tune"
_OUR_LOG = "halfbyte prints and logs itself: --quiet, --json, train.logging_steps, metrics.jsonl"
_OUR_EVAL = "the evaluation is halfbyte's own: mean loss and perplexity of the labelled tokens"
_OUR_CHECKPOINTS = "checkpoints are halfbyte's own: whole, verified, with everything that resuming needs"
_NO_COMPILE = "torch.compile gained 4% a layer on a CPU when measured, and costs minutes at start"
TRAIN_REFUSED = {
    "output_dir": "the run folder is the recipe's own `output:` (or --output)",
    "average_tokens_across_devices": "a step's loss is always divided by its labelled tokens",
    "optim_target_modules": "it is for GaLore and APOLLO, which train full weights",
    "bf16_full_eval": "evaluation computes in quant.compute_dtype",
    "fp16_full_eval": "evaluation computes in quant.compute_dtype",
    "tf32": "no fp32 matrix product is left to speed up: set quant.compute_dtype",
    "activation_checkpointing": "use gradient_checkpointing: auto, true, false or selective",
    "activation_checkpointing_kwargs": "how to recompute is decided with the memory plan",
    "gradient_checkpointing_kwargs": "how to recompute is decided with the memory plan",
    "torch_compile": _NO_COMPILE,
    "torch_compile_backend": _NO_COMPILE,
    "torch_compile_mode": _NO_COMPILE,
    "use_liger_kernel": "it replaces upstream classes and needs a card; logits are made for labelled tokens only here",
    "liger_kernel_config": "see use_liger_kernel",
    "use_cache": "training needs no key/value cache; generation always uses it",
    "neftune_noise_alpha": "its noise is scaled by the length of a row, and a micro-batch here holds several rows",
    "torch_empty_cache_steps": "memory is planned instead",
    "auto_find_batch_size": "micro-batches are planned to fit; the batch is never changed behind your back",
    "logging_strategy": _OUR_LOG,
    "log_on_each_node": _OUR_LOG,
    "logging_nan_inf_filter": "a loss that is not finite ends the run and names its rows",
    "include_num_input_tokens_seen": "metrics.jsonl has the tokens of every step",
    "log_level": _OUR_LOG,
    "log_level_replica": _OUR_LOG,
    "disable_tqdm": _OUR_LOG,
    "project": "set it in the environment of the integration that report_to names",
    "trackio_space_id": "set it in trackio's own environment",
    "trackio_bucket_id": "set it in trackio's own environment",
    "trackio_static_space_id": "set it in trackio's own environment",
    "eval_delay": "give eval_steps instead",
    "prediction_loss_only": _OUR_EVAL,
    "eval_do_concat_batches": _OUR_EVAL,
    "eval_use_gather_object": _OUR_EVAL,
    "eval_accumulation_steps": _OUR_EVAL,
    "include_for_metrics": _OUR_EVAL,
    "batch_eval_metrics": _OUR_EVAL,
    "save_only_model": _OUR_CHECKPOINTS,
    "save_on_each_node": _OUR_CHECKPOINTS,
    "enable_jit_checkpoint": "SIGINT and SIGTERM always save a checkpoint",
    "push_to_hub": _NO_HUB,
    "hub_token": _NO_HUB,
    "hub_private_repo": _NO_HUB,
    "hub_model_id": _NO_HUB,
    "hub_strategy": _NO_HUB,
    "hub_always_push": _NO_HUB,
    "hub_revision": _NO_HUB,
    "ignore_data_skip": "the position in the data is the step's index; nothing has to be skipped",
    "restore_callback_states_from_checkpoint": _OUR_CHECKPOINTS,
    "full_determinism": "the order of rows and the seeds are always fixed; on a CPU two runs give the same bytes",
    "use_cpu": "hide the cards with CUDA_VISIBLE_DEVICES=",
    "accelerator_config": "batch and accumulation are inside one item of the data set",
    "parallelism_config": _NO_SHARDING,
    "dataloader_drop_last": "every row is trained on; the last step of an epoch may be short",
    "dataloader_num_workers": _OUR_LOADER,
    "dataloader_pin_memory": _OUR_LOADER,
    "dataloader_persistent_workers": _OUR_LOADER,
    "dataloader_prefetch_factor": _OUR_LOADER,
    "dataloader_multiprocessing_context": _OUR_LOADER,
    "dataloader_in_order": _OUR_LOADER,
    "remove_unused_columns": "columns are named in data.fields; others are not read",
    "label_names": "labels follow from data.mask",
    "train_sampling_strategy": "the order is a seeded permutation of each epoch; there is no padding to group by",
    "length_column_name": "lengths are those of the tokenised rows",
    "ddp_find_unused_parameters": _NO_SHARDING,
    "ddp_bucket_cap_mb": _NO_SHARDING,
    "ddp_broadcast_buffers": _NO_SHARDING,
    "ddp_static_graph": _NO_SHARDING,
    "ddp_backend": _NO_SHARDING,
    "ddp_timeout": _NO_SHARDING,
    "fsdp": _NO_SHARDING,
    "fsdp_config": _NO_SHARDING,
    "deepspeed": _NO_SHARDING,
    "debug": "a loss that is not finite ends the run and names its rows",
    "skip_memory_metrics": "peak memory is always measured, and is in the report",
    "do_train": "the command says what to do: train, eval, generate",
    "do_eval": "the command says what to do: train, eval, generate",
    "do_predict": "the command says what to do: train, eval, generate",
    "resume_from_checkpoint": "halfbyte train RUN --resume",
    "local_rank": _NO_SHARDING,
}

# Optimisers that need nothing else installed and come back from a checkpoint exactly -> the names `optim_args` takes.
OPTIMIZERS: dict[str, tuple[str, ...]] = {
    "adamw_torch": (),
    "adamw_torch_fused": (),
    "adafactor": (),
    "sgd": ("momentum", "dampening", "weight_decay", "nesterov"),
    "adagrad": ("lr_decay", "weight_decay", "eps"),
    "rmsprop": ("momentum", "alpha", "eps", "weight_decay", "centered"),
    **dict.fromkeys(
        ("adamw_bnb_8bit", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "lion_32bit", "lion_8bit",
         "paged_lion_32bit", "paged_lion_8bit", "ademamix", "ademamix_8bit", "rmsprop_bnb", "rmsprop_bnb_8bit",
         "rmsprop_bnb_32bit"), (),
    ),
}  # fmt: skip
# Schedules -> the names that `lr_scheduler_kwargs` takes.
SCHEDULES: dict[str, tuple[str, ...]] = {
    "linear": (),
    "cosine": ("num_cycles",),
    "cosine_with_restarts": ("num_cycles",),
    "polynomial": ("lr_end", "power"),
    "constant": (),
    "constant_with_warmup": (),
    "inverse_sqrt": ("timescale",),
    "cosine_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    "warmup_stable_decay": (
        "num_decay_steps", "num_stable_steps", "warmup_type", "decay_type", "min_lr_ratio", "num_cycles",
    ),
}  # fmt: skip
# Schedules that need an argument: one of these names must be given.
SCHEDULES_NEED = {
    "cosine_with_min_lr": ("min_lr", "min_lr_rate"),
    "cosine_warmup_with_min_lr": ("min_lr", "min_lr_rate"),
    "warmup_stable_decay": ("num_decay_steps",),
}
SCHEDULES_REFUSED = {
    "reduce_lr_on_plateau": "it follows an evaluation, and a schedule here is fixed before the first step",
    "greedy": "it follows the loss, and a schedule here is fixed before the first step",
}

# Integrations of transformers -> modules; one of them must be installed.
INTEGRATIONS: dict[str, tuple[str, ...]] = {
    "azure_ml": ("azureml",),
    "clearml": ("clearml",),
    "codecarbon": ("codecarbon",),
    "comet_ml": ("comet_ml",),
    "dagshub": ("dagshub",),
    "dvclive": ("dvclive",),
    "flyte": ("flytekit",),
    "kubeflow": ("kubeflow",),
    "mlflow": ("mlflow",),
    "neptune": ("neptune",),
    "swanlab": ("swanlab",),
    "tensorboard": ("tensorboard", "tensorboardX"),
    "trackio": ("trackio",),
    "wandb": ("wandb",),
}

# Names of other tools and of older versions -> what to write instead.
ELSEWHERE = {
    "rank": "lora.r",
    "lora_r": "lora.r",
    "alpha": "lora.lora_alpha",
    "dropout": "lora.lora_dropout",
    "batch_size": "train.per_device_train_batch_size",
    "epochs": "train.num_train_epochs",
    "lr": "train.learning_rate",
    "scheduler": "train.lr_scheduler_type",
    "optimizer": "train.optim",
    "warmup_ratio": "train.warmup_steps, where a number below 1 is a share of all steps",
    "evaluation_strategy": "train.eval_strategy",
    "logging_dir": "output, where metrics.jsonl is",
    "max_seq_length": "data.max_length",
    "dataset": "data.train",
    "dataset_text_field": "data.fields",
    "train_file": "data.train",
    "validation_file": "data.eval",
    "model_name_or_path": "model",
    "base_model": "model",
    "load_in_4bit": "quant.type: nf4",
    "bnb_4bit_quant_type": "quant.type",
    "bnb_4bit_compute_dtype": "quant.compute_dtype",
    "bnb_4bit_use_double_quant": "quant.double_quant",
}
# Names of other tools that have no counterpart here, and why.
NOT_NEEDED = {
    "group_by_length": "micro-batches have no padding",
    "overwrite_output_dir": "a run folder is never overwritten; give another output",
}


def markdown(table: dict[str, FieldInfo]) -> str:
    """A table of fields as Markdown: name, what it does, default, recommended."""
    lines = ["| field | what it does | default | recommended |", "| --- | --- | --- | --- |"]
    for field in table.values():
        name = f"`{field.name}`" + (" (halfbyte's own)" if field.ours else "")
        what = field.what.replace("|", "\\|")
        lines.append(f"| {name} | {what} | `{shown(field.default)}` | {field.recommended} |")
    return "\n".join(lines)


def markdown_refused(table: dict[str, str]) -> str:
    """A table of refused fields as Markdown."""
    lines = ["| field | why not |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| `{name}` | {reason} |" for name, reason in table.items())])


def shown(value: object) -> str:
    """A value as YAML writes it, in one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list | tuple) else str(value)
