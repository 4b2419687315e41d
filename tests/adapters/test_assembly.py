"""A base with adapters, assembled: proven last, and what is not proven is off on every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from halfbyte.adapters import assembly, lora
from halfbyte.adapters.assembly import assemble
from halfbyte.base import load, stream
from halfbyte.layers import fuse, packing
from halfbyte.models.sources.lookup import find_model
from halfbyte.proofs.setting import StartProof
from halfbyte.recipe.schema import Recipe
from halfbyte.system import device
from tests import tiny_run


def opened(recipe: Recipe) -> load.Base:
    return load.open_base(find_model(recipe), recipe.quant, device.detect())


def lora_layers(model: Any) -> int:
    return sum(isinstance(module, LoraLayer) for module in model.modules())


def test_fresh_adapters_train_and_everything_is_proven(tmp_path: Path) -> None:
    recipe = tiny_run.recipe(tmp_path, lora__target_modules=["q_proj", "v_proj"]).recipe
    notes, base = [], opened(recipe)
    assert stream.place(base.model, "resident").placement == "resident" and lora_layers(base.model) == 0
    made = assemble(base, recipe, note=lambda label, text: notes.append((label, text)))
    layers = made.model.config.num_hidden_layers
    assert made.layers == min(2, layers) and lora_layers(made.model) == 2 * layers
    assert made.packed.ok and packing.installed(made.model) == made.packed.layout
    assert made.fused.ok and made.fused.reason in made.engine and fuse.remove(made.model)
    ((label, text),) = notes
    assert label == "adapters" and f"q_proj x{layers}, v_proj x{layers}; " in text
    trained = {name for name, p in made.model.named_parameters() if p.requires_grad}
    assert trained and all("lora_" in name for name in trained) and made.own_biases == []


def test_the_seed_of_the_recipe_draws_the_adapters(tmp_path: Path) -> None:
    first, again, other = (
        [p for _, p in assemble(opened(recipe), recipe).model.named_parameters() if p.requires_grad]
        for recipe in (tiny_run.recipe(tmp_path, train__seed=seed).recipe for seed in (1, 1, 2))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_layers_that_are_not_proven_are_fused_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = StartProof(False, "PEFT's own forward: gradients differ by 1.0e+00 (allowed 1e-03)", 1.0)
    monkeypatch.setattr(assembly, "prove_fused", lambda model, **_: wrong)
    recipe = tiny_run.recipe(tmp_path).recipe
    made = assemble(opened(recipe), recipe)
    assert not fuse.remove(made.model) and made.engine == wrong.reason and made.fused is wrong


def test_a_saved_adapter_is_used_and_not_trained(tmp_path: Path) -> None:
    """Of gpt2, with biases of the base that the adapter has trained."""
    tiny_run.checkpoint(tmp_path / "model", "gpt2")
    recipe = tiny_run.recipe(tmp_path, lora__bias="all").recipe
    trained = assemble(opened(recipe), recipe).model
    base = {name: p.detach().clone() for name, p in trained.named_parameters() if name.endswith("bias")}
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter += 1
    lora.save(trained, tmp_path / "adapter", base_id="m", revision=None)
    made = assemble(opened(recipe), recipe, adapter=tmp_path / "adapter")
    assert not made.model.training and not any(p.requires_grad for p in made.model.parameters())
    assert made.fused.reason == "nothing trains"
    now = {name: p for name, p in made.model.named_parameters() if name.endswith("bias")}
    assert all(torch.equal(now[name], base[name] + 1) for name in base) and base
    own = {id(p): value for p, value in made.own_biases}
    assert all(torch.equal(own[id(now[name])], base[name]) for name in base)
