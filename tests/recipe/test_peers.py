"""`halfbyte import`: configs of four tools become recipes, and every field of them is accounted for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from halfbyte.errors import RecipeError
from halfbyte.recipe import peers
from halfbyte.recipe.file import load_recipe
from halfbyte.recipe.schema import Recipe
from tests.in_process import Cli, runner


@pytest.fixture
def halfbyte(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Cli:
    return runner(tmp_path, capsys)


AXOLOTL = """
base_model: org/base
adapter: qlora
load_in_4bit: true
datasets:
  - path: rows.jsonl
    type: chat_template
    field_messages: talk
    message_property_mappings: {role: from, content: value}
    roles_to_train: [assistant]
  - {path: org/rows, type: alpaca, split: "train[:5%]", name: part}
val_set_size: 0.05
sequence_len: 2048
sample_packing: true
train_on_inputs: false
lora_r: 32
lora_alpha: 16
lora_dropout: 0
lora_target_modules: [q_proj, self_attn.v_proj]
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 3
optimizer: adamw_bnb_8bit
lr_scheduler: cosine
learning_rate: 0.0002
warmup_ratio: 0.1
bf16: auto
flash_attention: true
wandb_project:
special_tokens: {pad_token: <pad>}
chat_template_kwargs: {enable_thinking: false}
neftune_noise_alpha: 5
some_new_thing: 3
some_other_thing: false
"""
FACTORY = """
model_name_or_path: org/base
stage: sft
finetuning_type: lora
lora_rank: 8
lora_target: q_proj,v_proj
quantization_bit: 4
dataset: mine,theirs,unknown
dataset_dir: sets
mix_strategy: interleave_under
interleave_probs: 0.7,0.2,0.1
template: qwen3
cutoff_len: 1024
max_samples: 500
output_dir: saves/x
logging_steps: 10
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
ddp_timeout: 1800
"""
INFO = {
    "mine": {"file_name": "mine.json", "columns": {"prompt": "q", "response": "a"}},
    "theirs": {
        "hf_hub_url": "org/theirs", "formatting": "sharegpt", "columns": {"messages": "talk"},
        "tags": {"role_tag": "role", "content_tag": "content", "user_tag": "user"},
    },
}  # fmt: skip
MLX = """
model: org/base-4bit
train: true
fine_tune_type: dora
data: DATA
num_layers: 16
batch_size: 2
iters: 600
learning_rate: 1e-5
steps_per_report: 10
adapter_path: adapters
max_seq_length: 512
mask_prompt: true
lora_parameters: {keys: [self_attn.q_proj], rank: 4, scale: 20.0, dropout: 0.0}
lr_schedule: {name: cosine_decay, warmup: 100, arguments: [1e-5, 1000, 1e-7]}
"""
SCRIPT = """
from unsloth import FastLanguageModel
length = 2048
model, tokenizer = FastLanguageModel.from_pretrained(
    model_name="org/base", max_seq_length=length, load_in_4bit=True, dtype=None, token=secret())
tokenizer = AutoTokenizer.from_pretrained("other")
model = FastLanguageModel.get_peft_model(model, r=16, target_modules=["q_proj", "v_proj"], lora_alpha=16,
    lora_dropout=0, use_gradient_checkpointing="unsloth", random_state=3407, loftq_config=None)
dataset = load_dataset("json", data_files="rows.jsonl", split="train")
trainer = SFTTrainer(model=model, train_dataset=dataset, packing=False, args=SFTConfig(
    per_device_train_batch_size=2, gradient_accumulation_steps=4, warmup_steps=5, max_steps=60, learning_rate=2e-4,
    optim="adamw_8bit", output_dir="out", fp16=not bf16_here()))
