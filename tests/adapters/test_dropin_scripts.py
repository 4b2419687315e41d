"""Scripts of the ecosystem, run as they are but for the line that imports PEFT's names: each says which of halfbyte's
layers work in it, and does what it did.

The trainings are of tiny models; TRL's and the notebook's run where TRL and nbconvert are installed (`make test-slow`).
"""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import halfbyte
from halfbyte.adapters import dropin, first_step
from halfbyte.layers import fuse
from halfbyte.proofs.setting import StartProof
from halfbyte.quant import bnb
from tests import tiny, tiny_run

TARGETS = ["q_proj", "v_proj"]
HEAD = """
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
from halfbyte import LoraConfig, get_peft_model, prepare_model_for_kbit_training
bnb_config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
def base():
    return AutoModelForCausalLM.from_pretrained(
        MODEL, quantization_config=bnb_config, dtype=torch.bfloat16, device_map={"": "cpu"})
config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], lora_dropout=0.05, task_type="CAUSAL_LM")
"""
CLASSIC = """
from transformers import Trainer, TrainerCallback, TrainingArguments
ids = torch.randint(3, 256, (16, 24), generator=torch.Generator().manual_seed(0))
rows = [{"input_ids": row[: 12 + i % 12].tolist()} for i, row in enumerate(ids)]

def pad(features, left=False):
    width = max(len(f["input_ids"]) for f in features)
    def fill(values, filler):
        more = [filler] * (width - len(values))
        return more + values if left else values + more
    return {
        "input_ids": torch.tensor([fill(f["input_ids"], 0) for f in features]),
        "attention_mask": torch.tensor([fill([1] * len(f["input_ids"]), 0) for f in features]),
        "labels": torch.tensor([fill(f["input_ids"], -100) for f in features]),
    }

def train(folder, collator=pad, callbacks=(), resume=None, **more):
    torch.manual_seed(0)
    model = get_peft_model(prepare_model_for_kbit_training(base()), config)
    arguments = TrainingArguments(
        output_dir=folder, per_device_train_batch_size=4, max_steps=4, report_to="none", logging_steps=1,
        disable_tqdm=True, remove_unused_columns=False, use_cpu=True,
        **{"save_strategy": "no", "learning_rate": 2e-3, **more})
    trainer = Trainer(
        model=model, args=arguments, train_dataset=rows, data_collator=collator, callbacks=list(callbacks))
    trainer.train(resume_from_checkpoint=resume)
    return trainer
"""


def run(script: str, folder: Path, caplog: pytest.LogCaptureFixture) -> tuple[dict[str, Any], str]:
    """The names of a script after it has run on a tiny model, and the last line that it said of halfbyte's layers."""
    names: dict[str, Any] = {
        "MODEL": str(tiny_run.checkpoint(folder / "model", dtype=torch.bfloat16)),
        "OUT": str(folder),
    }
    caplog.clear()
    with caplog.at_level(logging.WARNING, "halfbyte"):
        exec(HEAD + script, names)
    said = [record.getMessage() for record in caplog.records if record.name == "halfbyte"]
    checks = [text for text in said if "checks its layers on this model before the first step" in text]
    lines = [text for text in said if text.startswith("halfbyte is active:")]
    assert len(checks) == len(lines) >= 1
    return names, lines[-1]


def adapter(model: Any) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


LAYERS = "2 layers, 2 attentions, 4 LoRA linears, 10 frozen linears, 2 gated MLPs, 5 norms"


def test_the_classic_script_with_a_collator_of_its_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, line = run(CLASSIC + "trainer = train(OUT)", tmp_path, caplog)
    assert f"its layers ({LAYERS}); rows without padding; logits of labelled tokens alone." in line
    assert "Not:" not in line


def test_a_collator_that_pads_on_the_left_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = CLASSIC + "trainer = train(OUT, collator=lambda features: pad(features, left=True))"
    names, line = run(script, tmp_path, caplog)
    why = "rows are not padded on the right"
    assert f"its layers ({LAYERS}). Not: rows as they come ({why}); the script's own loss ({why})." in line
    assert all(bool(value.any()) for name, value in adapter(names["trainer"].model).items() if "lora_B" in name)


def test_a_loop_of_its_own_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    loop = """
model = get_peft_model(prepare_model_for_kbit_training(base()), config).train()
batch = pad(rows[:4])
model(**batch).loss.backward()
"""
    _, line = run(CLASSIC + loop, tmp_path, caplog)
    assert "rows without padding. Not: the script's own loss (it does not say num_items_in_batch)." in line


