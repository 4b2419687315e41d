"""The recipe: what loads, where each value comes from, and what every mistake is told, word for word."""

# ruff: noqa: E501  exact texts are easier to compare in one line

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from halfbyte.errors import RecipeError
from halfbyte.recipe.data import Data, DataEntry
from halfbyte.recipe.file import init_template, load_recipe, recipe_from, to_yaml
from halfbyte.recipe.method import METHODS
from halfbyte.recipe.schema import Loaded, Recipe, leaves, rows

LEAST = "model: m\ndata: {train: t.jsonl}\n"
Load = Callable[..., Loaded]

# A value other than the default for every leaf, and what else a recipe needs to hold it.
WRITES = {"train.method": "grpo", "train.rewards": "length"}
OTHER: dict[str, tuple[Any, dict[str, Any]]] = {
    "model": ("other", {}),
    "task": ("classify", {}),
    "labels": (["a", "b"], {"task": "classify"}),
    "class_weight": ("balanced", {"task": "classify"}),
    "vectors.loss": ("CoSENTLoss", {"task": "embed"}),
    "vectors.scale": (10.0, {"task": "embed"}),
    "vectors.margin": (1.0, {"task": "embed"}),
    "vectors.pooling": ("mean", {"task": "embed"}),
    "vectors.matryoshka_dims": ([64, 32], {"task": "embed"}),
    "vectors.matryoshka_weights": ([1.0, 0.5], {"task": "embed", "vectors.matryoshka_dims": [64, 32]}),
    "data.query_prompt": ("q: ", {"task": "embed"}),
    "data.passage_prompt": ("p: ", {"task": "embed"}),
    **{f"data.fields.{name}": ("mine", {}) for name in ("query", "passage", "negative", "score")},
    "revision": ("main", {"model": "org/name"}),
    "output": ("runs/other", {}),
    "allow_pickle": (True, {}),
    "trust_remote_code": (True, {}),
    "quant.type": ("fp4", {}),
    "quant.double_quant": (False, {}),
    "quant.llm_int8_threshold": (6.0, {"quant.type": "int8"}),
    "quant.compute_dtype": ("fp32", {}),
    "quant.compute": ("auto", {}),
    "quant.placement": ("resident", {}),
    "quant.skip_modules": (["lm_head"], {}),
    "quant.fp32_modules": (["norm"], {}),
    "lora.r": (8, {}),
    "lora.lora_alpha": (16, {}),
    "lora.target_modules": (["q_proj"], {}),
    "lora.target_parameters": (["down_proj"], {"lora.lora_dropout": 0.0}),
    "lora.lora_dropout": (0.1, {}),
    "lora.bias": ("lora_only", {}),
    "lora.use_rslora": (True, {}),
    "lora.use_dora": (True, {}),
    "lora.lora_bias": (True, {}),
    "lora.init_lora_weights": ("gaussian", {}),
    "lora.rank_pattern": ({"q_proj": 4}, {}),
    "lora.alpha_pattern": ({"q_proj": 4}, {}),
    "lora.layers_to_transform": ([0, 1], {}),
    "lora.layers_pattern": ("layers", {"lora.layers_to_transform": [0]}),
    "lora.exclude_modules": (["v_proj"], {}),
    "lora.modules_to_save": (["lm_head"], {}),
    "lora.trainable_token_indices": ([5, 6], {}),
    "lora.adapter": ("runs/a", {}),
    "lora.save_dtype": ("bf16", {}),
    "data.train": ("other.jsonl", {}),
    "data.eval": ("e.jsonl", {}),
    "data.format": ("messages", {}),
    "data.fields.prompt": ("question", {}),
    "data.fields.completion": ("answer", {}),
    "data.fields.messages": ("chat", {}),
    **{
        f"data.fields.{name}": ("mine", {})
        for name in (
            "conversations",
            "role",
            "content",
            "instruction",
            "input",
            "output",
            "text",
            "system",
            "tools",
            "text_pair",
            "tokens",
            "tags",
            "spans",
        )
    },
    "data.max_length": (2048, {}),
    "data.mask": ("all", {}),
    "data.overlong": ("skip", {}),
    "data.packing": ("stream", {}),
    "data.share_prefixes": ("off", {}),
    "data.weights": ({"a+": 0.5}, {}),
    "data.streaming": (
        True,
        {"train.max_steps": 10, "train.save_strategy": "no", "data.eval": "none", "data.overlong": "skip"},
    ),
    "data.order": ("families", {}),
    "data.chat_template": ("chat.jinja", {}),
    "data.template_args": ({"enable_thinking": False}, {}),
    "data.thoughts": ("last", {}),
    "train.per_device_train_batch_size": (2, {}),
    "train.gradient_accumulation_steps": (2, {}),
    "train.per_device_eval_batch_size": (2, {}),
    "train.num_train_epochs": (0.5, {}),
    "train.max_steps": (10, {}),
    "train.learning_rate": (1e-3, {}),
    "train.max_forgetting": (0.1, {"data.eval": "e.jsonl"}),
    "train.max_source_rise": (0.1, {"data.eval": [{"path": "e.jsonl", "name": "e"}]}),
    "train.method": ("dpo", {}),
    "train.beta": (0.2, {"train.method": "dpo"}),
    "train.loss_type": ("hinge", {"train.method": "dpo"}),
    "train.label_smoothing": (0.2, {"train.method": "dpo"}),
    "train.ld_alpha": (0.2, {"train.method": "dpo"}),
    "train.rpo_alpha": (0.2, {"train.method": "dpo"}),
    "train.discopop_tau": (0.2, {"train.method": "dpo"}),
    "train.desirable_weight": (0.2, {"train.method": "kto"}),
    "train.undesirable_weight": (0.2, {"train.method": "kto"}),
    "train.cpo_alpha": (0.2, {"train.method": "cpo"}),
    "train.simpo_gamma": (0.2, {"train.method": "simpo"}),
    "train.rewards": ({"length": -0.5}, WRITES),
    "train.num_generations": (4, WRITES),
    "train.max_completion_length": (9, WRITES),
    "train.temperature": (0.5, WRITES),
    "train.epsilon": (0.1, WRITES),
    "train.epsilon_high": (0.28, WRITES),
    "train.scale_rewards": ("none", WRITES),
    "train.mask_truncated_completions": (False, WRITES),
    "train.reward_seconds": (5.0, WRITES),
    **{f"data.fields.{name}": ("other", {}) for name in ("chosen", "rejected", "label", "answers", "scores")},
    "train.lr_scheduler_type": ("cosine", {}),
    "train.lr_scheduler_kwargs": ({"num_cycles": 2}, {"train.lr_scheduler_type": "cosine_with_restarts"}),
    "train.warmup_steps": (0.1, {}),
    "train.weight_decay": (0.01, {}),
    "train.max_grad_norm": (0.3, {}),
    "train.adam_beta1": (0.8, {}),
    "train.adam_beta2": (0.95, {}),
    "train.adam_epsilon": (1e-6, {}),
    "train.optim": ("sgd", {}),
    "train.optim_args": ("momentum=0.9", {"train.optim": "sgd"}),
    "train.label_smoothing_factor": (0.1, {}),
    "train.seed": (1, {}),
    "train.data_seed": (1, {}),
    "train.logging_steps": (5, {}),
    "train.logging_first_step": (True, {}),
    "train.report_to": ("all", {}),
    "train.run_name": ("a", {"train.report_to": "all"}),
    "train.eval_strategy": ("epoch", {"data.eval": "e.jsonl"}),
    "train.eval_steps": (5, {"data.eval": "e.jsonl"}),
    "train.eval_on_start": (True, {"data.eval": "e.jsonl"}),
    "train.save_strategy": ("no", {}),
    "train.save_steps": (5, {}),
    "train.save_total_limit": (None, {}),
    "train.load_best_model_at_end": (False, {}),
    "train.metric_for_best_model": ("perplexity", {}),
    "train.greater_is_better": (False, {}),
    "eval.metrics": (["exact_match"], {}),
    "eval.mark": ("Answer", {}),
    "eval.pattern": ("is (.*)", {}),
    "eval.json_fields": (["a"], {}),
    "eval.choices": (["a", "b"], {}),
    "eval.max_new_tokens": (8, {}),
    "eval.rows": (8, {}),
    "eval.resamples": (500, {}),
    "eval.seed": (1, {}),
    "train.early_stopping_patience": (3, {"data.eval": "e.jsonl"}),
    "train.early_stopping_threshold": (0.1, {}),
    "train.bf16": (True, {}),
    "train.fp16": (True, {}),
    "train.gradient_checkpointing": (True, {}),
    "train.loraplus_lr_ratio": (16.0, {}),
    "train.save_minutes": (None, {}),
    "train.within": ("30m", {}),
    "train.max_tokens_per_micro_batch": (512, {}),
}
# The only value that there is; the field is taken so that known scripts load, or for what comes later.
FIXED = {"quant.block_size": 64, "lora.task_type": "CAUSAL_LM"}