"""


def imported(folder: Path, name: str, text: str) -> tuple[peers.ImportedConfig, Recipe]:
    path = folder / name
    path.write_text(text)
    config = peers.read(path)
    (folder / "recipe.yaml").write_text(config.recipe(name))
    return config, load_recipe(folder / "recipe.yaml").recipe


def kinds(config: peers.ImportedConfig) -> dict[str, str]:
    return {item.name: item.kind for item in config.items}


def test_axolotl(tmp_path: Path) -> None:
    config, recipe = imported(tmp_path, "config.yml", AXOLOTL)
    assert (config.tool, recipe.model, recipe.quant.type) == ("axolotl", "org/base", "nf4")
    train, data = recipe.train, recipe.data
    assert (train.per_device_train_batch_size, train.num_train_epochs, train.warmup_steps) == (2, 3, 0.1)
    assert (train.optim, train.lr_scheduler_type, recipe.lora.target_modules) == (
        "adamw_bnb_8bit", "cosine", ("q_proj", "v_proj"),
    )  # fmt: skip
    assert (data.eval, data.max_length, data.overlong, data.template_args) == (
        "5%", 2048, "skip", {"enable_thinking": False},
    )  # fmt: skip
    first, second = map(dict, data.train)  # type: ignore[arg-type]
    assert (first["mask"], first["fields"].messages, first["fields"].role) == ("assistant", "talk", "from")
    assert (second["path"], second["format"]) == ("hub:org/rows?split=train&name=part", "alpaca")
    found = kinds(config)
    assert {*yaml.safe_load(AXOLOTL)} - {"special_tokens"} <= found.keys()
    assert found["some_new_thing"] == found["neftune_noise_alpha"] == "refused"
    assert found["datasets[0].roles_to_train"] == "noted"
    assert found["some_other_thing"] == found["flash_attention"] == found["wandb_project"] == "noted"
    assert "# not taken over: some_new_thing: halfbyte knows no counterpart" in config.recipe("config.yml")


def test_llama_factory(tmp_path: Path) -> None:
    (tmp_path / "sets").mkdir()
    (tmp_path / "sets" / "dataset_info.json").write_text(json.dumps(INFO))
    config, recipe = imported(tmp_path, "sft.yaml", FACTORY)
    assert (config.tool, recipe.quant.type, recipe.data.mask, recipe.data.max_length) == (
        "llamafactory", "nf4", "assistant", 1024,
    )  # fmt: skip
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.train.per_device_train_batch_size) == (8, 16, 8)
    mine, theirs, unknown = recipe.data.sources
    assert [s.weight for s in (mine, theirs, unknown)] == [0.7, 0.2, 0.1] and mine.limit == 500
    assert mine.fields is not None and (mine.fields.instruction, mine.fields.output) == ("q", "a")
    assert theirs.path == "hub:org/theirs?split=train" and theirs.format == "sharegpt"
    found = kinds(config)
    assert found["dataset unknown"] == found["dataset[1].user_tag"] == "refused"
    assert {*yaml.safe_load(FACTORY)} <= found.keys() and found["lora.lora_dropout"] == "default"


def test_mlx_lm(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    config, recipe = imported(tmp_path, "lora.yaml", MLX.replace("DATA", str(tmp_path / "rows")))
    assert (config.tool, recipe.data.train) == ("mlx-lm", str(tmp_path / "rows" / "train.jsonl"))
    assert (recipe.lora.lora_alpha, recipe.train.max_steps, recipe.train.lr_scheduler_type) == (80, 600, "cosine")
    assert (recipe.data.mask, recipe.train.learning_rate, recipe.lora.target_modules) == (
        "assistant", 1e-5, ("q_proj",),
    )  # fmt: skip
    assert kinds(config)["num_layers"] == kinds(config)["lr_schedule.arguments"] == "refused"


@pytest.mark.parametrize("notebook", [False, True])
def test_a_script_or_a_notebook_is_read_and_not_run(tmp_path: Path, notebook: bool) -> None:
    text, name = SCRIPT, "train.py"
    if notebook:
        cells = [{"cell_type": "markdown", "source": ["("]}, {"cell_type": "code", "source": ["%%capture\n", "!pip x"]},
                 {"cell_type": "code", "source": SCRIPT.splitlines(keepends=True)}]  # fmt: skip
        text, name = json.dumps({"cells": cells}), "train.ipynb"
    config, recipe = imported(tmp_path, name, text)
    assert (config.tool, recipe.model, recipe.quant.type, recipe.data.train) == ("trl", "org/base", "nf4", "rows.jsonl")
    assert (recipe.data.max_length, recipe.train.seed, recipe.train.optim) == (2048, 3407, "adamw_8bit")
    assert recipe.train.gradient_checkpointing is True and recipe.lora.lora_alpha == 16
    assert kinds(config)["fp16"] == kinds(config)["token"] == "noted"


TRL = """
trainer = SFTTrainer({model}"org/base", train_dataset=load_dataset("json", data_files="rows.jsonl", split="train"),
    args=SFTConfig(output_dir="o"), peft_config=LoraConfig())
