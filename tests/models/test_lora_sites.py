"""sites.py: LoRA's places from names alone are those that PEFT takes on the built model."""

from __future__ import annotations

import json
from typing import Any

import pytest

from halfbyte.adapters import lora as adapters
from halfbyte.adapters import targets
from halfbyte.errors import AdapterError
from halfbyte.models.describe import tensors_of
from halfbyte.models.lora_sites import sites, trainable
from halfbyte.models.structure import meta_model
from halfbyte.models.tensors import spec_of
from halfbyte.recipe.schema import Lora
from tests import tiny
from tests.lora_count import lora_parameter_count


def both(name: str, **lora: Any) -> tuple[set[str], int, set[str], int]:
    """(names, parameters) by names alone, then by the modules of the built model."""
    config = tiny.config(name)
    specs = tensors_of(json.loads(config.to_json_string(use_diff=False)))
    asked = Lora(r=8, **lora)
    found = sites(specs, asked)
    model = meta_model(config)
    chosen = targets.resolve_targets(model, asked.target_modules)
    real = targets.matched(model, chosen, asked)
    count = lora_parameter_count(model, real, 8, asked.rank_pattern)
    return {site.name for site in found}, sum(s.parameters for s in found), set(real), count


@pytest.mark.parametrize("asked", ["auto", "all-linear"])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_names_alone_give_what_the_modules_give(name: str, asked: str) -> None:
    names, parameters, real, count = both(name, target_modules=asked)
    assert names == real
    assert parameters == count


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": ["q_proj", "v_proj"]},
        {"target_modules": ["mlp.down_proj"]},
        {"target_modules": r".*layers\.1\.self_attn\.(q|k)_proj"},
        {"target_modules": "auto", "layers_to_transform": 1},
        {"target_modules": "all-linear", "exclude_modules": ["down_proj"]},
        {"target_modules": ["q_proj", "v_proj"], "rank_pattern": {"q_proj": 2}},
    ],
)
def test_lists_expressions_and_limits(lora: dict[str, Any]) -> None:
    names, parameters, real, count = both("llama", **lora)
    assert names == real
    assert parameters == count


@pytest.mark.parametrize(
    ("name", "lora"),
    [
        ("llama", {"modules_to_save": ("lm_head", "norm")}),  # every norm's name ends so
        ("llama", {"modules_to_save": ("embed_tokens", "down_proj"), "target_modules": "all-linear"}),
        ("gpt2", {"modules_to_save": ("lm_head",)}),  # tied: a head of its own from then on
        ("gpt2", {"modules_to_save": ("ln_f",), "bias": "all"}),
        ("gpt2", {"bias": "lora_only", "use_dora": True}),
        ("falcon", {"bias": "all"}),
        ("bloom", {"trainable_token_indices": (3, 4), "bias": "all"}),
    ],
)
def test_what_trains_by_names_alone_is_what_trains(name: str, lora: dict[str, Any]) -> None:
    specs = tensors_of(json.loads(tiny.config(name).to_json_string(use_diff=False)))
    asked, model = Lora(r=8, **lora), tiny.model(name)
    targets_, _ = adapters.choose_targets(model, asked)
    made = adapters.add(model, asked, targets_, seed=0)
    real = sum(p.numel() for p in made.parameters() if p.requires_grad)
    assert trainable(sites(specs, asked), specs, asked) == real


def test_what_trains_beside_lora() -> None:
    specs = tensors_of(json.loads(tiny.config("gpt2").to_json_string(use_diff=False)))
    plain = Lora(r=8)
    base = trainable(sites(specs, plain), specs, plain)
    for change, more in (
        ({"bias": "all"}, sum(s.numel for s in specs if s.name.endswith(".bias"))),
        ({"modules_to_save": ("wte",)}, 256 * 64),
        ({"trainable_token_indices": (1, 2)}, 2 * 64),
        ({"use_dora": True}, sum(site.outputs for site in sites(specs, plain))),
    ):
        asked = Lora(r=8, **change)
        assert trainable(sites(specs, asked), specs, asked) == base + more, change


def test_nothing_that_matches_is_an_error_with_what_there_is() -> None:
    specs = tensors_of(json.loads(tiny.config("llama").to_json_string(use_diff=False)))
    with pytest.raises(AdapterError, match=r"'wq',\) match no linear layer\. There are: down_proj, gate_proj"):
        sites(specs, Lora(target_modules=("wq",)))
    with pytest.raises(AdapterError, match="is no regular expression"):
        sites(specs, Lora().model_copy(update={"target_modules": "("}))


@pytest.mark.parametrize(
    "lora",
    [
        {"target_parameters": ("gate_up_proj", "down_proj"), "rank_pattern": {"down_proj": 2}},
        {"target_parameters": ("layers.1.mlp.experts.down_proj",), "target_modules": ()},
    ],
)
def test_stacks_of_experts_by_names_alone(lora: dict[str, Any]) -> None:
    model, asked = tiny.model("mixtral"), Lora(r=8, lora_dropout=0, **lora)
    config = json.loads(model.config.to_json_string(use_diff=False))
    specs = [spec_of(name, tuple(p.shape), "BF16", config) for name, p in model.named_parameters()]
    placed = sites(specs, asked)
    targets_, hit = adapters.choose_targets(model, asked)
    assert {site.name for site in placed} == set(hit)
    made = adapters.add(model, asked, targets_, seed=0)
    assert trainable(placed, specs, asked) == sum(p.numel() for p in made.parameters() if p.requires_grad)
    with pytest.raises(AdapterError, match=r"ends in 'w1'\. There are: down_proj, gate_up_proj"):
        sites(specs, asked.model_copy(update={"target_parameters": ("w1",)}))