@pytest.fixture
def load(tmp_path: Path) -> Load:
    def load(text: str | bytes, *overrides: str) -> Loaded:
        path = tmp_path / "r.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_recipe(path, overrides)

    return load


def nested(values: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for dotted, value in values.items():
        *outer, name = dotted.split(".")
        inner = found
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[name] = value
    return found


def told(error: pytest.ExceptionInfo[RecipeError]) -> list[str]:
    return error.value.problems


# --- what loads -----------------------------------------------------------------------------------------------------


def test_the_least_recipe_has_every_default(load: Load) -> None:
    recipe = load(LEAST).recipe
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.lora_dropout, recipe.lora.bias) == (16, 32, 0.05, "none")
    assert (recipe.quant.type, recipe.quant.double_quant, recipe.quant.compute_dtype) == ("nf4", True, "auto")
    assert recipe == Recipe(model="m", data=Data(train="t.jsonl"))


def test_a_recipe_is_frozen(load: Load) -> None:
    recipe = load(LEAST).recipe
    with pytest.raises(ValidationError, match="frozen"):
        recipe.lora.r = 8  # type: ignore[misc]


def test_set_wins_over_recipe_wins_over_default_and_each_leaf_knows(load: Load) -> None:
    loaded = load(LEAST + "lora:\n  r: 8\n  lora_alpha: 16\n", "lora.r=32", "data.fields={prompt: question}")
    values = {field: (value, origin.kind, origin.why) for field, value, origin in rows(loaded)}
    assert values["lora.r"] == (32, "set", "")
    assert values["lora.lora_alpha"] == (16, "recipe", "line 5")
    assert values["data.fields.prompt"] == ("question", "set", "")
    assert values["data.fields.completion"] == ("completion", "default", "")
    assert [*loaded.origins] == [field for field, _ in leaves(loaded.recipe)] and len(values) == len(OTHER) + len(FIXED)


def test_setting_a_section_changes_only_what_it_names(load: Load) -> None:
    loaded = load(LEAST + "lora: {r: 8, bias: all}\n", "lora={r: 64}")
    assert (loaded.recipe.lora.r, loaded.recipe.lora.bias) == (64, "all")
    assert (loaded.origins["lora.r"].kind, loaded.origins["lora.bias"].kind) == ("set", "recipe")


def test_a_later_set_wins(load: Load) -> None:
    assert load(LEAST, "lora.r=8", "lora.r=64").recipe.lora.r == 64


def test_one_entry_of_a_pattern_can_be_set(load: Load) -> None:
    loaded = load(LEAST + "lora: {rank_pattern: {k_proj: 4}}\n", "lora.rank_pattern.q_proj=8")
    assert loaded.recipe.lora.rank_pattern == {"k_proj": 4, "q_proj": 8}
    assert loaded.origins["lora.rank_pattern"].kind == "set"


@pytest.mark.parametrize("name", ["train", "lora", "quant"])
def test_a_section_with_every_line_commented_out_is_empty(load: Load, name: str) -> None:
    assert load(f"{LEAST}{name}:\n  # nothing\n").recipe == load(LEAST).recipe


def test_a_value_can_be_set_in_a_section_with_every_line_commented_out(load: Load) -> None:
    assert load(f"{LEAST}lora:\n  # nothing\n", "lora.r=32").recipe == load(LEAST, "lora.r=32").recipe