"""
UNSLOTH = """
m, t = FastLanguageModel.from_pretrained("org/base")
m = FastLanguageModel.get_peft_model(m)
SFTTrainer(model=m, train_dataset=load_dataset("json", data_files="rows.jsonl"))
"""
CLASSIC = {"learning_rate": 2e-5, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
SHORT_SCRIPTS: list[Any] = [
    (TRL.format(model="model="), CLASSIC, {"r": 8, "lora_alpha": 8, "lora_dropout": 0.0}),
    (TRL.format(model=""), CLASSIC, {"r": 8}),
    (TRL.format(model="").replace("SFTConfig(", "TrainingArguments("), CLASSIC | {"learning_rate": 5e-5}, {"r": 8}),
    (TRL.format(model="").replace("SFT", "DPO"), CLASSIC | {"learning_rate": 1e-6, "method": "dpo"}, {"r": 8}),
    (TRL.format(model="").replace("SFTConfig(", "SFTConfig(learning_rate=3e-4, ").replace("Config()", "Config(r=32)"),
     CLASSIC | {"learning_rate": 3e-4}, {"r": 32, "lora_alpha": 8}),
    (UNSLOTH, CLASSIC, {"r": 16, "lora_alpha": 16, "lora_dropout": 0.0, "target_modules": "all-linear"}),
]  # fmt: skip


@pytest.mark.parametrize(("text", "train", "lora"), SHORT_SCRIPTS)
def test_what_a_script_leaves_to_its_library_is_that_librarys(
    tmp_path: Path, text: str, train: dict[str, Any], lora: dict[str, Any]
) -> None:
    """Of TRL 1.16 and PEFT 0.21, of Unsloth 2026.10: read from their configs and signatures."""
    config, recipe = imported(tmp_path, "t.py", text)
    assert {name: getattr(recipe.train, name) for name in train} == train
    assert {name: getattr(recipe.lora, name) for name in lora} == lora
    assert (recipe.model, recipe.data.train) == ("org/base", "rows.jsonl")
    unsloth = "FastLanguageModel" in text
    assert (recipe.quant.type, recipe.data.max_length) == (("nf4", 2048) if unsloth else ("none", 1024))
    told = {item.name for item in config.items if item.kind in ("default", "translated")}
    assert {"train.learning_rate", "data.max_length", "lora.lora_alpha"} <= told or "learning_rate" in told


@pytest.mark.parametrize(("row", "mask"), [({"prompt": "a", "completion": "b"}, "completion"), ({"text": "a"}, "all")])
def test_trl_learns_the_completions_alone(tmp_path: Path, halfbyte: Cli, row: dict[str, str], mask: str) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "t.py").write_text(TRL.format(model="").replace("rows.jsonl", str(tmp_path / "rows.jsonl")))
    ended = halfbyte("import", str(tmp_path / "t.py"), "--out", str(tmp_path / "r.yaml"))
    assert ended.code == 0 and f"{mask}, as trl does it" in ended.out and "put in" not in ended.out, ended
    assert f"mask: {mask}" in (tmp_path / "r.yaml").read_text()
    (tmp_path / "t.py").write_text(SCRIPT.replace("SFTTrainer", "GRPOTrainer"))
    ended = halfbyte("import", str(tmp_path / "t.py"), "--out", str(tmp_path / "g.yaml"))
    assert "next: put in train.rewards   then   halfbyte data check" in ended.out


def preference(rl: str, more: str = "") -> str:
    rows = "datasets:\n  - {path: org/pairs, type: chatml.argilla, split: train}\n"
    head, tail = AXOLOTL.index("datasets:"), AXOLOTL.index("val_set_size")
    return AXOLOTL[:head] + rows + AXOLOTL[tail:] + f"rl: {rl}\n{more}"


DPO = FACTORY.replace("stage: sft", "stage: dpo")
PREFERENCES: list[Any] = [
    ("c.yml", preference("dpo", "rl_beta: 0.2\ndpo_label_smoothing: 0.1\n"), "dpo",
     {"beta": 0.2, "label_smoothing": 0.1}),
    ("c.yml", preference("orpo", "orpo_alpha: 0.3\n"), "orpo", {"beta": 0.3}),
    ("c.yml", preference("kto", "kto_desirable_weight: 0.2\n"), "kto", {"desirable_weight": 0.2}),
    ("c.yml", preference("simpo", "simpo_gamma: 0.4\n"), "simpo", {"simpo_gamma": 0.4}),
    ("c.yml", preference("ipo"), "ipo", {}),
    ("c.yaml", DPO + "pref_beta: 0.3\npref_loss: hinge\npref_ftx: 0.5\n", "dpo",
     {"beta": 0.3, "loss_type": "hinge", "rpo_alpha": 0.5}),
    ("c.yaml", DPO + "pref_loss: simpo\nsimpo_gamma: 0.7\n", "simpo",
     {"simpo_gamma": 0.7}),
    ("c.yaml", FACTORY.replace("stage: sft", "stage: kto") + "kto_chosen_weight: 0.9\n", "kto",
     {"desirable_weight": 0.9}),
    ("t.py", SCRIPT.replace("SFTTrainer", "DPOTrainer").replace("SFTConfig(", "DPOConfig(beta=0.05, loss_type='ipo', "),
     "dpo", {"beta": 0.05, "loss_type": "ipo"}),
    ("t.py", SCRIPT.replace("SFTTrainer", "CPOTrainer").replace("SFTConfig(", "CPOConfig(loss_type='simpo', "),
     "simpo", {}),
    ("t.py", SCRIPT.replace("SFTTrainer", "GRPOTrainer").replace("SFTConfig(", "GRPOConfig(num_generations=6, "),
     "grpo", {"num_generations": 6, "per_device_train_batch_size": 6}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "text", "method", "fields"), PREFERENCES)
def test_preferences_and_rewards_are_imported(
    tmp_path: Path, name: str, text: str, method: str, fields: dict[str, Any]
) -> None:
    """Nothing of the method is refused but what it does not read; other values are as without it."""
    config, recipe = imported(tmp_path, name, text)
    train = recipe.train
    assert (train.method, recipe.lora.r) == (method, {"c.yml": 32, "c.yaml": 8, "t.py": 16}[name])
    assert {field: getattr(train, field) for field in fields} == fields
    refused = {i.name: i.text for i in config.items if i.kind == "refused"}
    assert not {*refused} & {"rl", "stage", "method", "rl_beta", "pref_beta", "pref_loss", "beta", "loss_type"}, refused
    assert recipe.data.mask == ("completion" if method == "grpo" else "assistant")
    assert all(not isinstance(s, dict) for s in recipe.data.sources)
    if name == "c.yml" and method == "dpo":
        (entry,) = recipe.data.train
        read = entry.fields  # type: ignore[union-attr]
        assert (read.prompt, read.chosen, read.rejected) == ("instruction", "chosen_response", "rejected_response")
    if method == "grpo":
        assert next(iter(train.rewards or {})).endswith("rewards.py:reward") and "train.rewards" in refused
        assert recipe.lora.lora_dropout == 0


def test_a_head_is_imported(tmp_path: Path) -> None:
    script = """
