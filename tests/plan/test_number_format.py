"""`quant.type: auto`: what is chosen on machines of several sizes, what is refused, a run that keeps what it chose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

from halfbyte import finetune
from halfbyte.errors import RecipeError
from halfbyte.inference import target
from halfbyte.inference.load import open_target
from halfbyte.plan import number_format
from halfbyte.recipe import command
from halfbyte.recipe.command import recipe_or_model
from halfbyte.recipe.number_formats import FORMATS
from halfbyte.recipe.schema import Loaded
from tests import tiny_run
from tests.base import test_gguf_file

AUTO = ["quant.type=auto"]


def chosen(model: str, machine: str, *more: str) -> tuple[str, str]:
    loaded = number_format.settle(recipe_or_model(model, [*AUTO, *more]), device=machine, length=512)
    return loaded.recipe.quant.type, loaded.origins["quant.type"].why


@pytest.mark.parametrize(
    ("model", "machine", "name", "why"),
    [
        ("llama-2-7b", "80GB", "none", "16 bits, as the model is"),
        ("llama-2-7b", "24GB", "int8", "8 bits"),  # in 16 bits it would recompute, which costs time
        ("llama-2-7b", "cpu:64GB", "none", "16 bits"),
        ("llama-2-7b", "cpu:12GB", "nf4", "not none: "),
        ("qwen2.5-14b", "cpu:12GB", "nf4", "no format stays in memory beside the rest"),
        ("llama-2-7b", "cpu:1GB", "nf4", "of 1.00 GB free"),
        ("smollm2-360m", "cpu:24GB", "none", "16 bits"),
    ],
)
def test_the_most_exact_that_stays_in_memory(model: str, machine: str, name: str, why: str) -> None:
    found, reason = chosen(model, machine)
    assert found == name and why in reason


@pytest.mark.parametrize(("kind", "name"), [("Q8_0", "gguf"), ("F16", "none")])
def test_a_quantised_file_is_held_in_its_own_blocks(tmp_path: Path, kind: str, name: str) -> None:
    file, _ = test_gguf_file.written(tmp_path, "llama", Type[kind])
    assert chosen(str(file), "cpu:16GB")[0] == name
    assert chosen(str(file), "16GB")[0] == "none"  # no kernel of a card reads blocks


def test_what_a_format_cannot_do_is_no_choice() -> None:
    found, reason = chosen("smollm2-360m", "cpu:8GB", "lora.modules_to_save=[q_proj]")
    assert found == "none" and "not nf4: lora.modules_to_save takes in q_proj" in reason


def test_a_named_format_stays_and_fields_of_one_are_refused() -> None:
    loaded = recipe_or_model("llama-2-7b", ["quant.type=int8"])
    assert number_format.settle(loaded) is loaded
    with pytest.raises(RecipeError, match=r"block_size cannot be set with quant.type auto, which takes those of"):
        recipe_or_model("llama-2-7b", [*AUTO, "quant.block_size=64"])
    with pytest.raises(RecipeError, match=r"which auto may choose, nothing is"):
        recipe_or_model("llama-2-7b", [*AUTO, "lora.init_lora_weights=residual"])
    assert "auto" not in FORMATS


def test_a_run_keeps_what_was_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = tiny_run.recipe(tmp_path, quant__type="auto", train__save_strategy="steps", train__save_steps=2)
    report = finetune.train(loaded).report
    run = tmp_path / "run"
    passport = json.loads((run / "adapter" / "halfbyte.json").read_text())
    assert report["steps"] == 4 and passport["belongs_to"]["quant"]["type"] == "none"
    assert target.find(run).recipe.quant.type == "none"
    assert open_target(target.find(run)).model is not None
    saved = run / "checkpoints" / "step-000002"
    monkeypatch.chdir(saved)
    for one in (target.find(saved), target.find(Path())):
        assert one.recipe.quant.type == "none" and one.run is None, "a checkpoint is used on its run's base"
    assert target.find(saved).adapter == saved

    def other(*_: object, **__: object) -> dict[str, str]:
        return {"name": "nf4", "why": "less memory is free now"}

    monkeypatch.setattr(number_format, "_choice", other)
    again = command.to_resume(str(tmp_path / "recipe.yaml"), ["train.max_steps=6"])
    assert again.recipe.quant.type == "none"
    by_hand: Loaded = loaded._replace(
        recipe=loaded.recipe.model_copy(update={"train": loaded.recipe.train.model_copy(update={"max_steps": 6})})
    )
    assert finetune.train(by_hand, resume=True).report["steps"] == 6