@pytest.mark.parametrize("written", ["2e-4", "2.0e-4", "0.0002", "'2e-4'"])
def test_numbers_as_people_write_them(load: Load, written: str) -> None:
    assert load(f"{LEAST}train: {{learning_rate: {written}}}\n").recipe.train.learning_rate == 2e-4
    assert load(LEAST, f"train.learning_rate={written}").recipe.train.learning_rate == 2e-4


def test_numbers_inside_scheduler_arguments(load: Load) -> None:
    text = LEAST + "train: {lr_scheduler_type: cosine_with_min_lr, lr_scheduler_kwargs: {min_lr: 1e-5}}\n"
    assert load(text).recipe.train.lr_scheduler_kwargs == {"min_lr": 1e-5}


def test_yaml_reads_a_bare_no_and_off_as_false(load: Load) -> None:
    assert load(LEAST.replace("data: {", "data: {share_prefixes: off, ")).recipe.data.share_prefixes == "off"
    assert load(LEAST, "data.share_prefixes=off").recipe.data.share_prefixes == "off"
    train = load(LEAST + "train: {eval_strategy: no, save_strategy: no, report_to: none}\n").recipe.train
    assert (train.eval_strategy, train.save_strategy, train.report_to) == ("no", "no", "none")


@pytest.mark.parametrize("override", ["output=2024", "output=1e3", "output=no"])
def test_a_set_name_is_text_even_if_it_looks_like_something_else(load: Load, override: str) -> None:
    assert load(LEAST, override).recipe.output == override.partition("=")[2]


def test_a_byte_order_mark_and_dtypes_as_torch_names_them(load: Load) -> None:
    loaded = load(b"\xef\xbb\xbf" + LEAST.encode() + b"quant: {compute_dtype: bfloat16}\n")
    assert loaded.recipe.quant.compute_dtype == "bf16"


@pytest.mark.parametrize("asked", ["bf16", "fp16"])
def test_bf16_and_fp16_feed_the_compute_dtype(load: Load, asked: str) -> None:
    loaded = load(f"{LEAST}train: {{{asked}: true}}\n")
    assert loaded.recipe.quant.compute_dtype == asked
    assert loaded.origins["quant.compute_dtype"] == ("auto", f"train.{asked} is true")


