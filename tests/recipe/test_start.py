"""What `halfbyte train MODEL ROWS` says beside the defaults: values that give way to whatever is given."""

from __future__ import annotations

import pytest

from halfbyte.recipe import command
from halfbyte.recipe.file import recipe_from
from halfbyte.recipe.start import START


def values(*overrides: str) -> dict[str, object]:
    recipe = command.to_train("smollm2-135m", "rows.jsonl", overrides).recipe
    sections = {name: getattr(recipe, name) for name in ("quant", "lora", "train")}
    return {field: getattr(sections[field.partition(".")[0]], field.partition(".")[2]) for field in START}


def test_a_model_with_rows_begins_with_what_is_measured() -> None:
    assert values() == {field: start.value for field, start in START.items()}
    loaded = command.to_train("smollm2-135m", "rows.jsonl", ())
    origin = loaded.origins["lora.target_modules"]
    assert origin.kind == "default" and origin.why == START["lora.target_modules"].why


def test_a_recipe_and_what_is_no_training_keep_the_classic_defaults() -> None:
    recipe = recipe_from("smollm2-135m", "rows.jsonl").recipe
    assert (recipe.quant.type, recipe.train.learning_rate, recipe.train.rows_per_step) == ("nf4", 2e-4, 16)


@pytest.mark.parametrize(
    ("override", "field", "value"),
    [
        ("train.learning_rate=3e-4", "train.learning_rate", 3e-4),
        ("train={optim: sgd}", "train.learning_rate", 2e-4),
        ("train.loraplus_lr_ratio=4", "train.learning_rate", 2e-4),
        ("train.gradient_accumulation_steps=4", "train.gradient_accumulation_steps", 4),
        ("lora.target_modules=[q_proj]", "lora.target_modules", ("q_proj",)),
        ("quant.type=fp4", "quant.type", "fp4"),
        ("quant={double_quant: false}", "quant.type", "nf4"),
        ("quant.block_size=64", "quant.type", "nf4"),
        ("lora.init_lora_weights=residual", "quant.type", "nf4"),
        ("quant.compute=int8", "quant.compute", "int8"),
        ("task=classify", "quant.compute", "exact"),
    ],
)
def test_what_is_given_is_stronger(override: str, field: str, value: object) -> None:
    assert values(override) == {name: start.value for name, start in START.items()} | {field: value}