def test_what_the_proof_refuses_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(first_step, "prove_fused", lambda model, packed: StartProof(False, "by decree", 1.0))
    with pytest.warns(UserWarning, match="by decree"):
        _, line = run(CLASSIC + "trainer = train(OUT)", tmp_path, caplog)
    assert "PEFT's own layers (by decree)" in line and "its layers" not in line


CALLBACK = """
class Save(TrainerCallback):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 2:
            model.save_pretrained(OUT + "/middle")
            with torch.no_grad():
                model.eval()(**pad(rows[:2]))
            middle.update({n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n})
            model.train()
middle = {}
plain = train(OUT + "/plain")
trainer = train(OUT + "/saved", callbacks=[Save()])
"""


def test_a_callback_that_saves_and_evaluates_in_the_middle_changes_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names, _ = run(CLASSIC + CALLBACK, tmp_path, caplog)
    assert same(adapter(names["trainer"].model), adapter(names["plain"].model))
    loaded = halfbyte.PeftModel.from_pretrained(names["base"](), tmp_path / "middle")
    assert same(adapter(loaded), names["middle"])
    auto = halfbyte.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "middle", dtype=torch.bfloat16)
    assert type(auto) is dropin.PeftModelForCausalLM and same(adapter(auto), names["middle"])


def test_a_trainers_resume_ends_at_the_same_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    script = """
whole = train(OUT + "/run", save_strategy="steps", save_steps=2)
trainer = train(OUT + "/run", resume=OUT + "/run/checkpoint-2", save_strategy="no")
"""

    names, line = run(CLASSIC + script, tmp_path, caplog)
    assert same(adapter(names["trainer"].model), adapter(names["whole"].model))
    assert names["trainer"].state.global_step == 4 and LAYERS in line


def test_merge_and_unload_gives_the_plain_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    names, _ = run(CLASSIC + "trainer = train(OUT, learning_rate=5e-2)", tmp_path, caplog)
    model, ids = names["trainer"].model.eval(), torch.arange(3, 13)[None]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits.float()
        with model.disable_adapter():
            bare = model(input_ids=ids).logits.float()
        merged = model.merge_and_unload()
        got = merged(input_ids=ids).logits.float()
    assert type(merged).__module__.startswith("transformers.")
    assert not any("lora" in name for name, _ in merged.named_parameters())
    # quantised anew, a weight moves by up to half a step of NF4: nearer to the adapter's logits than to the base's
    assert float((got - wanted).norm()) < float((bare - wanted).norm())
    merged.save_pretrained(tmp_path / "merged")
    assert (tmp_path / "merged" / "config.json").is_file()


def test_a_pipeline_takes_the_model_and_names_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    from transformers import pipeline

    base = tiny.model("llama")
    model = halfbyte.get_peft_model(base, halfbyte.LoraConfig(target_modules=TARGETS, task_type="CAUSAL_LM"))
    logging.getLogger("transformers").propagate = True
    try:
        with caplog.at_level(logging.WARNING, "transformers"):
            write = pipeline("text-generation", model=model, tokenizer=tiny_run.tokenizer())
            (answer,) = write("Hello", max_new_tokens=3, do_sample=False)
    finally:
        logging.getLogger("transformers").propagate = False
    assert answer["generated_text"].startswith("Hello")
    assert not [record for record in caplog.records if "not supported" in record.getMessage()]


def test_nothing_is_told_that_no_script_can_mend() -> None:
    """PEFT asks a base by an older name; bitsandbytes tells of a kernel on a hub when it is imported, and is heard only
    where it was imported first."""
    code = """
import torch
from halfbyte import LoraConfig, get_peft_model
from tests import tiny
get_peft_model(tiny.model("llama"), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
import bitsandbytes
from halfbyte.system import hub_kernel
print(hub_kernel.TOLD)
"""
    done = subprocess.run([sys.executable, "-W", "default", "-c", code], capture_output=True, text=True, check=True)
    assert "is_gradient_checkpointing" not in done.stderr and "kernels-community" not in done.stderr
    assert done.stdout == "False\n"