def test_a_revision_in_the_model_is_split_off_for_hub_ids_only(
    load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load("model: org/name@1234567\ndata: {train: t.jsonl}\n")
    assert (loaded.recipe.model, loaded.recipe.revision) == ("org/name", "1234567")
    assert loaded.origins["revision"] == ("recipe", "line 1")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my@model").mkdir()
    recipe = load("model: my@model\ndata: {train: t.jsonl}\n").recipe
    assert (recipe.model, recipe.revision) == ("my@model", None)


@pytest.mark.parametrize("written", ["tensorboard", "[tensorboard]"])
def test_an_integration_that_is_installed(load: Load, monkeypatch: pytest.MonkeyPatch, written: str) -> None:
    asked: list[str] = []
    monkeypatch.setattr(
        "halfbyte.recipe.values.importlib.util.find_spec", lambda name: asked.append(name) or name == "tensorboardX"
    )
    assert load(f"{LEAST}train: {{report_to: {written}}}\n").recipe.train.report_to == ("tensorboard",)
    assert asked == ["tensorboard", "tensorboardX"]


# --- every field ----------------------------------------------------------------------------------------------------


def test_the_tests_know_every_leaf(load: Load) -> None:
    assert sorted([*OTHER, *FIXED]) == sorted(field for field, _ in leaves(load(LEAST).recipe))


@pytest.mark.parametrize("field", OTHER)
def test_another_value_is_taken_and_survives_writing_and_reading(load: Load, field: str) -> None:
    value, needs = OTHER[field]
    given = {"model": "m", "data.train": "t.jsonl", **needs}
    plain = load(yaml.safe_dump(nested(given))).recipe
    changed = load(yaml.safe_dump(nested({**given, field: value})))
    before, after = dict(leaves(plain)), dict(leaves(changed.recipe))
    assert before[field] != after[field]
    assert changed.origins[field].kind == "recipe"
    others = {"quant.compute_dtype", "data.format"} if field == "task" else {"quant.compute_dtype"}
    if field == "train.method":  # it says how rows are read, and its own fields have values
        others = {"data.format", "data.mask", "lora.lora_dropout", "train.learning_rate"}
        others |= {f"train.{name}" for name in METHODS["dpo"]}
    assert {name for name in before if before[name] != after[name]} <= {field, *others}
    again = load(to_yaml(changed.recipe))
    assert again.recipe == changed.recipe
    assert (
        load(to_yaml(again.recipe), f"{field}={yaml.safe_dump(value, default_flow_style=True)}").recipe == again.recipe
    )


@pytest.mark.parametrize("name", ["null", "true", "2e-4", "007", "a: b", "#x", "ü", "2024-01-01", "'", ""])
def test_names_that_yaml_could_misread_survive(load: Load, name: str) -> None:
    recipe = load(LEAST).recipe
    train = recipe.train.model_copy(update={"run_name": name})
    assert load(to_yaml(recipe.model_copy(update={"train": train}))).recipe.train.run_name == name


# --- mistakes: each with its exact text -------------------------------------------------------------------------------

MISTAKES: list[tuple[str, str]] = [
    ("lora: {r: 0}", "line 3: lora.r must be >= 1, got 0"),
    ("lora: {r: -3}", "line 3: lora.r must be >= 1, got -3"),
    ("lora: {r: 2.5}", "line 3: lora.r must be a whole number, got 2.5"),
    ("lora: {r: true}", "line 3: lora.r must be a number, got true"),
    ("lora:\n  r:", "line 4: lora.r must be a whole number, got null"),
    ("lora: {lora_alpha: x}", "line 3: lora.lora_alpha must be a whole number, got 'x'"),
    ("lora: {lora_dropout: 1}", "line 3: lora.lora_dropout must be < 1, got 1"),
    ("lora: {lora_dropout: .nan}", "line 3: lora.lora_dropout must be a finite number, got nan"),
    ("lora: {bias: some}", "line 3: lora.bias must be none, all or lora_only, got 'some'"),
    ("lora: {task_type: SEQ_CLS}", "line 3: lora.task_type must be CAUSAL_LM, got 'SEQ_CLS'"),
    ("lora: {use_dora: 1}", "line 3: lora.use_dora must be true or false, got 1"),
    ("lora: {target_modules: 'q_proj, v_proj'}", "line 3: lora.target_modules must be a list: write [q_proj, v_proj], got 'q_proj, v_proj'"),
    ("lora: {target_modules: '(q'}", "line 3: lora.target_modules must be a list of names or a regular expression (missing ), unterminated subpattern at position 0), got '(q'"),
    ("lora: {target_modules: []}", "line 3: lora.target_modules is empty, and so is lora.target_parameters: nothing would train; auto"),
    ("lora: {init_lora_weights: pissa_niter_4}", "line 3: lora.init_lora_weights cannot be 'pissa_niter_4': it starts from a decomposition of the base's weights and changes them; the frozen base stays as it is"),
    ("lora: {init_lora_weights: orthogonal}", "line 3: lora.init_lora_weights orthogonal needs quant.type none: PEFT makes it in the dtype of the base"),
    ("lora: {init_lora_weights: orthogonal, r: 7}\nquant: {type: none}", "line 3: lora.init_lora_weights orthogonal needs even ranks, got 7"),
    ("lora: {init_lora_weights: residual}\nquant: {type: none}", "line 3: lora.init_lora_weights residual is what quantising has lost, and with quant.type none or gguf, which auto may choose, nothing is"),
    ("lora: {init_lora_weights: residual, use_dora: true}", "line 3: lora.init_lora_weights residual and lora.use_dora: DoRA's magnitudes would be those of the base without it; use one of them"),
    ("lora: {init_lora_weights: residual, adapter: runs/a}", "line 3: lora.init_lora_weights residual and lora.adapter runs/a are two starts; give one of them"),
    ("lora: {init_lora_weights: loftq}", "line 3: lora.init_lora_weights cannot be 'loftq': PEFT's LoftQ needs a card and ignores lora_alpha; residual is one round of it, from the base's store"),
    ("lora: {init_lora_weights: other}", "line 3: lora.init_lora_weights must be true, false, gaussian, orthogonal or residual, got 'other'"),
    ("lora: {lora_bias: true, use_dora: true}", "line 3: lora.lora_bias and lora.use_dora cannot both be true"),
    ("lora: {lora_bias: true, init_lora_weights: gaussian}", "line 3: lora.lora_bias needs lora.init_lora_weights true or false, got gaussian"),
    ("lora: {layers_pattern: layers}", "line 3: lora.layers_pattern says where lora.layers_to_transform counts; give both or neither"),
    ("lora: {layers_to_transform: [0], target_modules: '.*q_proj'}", "line 3: lora.layers_to_transform is not read with a regular expression in lora.target_modules; give a list"),
    ("lora: {layer_replication: [[0, 4]]}", "line 3: lora.layer_replication is not supported: copied layers would share 4-bit weights that the memory plan counts once"),
    ("lora: {rank: 8}", "line 3: lora.rank is not a field; write lora.r"),
    ("lora: {lora_dropuot: 0.1}", "line 3: lora.lora_dropuot is not a field; did you mean lora.lora_dropout?"),
    ("lora: 5", "line 3: lora must be a section with fields of its own, got 5"),
    ("quant: {type: int4}", "line 3: quant.type must be nf4, fp4, int8, gguf, none or auto, got 'int4'"),
    (
        "quant: {type: int8, double_quant: true}",
        (
            "line 3: quant.double_quant cannot be set with quant.type int8, which has one scale for each row of a matrix; "
            "leave out what is for nf4 and fp4 (--set quant.double_quant=false)"
        ),
    ),
    (
        "quant:\n  type: int8\n  block_size: 64\n  double_quant: true",
        (
            "line 5: quant.block_size and quant.double_quant cannot be set with quant.type int8, which has one scale for "
            "each row of a matrix; leave out what is for nf4 and fp4 (--set quant.block_size=null quant.double_quant=false)"
        ),
    ),
    (
        "quant: {llm_int8_threshold: 6.0}",
        "line 3: quant.llm_int8_threshold is not read with quant.type nf4; it is for int8",
    ),
    ("quant: {type: int8, llm_int8_threshold: -1}", "line 3: quant.llm_int8_threshold must be >= 0, got -1"),
    ("quant: {load_in_8bit: true}", "line 3: quant.load_in_8bit is not a field; write quant.type: int8"),
    ("quant: {block_size: 128}", "line 3: quant.block_size must be 64, got 128"),
    ("quant: {load_in_4bit: true}", "line 3: quant.load_in_4bit is not a field; write quant.type: nf4"),
    ("train: {learning_rate: -1}", "line 3: train.learning_rate must be > 0, got -1"),
    ("train: {learning_rate: fast}", "line 3: train.learning_rate must be a number, got 'fast'"),
    ("train: {per_device_train_batch_size: 0}", "line 3: train.per_device_train_batch_size must be >= 1, got 0"),
    ("train: {max_steps: 0}", "line 3: train.max_steps must be -1 (by epochs) or >= 1, got 0"),
    ("train: {save_steps: 2.5}", "line 3: train.save_steps must be a whole number of steps, or a share of all steps below 1, got 2.5"),
    ("train: {seed: 5000000000}", "line 3: train.seed must be < 4294967296, got 5000000000"),
    ("train: {greater_is_better: true}", "line 3: train.greater_is_better true: loss (train.metric_for_best_model) is better when smaller"),
    ("train: {metric_for_best_model: exact_match}", "line 3: train.metric_for_best_model exact_match is not among eval.metrics, so no evaluation would have it"),
    ("train: {metric_for_best_model: rouge}", "line 3: train.metric_for_best_model must be one of loss, eval_loss, perplexity, eval_perplexity, exact_match, eval_exact_match, normalized_match, eval_normalized_match, number, eval_number, regex, eval_regex, json_valid, eval_json_valid, json_fields, eval_json_fields, choice, eval_choice, reward, eval_reward, got 'rouge'"),
    ("eval: {metrics: [rouge]}", "line 3: eval.metrics must be a list of exact_match, normalized_match, number, regex, json_valid, json_fields, choice (loss and perplexity are always among them), got [\"rouge\"]"),
    ("eval: {metrics: [regex]}", "line 3: eval.metrics has regex, which needs eval.pattern, a regular expression"),
    ("eval: {pattern: '('}", "line 3: eval.pattern must be a regular expression (missing ), unterminated subpattern at position 0), got '('"),
    ("eval: {choices: [a]}", 'line 3: eval.choices must be a list of two answers or more, got ["a"]'),
    ("eval: {choices: [yes, no]}", 'line 3: eval.choices must be a list of texts; YAML reads yes and no as true and false: write ["yes", "no"], got [true, false]'),
    ("train: {gradient_checkpointing: often}", "line 3: train.gradient_checkpointing must be auto, true, false or selective, got 'often'"),
    ("train: {max_tokens_per_micro_batch: 0}", "line 3: train.max_tokens_per_micro_batch must be auto, or a whole number >= 1, got 0"),
    ("train: {optim: adam}", "line 3: train.optim must be one of adamw_torch, adamw_torch_fused, adafactor, sgd, adagrad, rmsprop, adamw_bnb_8bit, adamw_8bit, paged_adamw_32bit, paged_adamw_8bit, lion_32bit, lion_8bit, paged_lion_32bit, paged_lion_8bit, ademamix, ademamix_8bit, rmsprop_bnb, rmsprop_bnb_8bit, rmsprop_bnb_32bit, got 'adam'"),
    ("train: {optim_args: momentum=0.9}", "line 3: train.optim_args: train.optim adamw_torch takes nothing, got momentum"),
    ("train: {optim: sgd, optim_args: fast}", "line 3: train.optim_args must be name=value,name=value, got 'fast'"),
    ("train: {lr_scheduler_type: greedy}", "line 3: train.lr_scheduler_type cannot be 'greedy': it follows the loss, and a schedule here is fixed before the first step"),
    ("train: {lr_scheduler_type: warmup_stable_decay}", "line 3: train.lr_scheduler_type warmup_stable_decay needs num_decay_steps in train.lr_scheduler_kwargs"),
    ("train: {lr_scheduler_kwargs: {num_cycles: 2}}", "line 3: train.lr_scheduler_kwargs: train.lr_scheduler_type linear takes nothing, got num_cycles"),
    ("train: {lr_scheduler_kwargs: 2}", "line 3: train.lr_scheduler_kwargs must be a mapping of names to values, such as {num_cycles: 2}, got 2"),
    ("train: {report_to: [kubeflow]}", "line 3: train.report_to names kubeflow, which is not installed: pip install kubeflow"),
    ("train: {report_to: [kubeflo]}", "line 3: train.report_to must be none, all, or a list of azure_ml, clearml, codecarbon, comet_ml, dagshub, dvclive, flyte, kubeflow, mlflow, neptune, swanlab, tensorboard, trackio, wandb, got [\"kubeflo\"]"),
    ("train: {report_to: [[wandb]]}", "line 3: train.report_to must be none, all, or a list of azure_ml, clearml, codecarbon, comet_ml, dagshub, dvclive, flyte, kubeflow, mlflow, neptune, swanlab, tensorboard, trackio, wandb, got [[\"wandb\"]]"),
    ("lora: {rank_pattern: [2024-01-01]}", "line 3: lora.rank_pattern must be a mapping, got [\"2024-01-01\"]"),
    ("train: {bf16: true, fp16: true}", "line 3: train.bf16 and train.fp16 cannot both be true; better give neither"),
    ("train: {bf16: true}\nquant: {compute_dtype: fp32}", "line 3: train.bf16 is true, but quant.compute_dtype is fp32; give one of them"),
    ("train: {eval_strategy: no, eval_steps: 5}", "line 3: train.eval_steps is not read with train.eval_strategy no; say steps"),
    ("train: {output_dir: x}", "line 3: train.output_dir is not supported: the run folder is the recipe's own `output:` (or --output)"),
    ("train: {fsdp: full_shard}", "line 3: train.fsdp is not supported: quant.placement: sharded shares the base out; the launcher says how many processes there are (docs/scale.md)"),
    ("train: {neftune_noise_alpha: 5}", "line 3: train.neftune_noise_alpha is not supported: its noise is scaled by the length of a row, and a micro-batch here holds several rows"),
    ("train: {warmup_ratio: 0.1}", "line 3: train.warmup_ratio is not a field; write train.warmup_steps, where a number below 1 is a share of all steps"),
    ("train: {group_by_length: true}", "line 3: train.group_by_length is not needed: micro-batches have no padding"),
    ("learning_rate: 1", "line 3: learning_rate is not a field; did you mean train.learning_rate?"),
    ("deepspeed: x", "line 3: deepspeed is not supported: quant.placement: sharded shares the base out; the launcher says how many processes there are (docs/scale.md)"),
    ("ouput: x", "line 3: ouput is not a field; did you mean output?"),
    ("output: ''", "line 3: output must not be empty"),
    ("output: 2024", "line 3: output must be text, got 2024"),
    ("revision: a\nrevision: b", "line 4: revision is given twice, first in line 3"),
    ("data: {eval: e}", "line 3: data is given twice, first in line 2"),
    ("1: x", "line 3: a key must be text, got 1"),
    ("? [a]\n: x", "line 3: a key must be text, got a list or mapping"),
    ("lora: &a {r: *a}", "line 3: lora.r holds itself"),
    ("revision: &a [*a]", "line 3: revision holds itself"),
    ("labels: [[&a {b: [*a]}]]", "line 3: labels holds itself"),
    ("train: {per_device_train_batch_size: 99999999999999999999999}", "line 3: train.per_device_train_batch_size must be <= 2147483648, got 99999999999999999999999"),
    ("train: {max_steps: 5000000000}", "line 3: train.max_steps must be <= 2147483648, got 5000000000"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), MISTAKES)
def test_a_mistake_is_told_word_for_word(load: Load, text: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(f"{LEAST}{text}\n")
    assert told(error) == [message]
    assert str(error.value).split(": ", 1)[0].endswith("r.yaml")
    assert error.value.exit_code == 2


WHOLE_FILES: list[tuple[str | bytes, str]] = [
    ("", "r.yaml is empty."),
    ("# only a comment\n", "r.yaml is empty."),
    ("- model: m\n", "r.yaml holds a list; a recipe is a mapping with the keys model, revision, task, labels, class_weight, vectors, quant, lora, data, train, eval, output, allow_pickle, trust_remote_code."),
    ("model\n", "r.yaml holds a single value; a recipe is a mapping with the keys model, revision, task, labels, class_weight, vectors, quant, lora, data, train, eval, output, allow_pickle, trust_remote_code."),
    ("model: m\n\tdata: x\n", "r.yaml: line 2, column 1: not YAML: found character '\\t' that cannot start any token."),
    ("model: [m\n", "r.yaml: line 2, column 1: not YAML: expected ',' or ']', but got '<stream end>'."),
    ("model: m\n---\nmodel: n\n", "r.yaml: line 2, column 1: not YAML: but found another document."),
    ("model: !!python/object:os.system x\n", "r.yaml: line 1, column 8: not YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/object:os.system'."),
    (b"\xff\xfem", "r.yaml is not UTF-8 text (byte 0)."),
    (b"model: \x00", "r.yaml: not YAML: unacceptable character #x0000: special characters are not allowed."),
    ("data: {train: t}\n", "r.yaml: model is required: hub id[@revision], local folder, .gguf file, or a packaged name"),
    ("model: m\n", "r.yaml: data is required: what is trained on"),
    ("model: m\ndata: {}\n", "r.yaml: data.train is required: the rows to train on: JSONL, JSON, CSV, Parquet, .txt or .md; a glob, hub:org/name?split=train, or a list of them and of {path, format, fields, mask, chat_template, name, weight, repeat, limit, replay}"),
    ("model: o/n@a\nrevision: b\ndata: {train: t}\n", "r.yaml: line 1: model o/n@a and revision b: give the revision once"),
    ("model: .\nrevision: b\ndata: {train: t}\n", "r.yaml: line 2: revision is for hub ids, and model . is a path that exists"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), WHOLE_FILES)
def test_a_file_that_is_no_recipe(load: Load, tmp_path: Path, text: str | bytes, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(text)
    assert str(error.value).splitlines()[0].removeprefix(f"{tmp_path}/") == message


SETS: list[tuple[str, str]] = [
    ("lora.r=0", "--set lora.r must be >= 1, got 0"),
    ("lora.rank=8", "--set lora.rank is not a field; write lora.r"),
    ("lora.r.x=3", "--set lora.r must be a whole number, got {\"x\": 3}"),
    ("train.learnin_rate=1", "--set train.learnin_rate is not a field; did you mean train.learning_rate?"),
    ("lora.r", "--set lora.r: must be FIELD=VALUE, such as lora.r=32"),
    ("=3", "--set =3: must be FIELD=VALUE, such as lora.r=32"),
    ("model.x=3", "--set model.x=3: model.x is inside a value that is not a section"),
    ("lora.r=&a [*a]", "--set lora.r must be a whole number, got '&a [*a]'"),
    ("output=", "--set output must be text, got null"),
    ("nonsense=1", "--set nonsense is not a field; a recipe has model, revision, task, labels, class_weight, vectors, quant, lora, data, train, eval, output, allow_pickle, trust_remote_code"),
    ("train.optim=[", "--set train.optim must be one of adamw_torch, adamw_torch_fused, adafactor, sgd, adagrad, rmsprop, adamw_bnb_8bit, adamw_8bit, paged_adamw_32bit, paged_adamw_8bit, lion_32bit, lion_8bit, paged_lion_32bit, paged_lion_8bit, ademamix, ademamix_8bit, rmsprop_bnb, rmsprop_bnb_8bit, rmsprop_bnb_32bit, got '['"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "message"), SETS)
def test_a_mistake_in_a_set(load: Load, override: str, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(LEAST, override)
    assert told(error) == [message]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("eval_strategy: epoch", "eval_strategy epoch"),
        ("eval_on_start: true", "eval_on_start true"),
        ("early_stopping_patience: 2", "early_stopping_patience 2"),
    ],
)
def test_evaluations_need_rows_that_are_held_out(load: Load, text: str, name: str) -> None:
    load(LEAST + f"train: {{{text}}}\n")
    with pytest.raises(RecipeError) as error:
        load(LEAST + f"train: {{{text}}}\n", "data.eval=none")
    assert told(error) == [
        f"line 3: train.{name} asks for evaluations, but data.eval is none; data.eval: 5% holds rows out for them"
    ]
    assert list(load(LEAST + "train: {eval_steps: 3}\n", "data.eval=null").warnings) == [
        "train.eval_steps is not read with data.eval none"
    ]


def test_every_problem_is_told_at_once(load: Load) -> None:
    text = LEAST + "lora: {r: 0, rank: 8}\ntrain: {learning_rate: 0, bf16: true, fp16: true, eval_strategy: steps}\n"
    with pytest.raises(RecipeError) as error:
        load(text, "lora.bias=x", "data.eval=none", "quant")
    assert sorted(told(error)) == sorted(
        [
            "line 3: lora.r must be >= 1, got 0",
            "line 3: lora.rank is not a field; write lora.r",
            "line 4: train.learning_rate must be > 0, got 0",
            "line 4: train.bf16 and train.fp16 cannot both be true; better give neither",
            "line 4: train.eval_strategy steps asks for evaluations, but data.eval is none; data.eval: 5% holds rows out for them",
            "--set lora.bias must be none, all or lora_only, got 'x'",
            "--set quant: must be FIELD=VALUE, such as lora.r=32",
        ]
    )
    assert str(error.value).splitlines()[0].endswith("r.yaml: 7 problems")


def test_a_contradiction_with_a_bad_field_is_not_told_of_its_default(load: Load) -> None:
    """`data` is broken, so nothing can be said of what is missing in it."""
    with pytest.raises(RecipeError) as error:
        load("model: m\ndata: 5\ntrain: {eval_strategy: epoch}\n")
    assert told(error) == ["line 2: data must be a section with fields of its own, got 5"]


def test_a_missing_file_names_its_neighbour(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(LEAST)
    with pytest.raises(RecipeError, match=r"there is no recipe .*recpie\.yaml; did you mean .*recipe\.yaml\?"):
        load_recipe(tmp_path / "recpie.yaml")
    with pytest.raises(RecipeError, match="cannot be read: Is a directory"):
        load_recipe(tmp_path)
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(Path("a\0b.yaml"))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (
            {"format": "messages"},
            "data.packing stream is for plain text, and data.format is messages; say rows, or format: text",
        ),
        ({"mask": "assistant"}, "data.packing stream is for plain text, in which no assistant speaks; data.mask: all"),
        (
            {"overlong": "skip"},
            "data.overlong skip is not read with data.packing stream: long texts are cut into blocks",
        ),
    ],
)
def test_what_blocks_of_text_exclude(data: dict[str, str], said: str) -> None:
    with pytest.raises(ValidationError) as error:
        Recipe.model_validate({"model": "m", "data": {"train": "t", "packing": "stream", **data}})
    (told,) = error.value.errors()[0]["ctx"]["problems"]
    assert told == said


def test_contradictions_hold_without_a_file_too() -> None:
    with pytest.raises(ValidationError, match="exclude each other"):
        Recipe.model_validate({"model": "m", "data": {"train": "t"}, "train": {"bf16": True, "fp16": True}})


@pytest.mark.parametrize(
    ("train", "overrides", "expected"),
    [
        ("eval_steps: 5", ["train.eval_strategy=no"], ("no", None)),
        ("eval_steps: 5", ["train.eval_strategy=epoch"], ("epoch", None)),
        ("eval_steps: 5", ["train.eval_strategy=steps"], ("steps", 5)),
        ("eval_strategy: epoch", ["train.eval_steps=3"], ("auto", 3)),
        ("eval_strategy: steps", ["train.eval_steps=3"], ("steps", 3)),
        ("eval_strategy: epoch", ["train={eval_steps: 3}"], ("auto", 3)),
    ],
)
def test_of_when_to_evaluate_the_command_line_is_stronger(
    load: Load, train: str, overrides: list[str], expected: tuple[str, float | None]
) -> None:
    loaded = load(f"{LEAST}train: {{{train}}}\n", "data.eval=e.jsonl", *overrides)
    assert (loaded.recipe.train.eval_strategy, loaded.recipe.train.eval_steps) == expected


def test_why_a_weaker_value_is_not_the_recipes_is_told(load: Load) -> None:
    loaded = load(LEAST + "train: {eval_steps: 5}\n", "data.eval=e.jsonl", "train.eval_strategy=no")
    why = "--set train.eval_strategy is stronger than the recipe's"
    assert loaded.origins["train.eval_steps"] == ("auto", why)


def test_two_that_the_command_line_contradicts_are_refused(load: Load) -> None:
    with pytest.raises(RecipeError, match=r"train\.eval_steps is not read with train\.eval_strategy no"):
        load(LEAST, "train.eval_strategy=no", "train.eval_steps=5")


# --- warnings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", []),
        ("lora: {r: 8, lora_alpha: 16, lora_dropout: 0.1}", []),
        ("lora: {r: 64, lora_alpha: 128}", []),
        ("lora: {r: 4, lora_alpha: 8}", ["lora.r 4 is outside the usual 8 to 64"]),
        ("lora: {r: 128, lora_alpha: 256}", ["lora.r 128 is outside the usual 8 to 64"]),
        ("lora: {lora_alpha: 16}", ["lora.lora_alpha 16 is not the usual 2 x r = 32"]),
        ("lora: {lora_alpha: 16, use_rslora: true}", []),
        ("lora: {r: 8}", []),  # and alpha is 32, as everywhere where none is given
        ("lora: {lora_dropout: 0}", []),
        ("lora: {lora_dropout: 0.01}", ["lora.lora_dropout 0.01 is outside the usual 0.05 to 0.1"]),
        ("lora: {lora_dropout: 0.2}", ["lora.lora_dropout 0.2 is outside the usual 0.05 to 0.1"]),
        ("train: {learning_rate: 1}", ["train.learning_rate 1 is outside the usual 1e-05 to 0.003"]),
        ("train: {learning_rate: 2.0e-6}", ["train.learning_rate 2e-06 is outside the usual 1e-05 to 0.003"]),
        ("train: {learning_rate: 1, optim: sgd}", []),
        ("train: {max_steps: 5, num_train_epochs: 1}", ["train.num_train_epochs is not read with max_steps 5"]),
        (
            "train: {lr_scheduler_type: constant, warmup_steps: 3}",
            ["train.warmup_steps is not read with lr_scheduler_type constant"],
        ),
        ("train: {save_strategy: epoch, save_steps: 3}", ["train.save_steps is not read with save_strategy epoch"]),
        ("train: {eval_steps: 3}", []),
        ("train: {run_name: a}", ["train.run_name is not read with report_to none"]),
        ("train: {optim: sgd, adam_beta1: 0.5}", ["train.adam_beta1 is not read with optim sgd"]),
    ],
)
def test_unusual_and_unread_values_warn(load: Load, text: str, said: list[str]) -> None:
    loaded = load(f"{LEAST}{text}\n")
    assert list(loaded.warnings) == said
    assert list(load(to_yaml(loaded.recipe)).warnings) == said, "a resolved recipe must not warn of its own defaults"


