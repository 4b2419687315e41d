"""LoRA on experts through our function beside PEFT's own `ParamWrapper`, on whole models, in fp32."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig

from halfbyte.layers import fuse
from halfbyte.layers.experts import forward, interface
from halfbyte.layers.experts.layout import experts_of
from halfbyte.proofs.fusing import prove_fused
from halfbyte.proofs.packing import prove_packing
from tests import small_models
from tests.layers.test_fuse import apart, batch, gradients

LONGCAT = ["longcat_flash"] if small_models.longcat_is_on_the_interface() else []
KINDS = ("mixtral", "qwen3_moe", "deepseek_v3", "olmoe", "gpt_oss", *LONGCAT)
PARAMETERS = ["experts.gate_up_proj", "experts.down_proj"]


def adapted(kind: str, dtype: torch.dtype = torch.float32, **lora: Any) -> Any:
    model = small_models.build(kind, vocab_size=256).to(dtype)
    attention = ["q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_b_proj"]
    chosen = {"r": 4, "lora_alpha": 6, "target_modules": attention, "target_parameters": PARAMETERS, **lora}
    model = peft.get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **chosen))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn_like(parameter) * 0.2
    prove_packing(model)
    return model.train()


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_and_logits_are_those_of_peft(kind: str) -> None:
    model = adapted(kind, use_rslora=True, rank_pattern={"gate_up_proj": 3}, alpha_pattern={"down_proj": 5})
    own, before = gradients(model, fused=False), model(batch()["input_ids"]).logits.detach()
    counts = fuse.install(model).counts
    layers = 1 if kind == "deepseek_v3" else 2
    assert counts["experts"] == layers and counts["LoRA experts"] == 2 * layers
    assert sum("experts" in name for name in own) == 4 * layers
    assert apart(gradients(model), own) < 1e-5
    assert torch.allclose(model(batch()["input_ids"]).logits, before, atol=1e-5)
    fuse.remove(model)
    assert apart(gradients(model, fused=False), own) == 0.0


def test_two_adapters_at_once_and_none_go_pefts_way() -> None:
    model = adapted("mixtral")
    other = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=PARAMETERS, init_lora_weights=False)
    model.add_adapter("other", other)
    model.base_model.set_adapter(["default", "other"])
    own = gradients(model, fused=False)
    fuse.install(model)
    assert apart(gradients(model), own) < 1e-5
    with torch.no_grad(), model.disable_adapter():
        alone = model(batch()["input_ids"]).logits
    fuse.remove(model)
    with torch.no_grad(), model.disable_adapter():
        assert torch.allclose(alone, model(batch()["input_ids"]).logits, atol=1e-5)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_made_again_in_backward_they_are_the_same(kind: str) -> None:
    model = adapted(kind)
    fuse.install(model)
    wanted = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert apart(gradients(model), wanted) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_proof_at_start_covers_experts(kind: str, dtype: torch.dtype) -> None:
    """In bf16 a token of OLMoE changes its expert with the order of sums; that is no fault."""
    proof = prove_fused(adapted(kind, dtype), packed=True)
    assert proof.ok and proof.difference < 1e-4, proof


def test_a_fault_in_16_bits_alone_is_seen_by_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("olmoe", torch.bfloat16)
    real = forward.Experts.backward

    def faulty(ctx: Any, *grads: torch.Tensor) -> Any:
        dx, *rest = real(ctx, *grads)
        return dx * (3.0 if dx.dtype == torch.bfloat16 else 1.0), *rest

    monkeypatch.setattr(forward.Experts, "backward", staticmethod(faulty))
    proof = prove_fused(model, packed=True)
    assert not proof.ok and "gradients differ" in proof.reason


FAULTS: dict[str, Any] = {
    "scale of LoRA": lambda real: (
        lambda module, name, trained, scale, dtype: real(module, name, trained, scale * 1.1, dtype)
    ),
    "an expert's neighbour": lambda real: (
        lambda module, name, trained, scale, dtype: real(
            module, name, tuple(None if t is None else t.roll(1, 0) for t in trained), scale, dtype
        )
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["olmoe", "gpt_oss"])
def test_a_fault_of_the_function_is_seen_by_the_proof(kind: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(kind)
    monkeypatch.setattr(forward._Stack, "of", FAULTS[fault](forward._Stack.of))
    proof = prove_fused(model, packed=True)
    assert not proof.ok and "gradients differ" in proof.reason
    assert all(not interface.takes_lora(module) for _, module in experts_of(model))


def test_lost_routing_gradient_is_seen_by_the_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """The router is frozen, and what reads its input trains: attention before it."""
    model = adapted("olmoe")
    real = forward.Experts.backward

    def lost(ctx: Any, *grads: torch.Tensor) -> Any:
        dx, dweights, *rest = real(ctx, *grads)
        return dx, torch.zeros_like(dweights), *rest

    monkeypatch.setattr(forward.Experts, "backward", staticmethod(lost))
    proof = prove_fused(model, packed=True)
    assert not proof.ok and "gradients differ" in proof.reason
