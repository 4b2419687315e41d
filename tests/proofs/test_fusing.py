"""The proof at start: it passes what is right, and takes off what is wrong, whatever is wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from halfbyte.layers import fuse, norm_gate, packing
from halfbyte.models import structure
from halfbyte.proofs import setting
from halfbyte.proofs.fusing import prove_fused
from tests.layers.test_fuse import adapted, fused


@pytest.mark.parametrize("name", ["llama", "opt", "bloom"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_right_layers_stay_on_and_nothing_else_changes(name: str, dtype: torch.dtype) -> None:
    model = adapted(name, dtype)
    model.eval()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    state = torch.random.get_rng_state()
    proof = prove_fused(model, packed=packing.installed(model) != "single")
    assert proof.ok and fused(model)
    assert "gradients as PEFT's" in proof.reason
    assert torch.equal(torch.random.get_rng_state(), state)
    assert not any(m.training for m in model.modules())
    for n, p in model.named_parameters():
        assert torch.equal(p, before[n]) and p.grad is None


def test_trained_rows_are_proven_on_a_few_rows_of_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows at the end of it too; embedding and head are not widened whole, and a wrong one is seen."""
    model = adapted("gemma3", torch.bfloat16, vocab_size=2000, trainable_token_indices=[1999, 1500])
    layer = model.get_input_embeddings().token_adapter
    with setting.few_tokens(model, exact=True):
        assert len(layer.base_layer.weight) == setting.tokens_of(structure.causal_lm(model)) == 258
        assert max(layer.token_indices["default"]) < 258
        assert layer.base_layer.weight.dtype == torch.float32
    assert layer.token_indices["default"] == [1999, 1500] and len(layer.base_layer.weight) == 2000
    proof = prove_fused(model, packed=True)
    assert proof.ok and proof.difference < 1e-5, proof.reason
    real = fuse.trained_rows
    for wrong in (lambda rows, values: (rows.flip(0), values), lambda rows, values: (rows, values * 1.1)):
        monkeypatch.setattr(fuse, "trained_rows", lambda layer, w=wrong: w(*real(layer)))
        assert "gradients differ" in prove_fused(model, packed=True).reason


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_drops_scores_by_a_call_of_its_own_is_no_difference(dtype: torch.dtype) -> None:
    model = adapted("gpt2", dtype)
    for module in model.modules():
        if hasattr(module, "attn_dropout"):
            module.attn_dropout.p = 0.1
    proof = prove_fused(model, packed=packing.installed(model) != "single")
    assert proof.ok, proof.reason


def wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fuse.lora_linear

    def scaled(x: Any, layer: Any, a: Any, b: Any, scale: float, p: float) -> Any:
        return real(x, layer, a, b, scale * 2, p)

    monkeypatch.setattr(fuse, "lora_linear", scaled)


def no_gradient_for_a(monkeypatch: pytest.MonkeyPatch) -> None:
    real = fuse.lora_linear
    monkeypatch.setattr(fuse, "lora_linear", lambda x, layer, a, b, s, p: real(x, layer, a.detach(), b, s, p))


def a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(norm_gate, "glu", broken)


@pytest.mark.parametrize(
    ("break_it", "word"),
    [(wrong_scale, "gradients differ"), (no_gradient_for_a, "got no gradient"), (a_crash, "no such instruction")],
)
def test_wrong_layers_are_taken_off_and_it_is_said(break_it: Any, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama")
    break_it(monkeypatch)
    proof = prove_fused(model, packed=True)
    assert not proof.ok
    assert word in proof.reason and "PEFT's own forward" in proof.reason
    assert not fused(model)
    assert all(p.grad is None for p in model.parameters())


def test_an_evaluation_that_changes_the_gradients_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted("llama")
    evaluated: list[bool] = []
    real = fuse.lora_linear

    def worn(x: Any, layer: Any, a: Any, b: Any, scale: float, p: float) -> Any:
        if not torch.is_grad_enabled():
            evaluated.append(True)
        return real(x, layer, a, b, scale * (1 + 1e-3 * bool(evaluated)), p)

    monkeypatch.setattr(fuse, "lora_linear", worn)
    proof = prove_fused(model, packed=True)
    assert not proof.ok and "an evaluation changes the gradients" in proof.reason