def test_whole_steps_are_written_as_whole_numbers(load: Load) -> None:
    text = to_yaml(load(f"{LEAST}train: {{save_steps: 2, eval_steps: 0.25}}\n").recipe)
    assert "save_steps: 2\n" in text and "eval_steps: 0.25\n" in text and "warmup_steps: 0\n" in text


# --- without a recipe, and the first one ----------------------------------------------------------------------------


def test_a_recipe_from_a_model_and_a_file() -> None:
    loaded = recipe_from("org/Model-1B@main", "rows/train.jsonl", ["lora.r=8"])
    assert (loaded.recipe.model, loaded.recipe.revision) == ("org/Model-1B", "main")
    assert (loaded.recipe.data.train, loaded.recipe.output) == ("rows/train.jsonl", "runs/Model-1B-train")
    kinds = {name: loaded.origins[name].kind for name in ("model", "data.train", "lora.r", "lora.bias")}
    assert kinds == {"model": "command", "data.train": "command", "lora.r": "set", "lora.bias": "default"}
    assert loaded.path is None


def test_a_set_output_wins_over_the_name_that_was_made() -> None:
    loaded = recipe_from("smollm2-135m", "t.jsonl", ["output=runs/mine"])
    assert (loaded.recipe.output, loaded.origins["output"].kind) == ("runs/mine", "set")


