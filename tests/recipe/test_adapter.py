"""A new run from a trained adapter: its weights are the start, and what it is decides rank and targets."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from halfbyte import finetune
from halfbyte.errors import AdapterError, RecipeError
from halfbyte.recipe import adapter
from halfbyte.recipe.file import load_recipe
from halfbyte.runs.folder import RunFolder
from halfbyte.training import preflight
from tests import tiny, tiny_run

NOT_GIVEN: dict[str, Any] = {"lora__r": None, "lora__lora_alpha": None}
FILE = "adapter_model.safetensors"


def eval_losses(folder: Path) -> list[float]:
    return [row["eval_loss"] for row in RunFolder(folder).read_metrics() if "eval_loss" in row]


@pytest.mark.parametrize(
    ("given", "of"),
    [
        ({}, "run"),
        ({"lora__use_dora": True, "lora__target_modules": ["q_proj", "down_proj"]}, "run/adapter"),
        ({"lora__modules_to_save": ["lm_head"], "lora__rank_pattern": {"q_proj": 2}}, "run"),
        ({"lora__trainable_token_indices": [5, 9], "lora__use_rslora": True}, "run"),
    ],
)
def test_a_new_run_begins_where_the_adapter_ended(given: dict[str, Any], of: str, tmp_path: Path) -> None:
    held = {"data__eval": tiny_run.rows(tmp_path / "eval.jsonl", 6, seed=5)}
    finetune.train(tiny_run.recipe(tmp_path, **held, **given))
    (last,) = eval_losses(tmp_path / "run")
    start = {"lora__adapter": tmp_path / of, "train__eval_on_start": True, "train__max_steps": 4}
    loaded = tiny_run.recipe(tmp_path, **held, **NOT_GIVEN, **start, output=tmp_path / "next",
                             train__save_strategy="steps", train__save_steps=2)  # fmt: skip
    finetune.train(loaded)
    first = eval_losses(tmp_path / "next")[0]
    assert first == pytest.approx(last, abs=1e-6)
    was, now = (json.loads((tmp_path / run / "adapter/adapter_config.json").read_text()) for run in ("run", "next"))
    assert was == now
    # resumed, it needs the adapter no more
    wanted = (tmp_path / "next/adapter" / FILE).read_bytes()
    for gone in (tmp_path / "run", tmp_path / "next/adapter", tmp_path / "next/checkpoints/step-000004"):
        shutil.rmtree(gone)
    finetune.train(load_recipe(tmp_path / "next/recipe.yaml"), resume=True)
    assert (tmp_path / "next/adapter" / FILE).read_bytes() == wanted


def test_a_folder_of_plain_peft_is_a_start(tmp_path: Path) -> None:
    tiny_run.checkpoint(tmp_path / "model")
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(1)
    model = tiny.model("llama", vocab_size=tiny_run.VOCAB)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "plain")
    still = {"train__learning_rate": 1e-30, "train__max_steps": 1}
    loaded = tiny_run.recipe(tmp_path, **NOT_GIVEN, **still, lora__adapter=tmp_path / "plain")
    assert (loaded.recipe.lora.r, loaded.recipe.lora.lora_alpha) == (3, 5)
    assert loaded.origins["lora.r"].why == f"of the adapter {tmp_path / 'plain'}"
    assert "was trained on None" in loaded.warnings[-1]
    finetune.train(loaded)
    was, now = (load_file(tmp_path / folder / FILE) for folder in ("plain", "run/adapter"))
    assert was.keys() == now.keys()
    assert all(torch.equal(value, now[name]) for name, value in was.items())


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    finetune.train(tiny_run.recipe(tmp_path, train__max_steps=1, output=tmp_path / "a"))
    return tmp_path


def test_contradictions_are_named(trained: Path) -> None:
    with pytest.raises(RecipeError) as error:
        tiny_run.recipe(trained, lora__adapter=trained / "a", lora__r=8, lora__target_modules=["up_proj"])
    text = str(error.value)
    advised = shlex.split(str(error.value.fix).partition("; or ")[2])
    assert load_recipe(trained / "recipe.yaml", advised[1::2]).recipe.lora.r == 4 and set(advised[::2]) == {"--set"}
    assert f"lora.r is 8, and the adapter {trained}/a has 4" in text
    assert 'lora.target_modules is ["up_proj"], and the adapter' in text and "lora_alpha" not in text


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights pissa"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": {"embed_tokens": [1]}}, "trainable_token_indices"),
        ({"peft_type": "IA3"}, "not the config of a LoRA adapter"),
    ],
)
def test_what_cannot_be_trained_on_is_refused(change: dict[str, Any], said: str, trained: Path) -> None:
    path = trained / "a/adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(AdapterError, match=said):
        adapter.lora_settings(trained / "a/adapter")


def test_no_adapter_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    loaded = tiny_run.recipe(tmp_path, lora__adapter=tmp_path / "nothing")
    with pytest.raises(AdapterError, match=r"nothing is not an adapter: it has no adapter_model"):
        preflight.check(loaded.recipe)


def test_an_adapter_of_another_model_is_refused(trained: Path) -> None:
    file = trained / "a/adapter" / FILE
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    save_file({**tensors, name: tensors[name][:, :8].contiguous()}, file)
    loaded = tiny_run.recipe(trained, **NOT_GIVEN, lora__adapter=trained / "a", output=trained / "b")
    with pytest.raises(AdapterError, match=r"does not fit this base: 1 tensors differ: .*lora_A.* \(\(4, 8\) there"):
        finetune.train(loaded)
    assert not (trained / "b").exists()
