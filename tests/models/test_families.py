"""A line in `FAMILIES` is all that an architecture of Llama's kind needs: fused, planned, listed and decoded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig

from halfbyte.layers import fuse
from halfbyte.layers.decoding import llama as decoding
from halfbyte.layers.decoding.tape import isa
from halfbyte.models import families
from halfbyte.models.describe import tensors_of
from halfbyte.plan.layer import layer_of
from halfbyte.proofs.packing import prove_packing
from tests.layers.test_fuse import apart, gradients
from tests.models import toy
from tests.plan.test_layer import TOKENS, kept_bytes


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy is registered with transformers, and has its line in the one table."""
    toy.register()
    for model_type, family in toy.FAMILY.items():
        monkeypatch.setitem(families.FAMILIES, model_type, family)


def adapted() -> Any:
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = peft.get_peft_model(toy.model(), LoraConfig(r=4, target_modules=names, task_type="CAUSAL_LM"))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    prove_packing(model)
    return model.train()


def test_its_tensors_follow_from_its_config(known: None) -> None:
    model = toy.model()
    real = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert {spec.name: spec.shape for spec in tensors_of(model.config.to_dict())} == real


def test_all_of_it_runs_fused_and_learns_the_same(known: None) -> None:
    model = adapted()
    wanted = gradients(model, fused=False)
    counts = fuse.install(model).counts
    # of a layer: 7 linears with LoRA, 2 norms and those of q and k, attention, MLP, the layer; one norm more
    assert counts == {"LoRA linears": 14, "norms": 9, "gated MLPs": 2, "attentions": 2, "layers": 2}
    assert apart(gradients(model), wanted) < 1e-5  # sums in fp32, in another order


def test_without_its_line_only_what_is_seen_on_the_modules_is_fused() -> None:
    assert set(fuse.install(adapted()).counts) == {"LoRA linears", "norms", "gated MLPs"}


@pytest.mark.parametrize("cheap", [False, True])
def test_a_layer_keeps_what_the_plan_counts(known: None, cheap: bool, tmp_path: Path) -> None:
    sizes = []
    for layers in (2, 3):
        toy.model(layers, torch.bfloat16).save_pretrained(tmp_path / str(layers))
        nbytes, sites, facts = kept_bytes(tmp_path / str(layers), "all-linear", 0.05, cheap=cheap)
        sizes.append(nbytes)
    layer = layer_of(facts, sites, 2, kernels=True, dropout=True, longest=TOKENS)
    copies = 2 * sum(site.parameters for site in sites) / facts.layers  # LoRA's weights in bf16
    planned = TOKENS * (layer.selective if cheap else layer.kept) + copies
    assert sizes[1] - sizes[0] == pytest.approx(planned, rel=0.01)


@pytest.mark.skipif(isa(torch.float32) is None, reason="no kernels for this processor")
def test_the_tape_writes_its_logits(known: None) -> None:
    model = toy.model().eval()
    tokens = torch.randint(3, 250, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(tokens).logits
        decoder = decoding.decoder(model, 2, 64)
        embedded = model.get_input_embeddings()(tokens)
        for at in range(tokens.shape[1]):
            logits = decoder.step(embedded[:, at], [at, at])
            assert torch.linalg.norm(logits - wanted[:, at]) < 1e-5 * torch.linalg.norm(wanted[:, at])
        model.model.layers[1].self_attn.k_norm.weight.mul_(1.5)
        assert torch.linalg.norm(model(tokens).logits[:, -1] - logits) > 1e-2 * torch.linalg.norm(logits)