@pytest.mark.parametrize("model", ["smollm2-135m", "org/name@rev", "a folder: with #", "no"])
def test_the_first_recipe_loads_with_defaults_and_without_warnings(load: Load, model: str) -> None:
    loaded = load(init_template(model, "rows #1.jsonl", {}, ()))
    given = {"model", "revision", "data", "output"}
    plain = load(LEAST).recipe
    assert loaded.warnings == ()
    assert loaded.recipe.model_dump(exclude=given) == plain.model_dump(exclude=given)
    assert loaded.recipe.data == plain.data.model_copy(update={"train": "rows #1.jsonl"})


def test_what_the_first_recipe_has_commented_out_loads_too(load: Load) -> None:
    text = init_template("m", "t.jsonl", {}, ())
    lines = [re.sub(r"^  # (\w+: )", r"  \1", line) for line in text.splitlines()]
    assert lines != text.splitlines()
    recipe = load("\n".join(lines)).recipe
    assert recipe.data.eval == "test.jsonl" and recipe.data.fields.prompt == "question"


def test_importing_the_recipe_is_light() -> None:
    code = (
        "import sys, halfbyte.recipe.file; "
        "print(sorted({'torch', 'transformers', 'peft', 'numpy', 'bitsandbytes'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_rows_that_lie_beside_the_recipe_are_found_from_elsewhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there from here comes first; a `--set` is always meant from here."""
    (tmp_path / "there").mkdir()
    for name in ("train.jsonl", "test.jsonl", "both.jsonl"):
        (tmp_path / "there" / name).touch()
    (tmp_path / "both.jsonl").touch()
    recipe = tmp_path / "there" / "r.yaml"
    recipe.write_text("model: m\ndata: {train: [tr*.jsonl, both.jsonl], eval: test.jsonl}\noutput: run\n")
    monkeypatch.chdir(tmp_path)
    data = load_recipe(Path("there/r.yaml")).recipe.data
    assert [str(name) for name in data.train] == ["there/tr*.jsonl", "both.jsonl"]
    assert str(data.eval) == "there/test.jsonl"
    assert str(load_recipe(Path("there/r.yaml"), ["data.eval=test.jsonl"]).recipe.data.eval) == "test.jsonl"
    monkeypatch.chdir(tmp_path / "there")
    assert str(load_recipe(Path("r.yaml")).recipe.data.eval) == "test.jsonl"


ENTRY = "{path: b.jsonl, fields: {prompt: question, completion: answer}, mask: all}"


def test_files_that_are_read_each_in_its_own_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there").mkdir()
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / "there" / name).touch()
    recipe = tmp_path / "there" / "r.yaml"
    recipe.write_text(f"model: m\ndata: {{train: [a.jsonl, {ENTRY}], eval: [{{path: a.jsonl, mask: all}}], mask: assistant}}\n"
                      "output: run\n")  # fmt: skip
    monkeypatch.chdir(tmp_path)
    data = load_recipe(recipe).recipe.data
    first, second = data.train
    assert str(first) == str(tmp_path / "there" / "a.jsonl") and isinstance(second, DataEntry)
    assert second.path == str(tmp_path / "there" / "b.jsonl")
    assert (data.of(second).fields.prompt, data.of(second).mask, data.of(second).format) == ("question", "all", "auto")
    assert data.of(None) == data and data.eval_names == (
        DataEntry(path=str(tmp_path / "there" / "a.jsonl"), mask="all"),
    )
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(load_recipe(recipe).recipe))
    assert load_recipe(again).recipe == load_recipe(recipe).recipe and "null" not in again.read_text()
    set_ = load_recipe(recipe, [f"data.train=[{ENTRY}]"])
    assert set_.recipe.data.train == (DataEntry.model_validate(yaml.safe_load(ENTRY)),)


