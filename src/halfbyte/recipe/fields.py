"""The named tables: fields of LoraConfig and TrainingArguments that a recipe refuses, and why; the words that it takes.

Why: a flag that is accepted and never read is the worst kind of bug; one that is silently dropped is the second worst.
A test compares tables and `schema` with the installed peft and transformers, both ways; `docs/` is generated from them.
Source: `peft/tuners/lora/config.py`, `transformers/training_args.py`.
"""

import json
from collections.abc import Iterator

# Fields that PEFT and transformers do not have.
OURS = frozenset(
    {
        "adapter", "save_dtype", "loraplus_lr_ratio", "save_minutes", "max_tokens_per_micro_batch", "within",
        "max_forgetting", "max_source_rise",
        "early_stopping_patience", "early_stopping_threshold",  # arguments of transformers' EarlyStoppingCallback
        "method",
        "beta", "loss_type", "label_smoothing", "ld_alpha", "rpo_alpha", "discopop_tau", "desirable_weight",  # TRL's
        "undesirable_weight", "cpo_alpha", "simpo_gamma",
        "rewards", "num_generations", "max_completion_length", "temperature", "epsilon", "epsilon_high",
        "scale_rewards", "mask_truncated_completions", "reward_seconds",
    }
)  # fmt: skip

# What may change when a run is resumed, as nothing that it learns depends on it. Rows are compared by their tokens.
MAY_CHANGE = frozenset(
    {"output", "allow_pickle", "trust_remote_code", "quant.placement", "lora.save_dtype", "data.train", "data.eval",
     "data.share_prefixes"}
) | {
    f"train.{name}"
    for name in (
        "logging_steps", "logging_first_step", "report_to", "run_name", "eval_strategy", "eval_steps", "eval_on_start",
        "per_device_eval_batch_size", "save_strategy", "save_steps", "save_total_limit", "save_minutes",
        "load_best_model_at_end", "metric_for_best_model", "greater_is_better", "max_forgetting", "max_source_rise",
        "gradient_checkpointing", "max_tokens_per_micro_batch", "reward_seconds",
    )
} | {
    f"eval.{name}"
    for name in (
        "metrics", "mark", "pattern", "json_fields", "choices", "max_new_tokens", "rows", "resamples", "seed",
    )
}  # fmt: skip
REWARDED = frozenset({"eval.mark", "eval.pattern", "eval.json_fields", "eval.choices"})  # what rewards are taken by
# With one of these a finished run goes on.
GOES_ON = frozenset(
    {"train.max_steps", "train.num_train_epochs", "train.early_stopping_patience", "train.early_stopping_threshold"}
)

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
    "loftq_config": "its counterpart here is lora.init_lora_weights: residual",
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
    "loftq": "PEFT's LoftQ needs a card and ignores lora_alpha; residual is one round of it, from the base's store",
    "eva": "EVA needs passes over the data before training, which is not built",
    "lora_ga": "LoRA-GA needs gradients of the full-precision weights",
}
INIT_NAMES = ("gaussian", "orthogonal", "residual")
OURS_OF_INIT = frozenset({"residual"})  # PEFT does not know these


def excluded_by_residual(init: bool | str, use_dora: bool, adapter: str | None, *, quantises: bool) -> Iterator[str]:
    """What a start from what quantising has lost cannot be together with: sentences."""
    name = "lora.init_lora_weights residual"
    if init == "residual" and not quantises:
        yield f"{name} is what quantising has lost, and with quant.type none or gguf, which auto may choose, nothing is"
    if init == "residual" and use_dora:
        yield f"{name} and lora.use_dora: DoRA's magnitudes would be those of the base without it; use one of them"
    if init == "residual" and adapter is not None:
        yield f"{name} and lora.adapter {adapter} are two starts; give one of them"


def unread(name: str, owner: str, takes: tuple[str, ...], given: set[str]) -> Iterator[str]:
    """What is given and not taken, in a sentence."""
    if unknown := ", ".join(sorted(given - set(takes))):
        yield f"train.{name}: train.{owner} takes {', '.join(takes) or 'nothing'}, got {unknown}"


def _each(names: str, reason: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), reason)