from transformers import AutoModelForSequenceClassification, TrainingArguments
names = {0: "bad", 1: "good"}
model = AutoModelForSequenceClassification.from_pretrained("org/base", num_labels=2, id2label=names)
peft_config = LoraConfig(task_type=TaskType.SEQ_CLS, r=4)
dataset = load_dataset("csv", data_files="rows.csv", split="train")
args = TrainingArguments(per_device_train_batch_size=3, learning_rate=1e-4, output_dir="out")
"""
    config, recipe = imported(tmp_path, "train.py", script)
    assert (recipe.task, recipe.labels, recipe.lora.r) == ("classify", ("bad", "good"), 4)
    assert recipe.data.format == "labels" and recipe.train.per_device_train_batch_size == 3
    assert not [item for item in config.items if item.kind == "refused"]


STOPS: list[Any] = [
    ("rl: gdpo", AXOLOTL + "rl: gdpo\n"),
    ("stage: ppo", FACTORY.replace("stage: sft", "stage: ppo")),
    ("pref_loss: kto_pair", DPO + "pref_loss: kto_pair\n"),
    ("reward_model: true", AXOLOTL + "reward_model: true\n"),
    ("finetuning_type: full", FACTORY.replace("finetuning_type: lora", "finetuning_type: full")),
    ("processor_type", AXOLOTL + "processor_type: AutoProcessor\n"),
    ("fine_tune_type: full", MLX.replace("dora", "full")),
]


@pytest.mark.parametrize(("what", "text"), STOPS)
def test_another_training_is_not_imported(tmp_path: Path, halfbyte: Cli, what: str, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    ended = halfbyte("import", str(tmp_path / "c.yaml"), "--out", str(tmp_path / "recipe.yaml"))
    assert ended.code == 2 and what.split(":")[0] in ended.err and "does not train" in ended.err
    assert not (tmp_path / "recipe.yaml").exists()


@pytest.mark.parametrize("text", ["", "[1]", "a: b\n", "a: [", "model: x\ndata: {train: y}\n"])
def test_what_is_no_config_is_said(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(RecipeError, match=r"cannot be read|is no config of Axolotl"):
        peers.read(tmp_path / "c.yaml")


def test_rows_in_the_place_of_a_config_are_told_where_they_belong(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    with pytest.raises(RecipeError, match=r"rows\.jsonl:2 cannot be read: .*\n  fix: .*halfbyte train MODEL ROWS"):
        peers.read(tmp_path / "rows.jsonl")


def test_the_command_writes_a_recipe_once(tmp_path: Path, halfbyte: Cli) -> None:
    (tmp_path / "c.yml").write_text(AXOLOTL)
    line = ("import", str(tmp_path / "c.yml"), "--out", str(tmp_path / "recipe.yaml"))
    ended = halfbyte(*line)
    assert ended.code == 0 and "wrote" in ended.out and "some_new_thing" in ended.out
    again = halfbyte(*line, "--json")
    assert again.code == 2 and "name another file: --out NAME.yaml" in again.out + again.err


def test_every_rule_names_a_field_of_a_recipe() -> None:
    from halfbyte.recipe.schema import SECTIONS

    known = {f"{section}.{name}".lstrip(".") for section, model in SECTIONS.items() for name in model.model_fields}
    tables = yaml.safe_load((Path(peers.__file__).parent / "peers.yaml").read_text())
    for tool, table in tables.items():
        rules = table if tool == "common" else table["fields"]
        for names, rule in rules.items():
            target, how = rule if isinstance(rule, list) else (rule, None)
            assert target in {*known, "note", "refuse", "stop"}, names
            assert not isinstance(how, str) or target in ("note", "refuse", "stop") or how in peers.CHANGES, names
        assert {*table.get("defaults", {})} <= known