@pytest.mark.parametrize(
    ("entry", "wrong"),
    [
        ("{path: b.jsonl, field: {}}", "entry 2: field: is not a field; did you mean fields?"),
        ("{fields: {prompt: q}}", "entry 2: path: Field required"),
        ("{path: b.jsonl, mask: some}", "entry 2: mask: Input should be 'completion', 'assistant' or 'all'"),
        (
            "3",
            "must be the name of a file, a glob, a hub: dataset, or a list of them and of {path: FILE, fields: {...}}",
        ),
    ],
)
def test_an_entry_that_is_wrong(load: Load, entry: str, wrong: str) -> None:
    with pytest.raises(RecipeError) as error:
        load(f"model: m\ndata: {{train: [a.jsonl, {entry}]}}\noutput: o\n")
    assert f"line 2: data.train {wrong}" in str(error.value)


def test_a_name_longer_than_a_path_may_be_is_only_a_name(load: Load) -> None:
    loaded = load("model: m\ndata: {train: " + "x" * 5000 + "}\noutput: o\n")
    assert str(loaded.recipe.data.train).endswith("x" * 5000)


def test_a_run_of_an_older_version_opens_whatever_the_defaults_of_other_tasks_were(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\ndata: {train: t.jsonl}\nvectors: {pooling: lasttoken}\n")
    assert load_recipe(path, of_run=True).recipe.vectors == recipe_from("m", "t.jsonl").recipe.vectors
    with pytest.raises(RecipeError, match="are for task embed"):
        load_recipe(path)