TRAIN_REFUSED = {
    "output_dir": "the run folder is the recipe's own `output:` (or --output)",
    "average_tokens_across_devices": "a step's loss is always divided by its labelled tokens",
    "optim_target_modules": "it is for GaLore and APOLLO, which train full weights",
    **_each("bf16_full_eval fp16_full_eval", "evaluation computes in quant.compute_dtype"),
    "tf32": "no fp32 matrix product is left to speed up: set quant.compute_dtype",
    "activation_checkpointing": "use gradient_checkpointing: auto, true, false or selective",
    **_each(
        "activation_checkpointing_kwargs gradient_checkpointing_kwargs",
        "how to recompute is decided with the memory plan",
    ),
    **_each(
        "torch_compile torch_compile_backend torch_compile_mode",
        "torch.compile gained 4% a layer on a CPU when measured, and costs minutes at start",
    ),
    "use_liger_kernel": "it replaces upstream classes and needs a card; logits are made for labelled tokens only here",
    "liger_kernel_config": "see use_liger_kernel",
    "use_cache": "training needs no key/value cache; generation always uses it",
    "neftune_noise_alpha": "its noise is scaled by the length of a row, and a micro-batch here holds several rows",
    "torch_empty_cache_steps": "memory is planned instead",
    "auto_find_batch_size": "micro-batches are planned to fit; the batch is never changed behind your back",
    **_each(
        "logging_strategy log_on_each_node log_level log_level_replica disable_tqdm",
        "halfbyte prints and logs itself: --quiet, --json, train.logging_steps, metrics.jsonl",
    ),
    **_each("logging_nan_inf_filter debug", "a loss that is not finite ends the run and names its rows"),
    "include_num_input_tokens_seen": "metrics.jsonl has the tokens of every step",
    "project": "set it in the environment of the integration that report_to names",
    **_each("trackio_space_id trackio_bucket_id trackio_static_space_id", "set it in trackio's own environment"),
    "eval_delay": "give eval_steps instead",
    **_each(
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps "
        "include_for_metrics batch_eval_metrics",
        "the evaluation is halfbyte's own: mean loss and perplexity of the labelled tokens",
    ),
    **_each(
        "save_only_model save_on_each_node restore_callback_states_from_checkpoint",
        "checkpoints are halfbyte's own: whole, verified, with everything that resuming needs",
    ),
    "enable_jit_checkpoint": "SIGINT and SIGTERM always save a checkpoint",
    **_each(
        "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision",
        "a run ends in a folder; upload adapter/ with `hf upload`",
    ),
    "ignore_data_skip": "the position in the data is the step's index; nothing has to be skipped",
    "full_determinism": "the order of rows and the seeds are always fixed; on a CPU two runs give the same bytes",
    "use_cpu": "hide the cards with CUDA_VISIBLE_DEVICES=",
    "accelerator_config": "batch and accumulation are inside one item of the data set",
    "dataloader_drop_last": "every row is trained on; the last step of an epoch may be short",
    **_each(
        "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
        "dataloader_multiprocessing_context dataloader_in_order",
        "rows are tokenised before training and a step is one item; there is no loader to tune",
    ),
    "remove_unused_columns": "columns are named in data.fields; others are not read",
    "label_names": "labels follow from data.mask",
    "train_sampling_strategy": "the order is a seeded permutation of each epoch; there is no padding to group by",
    "length_column_name": "lengths are those of the tokenised rows",
    **_each(
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout "
        "fsdp fsdp_config deepspeed parallelism_config local_rank",
        "quant.placement: sharded shares the base out; the launcher says how many processes there are (docs/scale.md)",
    ),
    "skip_memory_metrics": "peak memory is always measured, and is in the report",
    **_each("do_train do_eval do_predict", "the command says what to do: train, eval, generate"),
    "resume_from_checkpoint": "halfbyte train RUN --resume",
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
    **{name: (name,) for name in ("clearml", "codecarbon", "comet_ml", "dagshub", "dvclive", "kubeflow", "mlflow")},
    **{name: (name,) for name in ("neptune", "swanlab", "trackio", "wandb")},
    "azure_ml": ("azureml",),
    "flyte": ("flytekit",),
    "tensorboard": ("tensorboard", "tensorboardX"),
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
    "val_set_size": "data.eval, such as 5% of the training rows",
    "validation_split_percentage": "data.eval, such as 5% of the training rows",
    "model_name_or_path": "model",
    "base_model": "model",
    "load_in_4bit": "quant.type: nf4",
    "load_in_8bit": "quant.type: int8",
    "bnb_4bit_quant_type": "quant.type",
    "bnb_4bit_compute_dtype": "quant.compute_dtype",
    "bnb_4bit_use_double_quant": "quant.double_quant",
}
# Names of other tools that have no counterpart here, and why.
NOT_NEEDED = {
    "group_by_length": "micro-batches have no padding",
    "num_iterations": "each step writes its own answers, so that none is of an older adapter",
    "overwrite_output_dir": "a run folder is never overwritten; give another output",
}


def shown(value: object) -> str:
    """A value as YAML writes it, in one line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, dict | list | tuple) else str(value)