SFT = """
from datasets import Dataset
from trl import SFTConfig, SFTTrainer
rows = Dataset.from_list([{"prompt": f"What is {a} and {a}?", "completion": f" It is {a + a}."} for a in range(16)])

def train(folder, model, peft_config=None, resume=None, **more):
    torch.manual_seed(0)
    arguments = SFTConfig(
        output_dir=folder, max_steps=4, per_device_train_batch_size=4, learning_rate=2e-3, report_to="none",
        logging_steps=1, disable_tqdm=True, use_cpu=True, **{"save_strategy": "no", **more})
    trainer = SFTTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(MODEL),
        peft_config=peft_config)
    trainer.train(resume_from_checkpoint=resume)
    return trainer
"""
DPO = """
from datasets import Dataset
from trl import DPOConfig, DPOTrainer
rows = Dataset.from_list(
    [{"prompt": f"What is {a} and {a}?", "chosen": f" It is {a + a}.", "rejected": " No idea."} for a in range(16)])

def train(folder, model, peft_config=None, **more):
    torch.manual_seed(0)
    arguments = DPOConfig(
        output_dir=folder, max_steps=4, per_device_train_batch_size=4, learning_rate=2e-3, report_to="none",
        logging_steps=1, disable_tqdm=True, use_cpu=True, save_strategy="no", **more)
    trainer = DPOTrainer(
        model=model, args=arguments, train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(MODEL),
        peft_config=peft_config)
    trainer.train()
    return trainer
"""
GRPO = """
import peft
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer
rows = Dataset.from_list([{"prompt": f"What is {a} and {a}?"} for a in range(16)])

def letters(completions, **kwargs):
    return [sum(letter.isascii() for letter in text) / 8 for text in completions]

def train(folder, kind):
    torch.manual_seed(0)
    arguments = GRPOConfig(
        output_dir=folder, max_steps=3, per_device_train_batch_size=8, num_generations=4, max_completion_length=8,
        learning_rate=2e-2, report_to="none", logging_steps=1, disable_tqdm=True, use_cpu=True, save_strategy="no",
        bf16=False)
    adapter = kind.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32), reward_funcs=letters, args=arguments,
        train_dataset=rows, processing_class=AutoTokenizer.from_pretrained(MODEL), peft_config=adapter)
    trainer.train()
    return trainer
"""
FORMS = {
    "with peft_config": "base(), config",
    "without": "get_peft_model(prepare_model_for_kbit_training(base()), config)",
}


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("trainer", ["SFT", "DPO"])
def test_trls_trainers_get_the_fast_layers(
    trainer: str, form: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("trl")
    script = {"SFT": SFT, "DPO": DPO}[trainer] + f"trainer = train(OUT, {FORMS[form]})"
    names, line = run(script, tmp_path, caplog)
    model = names["trainer"].model
    assert type(model) is dropin.PeftModelForCausalLM
    assert f"its layers ({LAYERS}); rows without padding" in line
    assert "Not: the script's own loss (the script passes" in line
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert "fp32 for what trains, which it was not" in line
    assert all(bool(value.any()) for name, value in adapter(model).items() if "lora_B.default" in name)
    log = [row["loss"] for row in names["trainer"].state.log_history if "loss" in row]
    if trainer == "DPO":
        assert log[0] == pytest.approx(math.log(2), abs=1e-6), "policy and reference are one model at first, to the bit"


@pytest.mark.slow
def test_trls_grpo_learns_the_same_by_the_fast_layers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("trl")
    script = (
        GRPO
        + """
import halfbyte
plain = train(OUT + "/plain", peft)
trainer = train(OUT + "/fast", halfbyte)
"""
    )
    names, line = run(script, tmp_path, caplog)
    layers = LAYERS.replace(" 10 frozen linears,", "")  # the base is not quantised
    assert type(names["trainer"].model) is dropin.PeftModelForCausalLM and f"its layers ({layers})" in line
    logs = [[row for row in names[name].state.log_history if "loss" in row] for name in ("trainer", "plain")]
    assert len(logs[0]) == 3
    for row, wanted in zip(*logs, strict=True):
        for name in ("loss", "grad_norm", "reward", "completions/mean_length", "entropy"):
            assert row[name] == pytest.approx(wanted[name], rel=1e-3, abs=1e-5), name


@pytest.mark.slow
def test_trls_resume_ends_at_the_same_bytes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("trl")
    script = """
whole = train(OUT + "/run", base(), config, save_strategy="steps", save_steps=2)
trainer = train(OUT + "/run", base(), config, resume=OUT + "/run/checkpoint-2")
"""
    names, _ = run(SFT + script, tmp_path, caplog)
    assert same(adapter(names["trainer"].model), adapter(names["whole"].model))


@pytest.mark.slow
def test_a_notebook_shows_both_lines(tmp_path: Path) -> None:
    pytest.importorskip("nbconvert")
    pytest.importorskip("ipykernel")
    model = tiny_run.checkpoint(tmp_path / "model", dtype=torch.bfloat16)
    cells = [f"MODEL, OUT = {str(model)!r}, {str(tmp_path)!r}", HEAD + CLASSIC, "trainer = train(OUT)"]
    notebook = {
        "cells": [
            {
                "cell_type": "code",
                "source": text,
                "metadata": {},
                "outputs": [],
                "execution_count": None,
                "id": f"cell{n}",
            }
            for n, text in enumerate(cells)
        ],
        "metadata": {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    (tmp_path / "script.ipynb").write_text(json.dumps(notebook))
    command = [sys.executable, "-m", "nbconvert", "--to", "notebook", "--execute", "--output", "done.ipynb"]
    subprocess.run([*command, str(tmp_path / "script.ipynb")], check=True, capture_output=True, cwd=tmp_path)
    (_, _, last) = json.loads((tmp_path / "done.ipynb").read_text())["cells"]
    shown = "".join("".join(output.get("text", "")) for output in last["outputs"] if output.get("name") == "stderr")
    assert "halfbyte checks its layers on this model before the first step" in shown
    assert f"halfbyte is active: its layers ({LAYERS})" in shown


@pytest.mark.parametrize("given", ["our config", "our config without a task", "a base that was prepared", "neither"])
def test_pefts_own_function_as_trl_calls_it(given: str) -> None:
    """`trl/trainer/sft_trainer.py`, `dpo_trainer.py`: peft.get_peft_model(model, peft_config), then LoRA in bf16."""
    import peft

    base = tiny.model("llama", dtype=torch.bfloat16)
    cls = halfbyte.LoraConfig if given.startswith("our") else peft.LoraConfig
    if given == "a base that was prepared":
        halfbyte.prepare_model_for_kbit_training(base)
    task = {} if given.endswith("task") else {"task_type": "CAUSAL_LM"}
    model = peft.get_peft_model(base, cls(r=4, target_modules=TARGETS, **task))
    if given == "neither":
        assert type(model) is peft.PeftModelForCausalLM
        assert not any(isinstance(m, fuse._Fast) for m in model.modules())
        return
    assert type(model) is dropin.PeftModelForCausalLM
    assert sum(isinstance(m, fuse._FastLoraLinear) for m in model.modules()) == 4
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.data = parameter.data.to(torch.bfloat16)
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    model.train()(input_ids=ids, labels=ids).loss.backward()
    assert {p.dtype for p in trained} == {torch.float32} and all(p.grad.dtype == torch.float32 for p in trained)
    assert model.generate(input_ids=ids, max_new_tokens=2).shape == (2, 14)
    assert not any(layer.support_avx512bf16_for_cpu for _, layer in bnb.linears_4bit(base))


def test_a_checkpoint_finds_fp32_numbers_in_a_model_that_trl_has_made_bf16(tmp_path: Path) -> None:
    import peft

    config = {"r": 4, "target_modules": TARGETS, "task_type": "CAUSAL_LM", "init_lora_weights": False}
    saved = peft.get_peft_model(tiny.model("llama", dtype=torch.bfloat16), halfbyte.LoraConfig(**config))
    saved.save_pretrained(tmp_path)
    model = peft.get_peft_model(tiny.model("llama", dtype=torch.bfloat16), halfbyte.LoraConfig(**config))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    model.load_adapter(tmp_path, "default", is_trainable=True)  # a Trainer's resume
    assert same(adapter(model), adapter(saved))


def test_a_trained_head_that_trl_has_made_bf16_is_one_master_again() -> None:
    config = halfbyte.LoraConfig(r=4, target_modules=TARGETS, modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    model = halfbyte.get_peft_model(tiny.model("llama", dtype=torch.bfloat16), config).train()
    head = next(p for n, p in model.named_parameters() if "lm_head.modules_to_save" in n)
    hooks = sum(len(m._forward_pre_hooks) for m in model.modules())
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    ids = torch.randint(3, 200, (2, 12), generator=torch.Generator().manual_seed(0))
    for _ in range(2):
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert any(p is head for p in model.parameters()) and head.dtype == torch.float32
    assert head.grad is not None and head.grad.dtype == torch.float32
    model.eval()(input_ids=ids)
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == hooks + 1  # the body's, that takes padding off
