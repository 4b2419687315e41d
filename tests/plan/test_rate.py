"""`train.learning_rate: auto`: the law's numbers, where it does not hold, and a run that keeps what it began with."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from halfbyte import finetune
from halfbyte.errors import RecipeError
from halfbyte.plan import number_format, rate
from halfbyte.recipe import command
from halfbyte.recipe.file import load_recipe, recipe_from
from halfbyte.recipe.schema import Lora
from halfbyte.training import preview
from tests import tiny_run


@pytest.mark.parametrize(
    ("model", "more", "wanted"),
    [
        ("smollm2-135m", [], 1.3e-3),  # 5e-4 (2000 / 576)^0.781
        ("gemma3-270m", [], 1.2e-3),  # 640
        ("llama-2-7b", [], 2.9e-4),  # 4096
        ("smollm2-135m", ["lora.r=64"], 1.3e-3),  # one alpha, one rate
        ("smollm2-135m", ["lora.lora_alpha=128"], 3.3e-4),
        ("smollm2-135m", ["lora.use_rslora=true"], 3.3e-4),  # alpha / sqrt(16) is four times alpha / 16
        ("llama-2-7b", ["train.gradient_accumulation_steps=2"], 4.0e-4),  # 8 rows
        ("llama-2-7b", ["train.gradient_accumulation_steps=64"], 5.7e-4),  # twice, and no more
    ],
)
def test_the_rate_follows_width_scale_and_rows(model: str, more: list[str], wanted: float) -> None:
    loaded = recipe_from(
        model, "rows.jsonl", ["train.learning_rate=auto", "train.gradient_accumulation_steps=1", *more]
    )
    settled = number_format.settle(loaded)
    assert settled.recipe.train.learning_rate == pytest.approx(wanted)
    origin = settled.origins["train.learning_rate"]
    assert origin.kind == "auto" and origin.why.startswith("law of width ")


def test_the_origin_says_the_law() -> None:
    loaded = rate.settle(recipe_from("smollm2-135m", "rows.jsonl", ["train.learning_rate=auto"]))
    assert loaded.origins["train.learning_rate"].why == "law of width 576, rank 16, alpha 32, 16 rows a step: 0.0026"


def test_no_rate_is_so_high_that_runs_diverge() -> None:
    assert rate.law(16, Lora(), 4) == rate.MOST


def test_a_model_that_is_not_known_yet_gets_a_rate(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    loaded = rate.settle(recipe_from(str(tmp_path), "rows.jsonl", ["train.learning_rate=auto"]))
    assert loaded.recipe.train.learning_rate == rate.RATE
    assert "not known before it is here" in loaded.origins["train.learning_rate"].why


@pytest.mark.parametrize("other", ["train.optim=sgd", "train.loraplus_lr_ratio=16"])
def test_the_law_is_that_of_adamw(other: str) -> None:
    with pytest.raises(RecipeError, match=r"train\.learning_rate auto is AdamW's, not that of train\.(optim|loraplus)"):
        recipe_from("smollm2-135m", "rows.jsonl", ["train.learning_rate=auto", other])


def test_a_run_keeps_the_rate_that_it_began_with(tmp_path: Path) -> None:
    loaded = tiny_run.recipe(tmp_path, train__learning_rate="auto", train__max_steps=2)
    shown = {field: (value, origin) for field, value, origin in preview.resolve(loaded).rows}
    value, origin = shown["train.learning_rate"]
    assert origin.kind == "auto" and value == rate.MOST
    run = finetune.train(loaded).run
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["learning_rate"] == value
    changed = load_recipe(run / "recipe.yaml", ["train.learning_rate=auto", "lora.lora_alpha=3000", f"output={run}"])
    assert rate.settle(changed).recipe.train.learning_rate < value, "the law says another one now"
    begun = command.as_begun(changed)
    assert (begun.recipe.train.learning_rate, begun.origins["train.learning_rate"].why) == (
        value,
        "the run has begun with it",
    )
