"""Each fault that an engine can have is put into ours, and the proof at start must see it: that is what it is for.

Faults are put in where the work is done (attention, LoRA's product); nothing here looks into the proofs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from halfbyte.layers import attention, fuse, lora_linear, norm_gate, packed_attention, packing, shared_input, sight
from halfbyte.layers.kernels import CAUSAL, card
from halfbyte.proofs import setting
from halfbyte.proofs.fusing import prove_fused
from halfbyte.proofs.packing import prove_packing
from tests import plain_peft, small_models, tiny

WINDOW = 20  # longer than the proof's short rows, so that only its long row can show a window
LONGEST = 40
DTYPES = [torch.float32, torch.bfloat16]
Patch = pytest.MonkeyPatch


def windowed(dtype: torch.dtype) -> Any:
    return tiny.model("mistral", dtype=dtype, changes={"sliding_window": WINDOW})


def around_attention(patch: Patch, change: Callable[..., dict[str, Any]]) -> None:
    """The fused attention, with some of its arguments changed."""
    real = attention.attention

    def faulty(q: Any, k: Any, v: Any, lengths: Any, scale: Any, cos: Any, sin: Any, *more: Any, **named: Any) -> Any:
        given = {"q": q, "k": k, "v": v, "lengths": lengths, "scale": scale, "cos": cos, "sin": sin}
        given |= dict(zip(("levels", "slopes", "p", "seed"), more, strict=False)) | named
        return real(**given | change(given))

    patch.setattr(attention, "attention", faulty)


def window_ignored(patch: Patch) -> None:
    patch.setattr(sight.Sight, "reach", lambda *_: CAUSAL)


def wrong_scale(patch: Patch) -> None:
    around_attention(patch, lambda given: {"scale": given["scale"] * 1.05})


def wrong_scale_in_16_bits(patch: Patch) -> None:
    around_attention(patch, lambda x: {"scale": x["scale"] * (1.5 if x["q"].dtype == torch.bfloat16 else 1.0)})


def wrong_rotary(patch: Patch) -> None:
    around_attention(patch, lambda given: {} if given["sin"] is None else {"sin": -given["sin"]})


def mask_of_another_example(patch: Patch) -> None:
    around_attention(patch, lambda given: {"lengths": (sum(given["lengths"]),)})


def lost_bias(patch: Patch) -> None:
    real = lora_linear.LoraLinear.forward
    patch.setattr(lora_linear.LoraLinear, "forward", lambda ctx, x, a, b, bias, *rest: real(ctx, x, a, b, None, *rest))


def input_of_one_reader(patch: Patch) -> None:
    """Of linears that read one input, the gradient of the last alone."""
    real = shared_input.SharedGradient.give
    patch.setattr(shared_input.SharedGradient, "give", lambda self, add_to: real(self, lambda _: add_to(None)))


def wrong_lora_scale(patch: Patch) -> None:
    real = fuse.lora_linear
    patch.setattr(fuse, "lora_linear", lambda x, layer, a, b, scale, p: real(x, layer, a, b, scale * 1.05, p))


def mean_left_in(patch: Patch) -> None:
    from halfbyte.layers.kernels.cpu import norm

    real = norm.norm_backward
    patch.setattr(norm, "norm_backward", lambda dy, x, w, rstd, mean=None, **how: real(dy, x, w, rstd, None, **how))


def gelu_of_another_kind(patch: Patch) -> None:
    real = norm_gate.Activation.forward
    patch.setattr(norm_gate.Activation, "forward", lambda ctx, x, kind: real(ctx, x, norm_gate.SILU))


def other_slopes(patch: Patch) -> None:
    around_attention(patch, lambda given: {"slopes": given["slopes"].flip(0)})


def keys_for_values(patch: Patch) -> None:
    around_attention(patch, lambda given: {"v": given["k"]})


FUSED = {
    "window ignored": (windowed, window_ignored),
    "wrong scale": (windowed, wrong_scale),
    "wrong rotary": (windowed, wrong_rotary),
    "mask of another example": (windowed, mask_of_another_example),
    "wrong scale of LoRA": (windowed, wrong_lora_scale),
    "gradient of one reader": (windowed, input_of_one_reader),
    "lost bias": (lambda dtype: tiny.model("opt", dtype=dtype), lost_bias),
    "mean of a layer norm": (lambda dtype: tiny.model("gpt2", dtype=dtype), mean_left_in),
    "slope of a gelu": (lambda dtype: tiny.model("gpt2", dtype=dtype), gelu_of_another_kind),
    "slopes of other heads": (lambda dtype: tiny.model("bloom", dtype=dtype), other_slopes),
    "halves of a fused projection": (lambda dtype: tiny.model("gpt_neox", dtype=dtype), keys_for_values),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", FUSED)
def test_a_fault_of_the_fused_layers_is_seen(fault: str, dtype: torch.dtype, monkeypatch: Patch) -> None:
    build, put_in = FUSED[fault]
    right, model = (plain_peft.adapt(build(dtype), "all-linear") for _ in range(2))
    assert prove_packing(right, LONGEST).layout == prove_packing(model, LONGEST).layout == "cu_seq_lens"
    proof = prove_fused(right, packed=True, longest=LONGEST)
    assert proof.ok and proof.difference < 1e-4, proof
    put_in(monkeypatch)
    proof = prove_fused(model, packed=True, longest=LONGEST)
    assert not proof.ok and "gradients differ" in proof.reason
    assert not any(isinstance(module, fuse._Fast) for module in model.modules())


def test_a_fault_of_a_16_bit_kernel_alone_is_seen(monkeypatch: Patch) -> None:
    model = plain_peft.adapt(windowed(torch.bfloat16), "all-linear")
    prove_packing(model, LONGEST)
    wrong_scale_in_16_bits(monkeypatch)
    proof = prove_fused(model, packed=True, longest=LONGEST)
    assert not proof.ok and "gradients differ" in proof.reason


def around_packed(patch: Patch, **changes: Any) -> None:
    """The packed attention, with some of its arguments changed."""
    real = packed_attention._packed

    def faulty(module: Any, query: Any, key: Any, value: Any, pack: Any, asked: Any) -> Any:
        if "lengths" in changes:
            return real(module, query, key, value, card.PackLengths((sum(pack.lengths),)), asked)
        return real(module, query, key, value, pack, replace(asked, **changes))

    patch.setattr(packed_attention, "_packed", faulty)


PACKED: dict[str, tuple[Callable[[torch.dtype], Any], dict[str, Any]]] = {
    "window ignored": (windowed, {"sliding_window": None}),
    "wrong scale": (windowed, {"scaling": 0.3}),
    "mask of another example": (windowed, {"lengths": None}),
    "softcap dropped": (lambda dtype: small_models.build("gemma2", attn_logit_softcapping=2.0).to(dtype),
                        {"softcap": None}),
    "sinks dropped": (lambda dtype: small_models.build("gpt_oss").to(dtype), {"s_aux": None}),
}  # fmt: skip


def test_where_no_two_texts_share_a_forward_one_alone_is_proven(monkeypatch: Patch) -> None:
    """In less than half of the forwards, and the same layout; what concerns neighbours is not looked at."""
    passes: list[int] = []
    real = setting.logits
    monkeypatch.setattr(setting, "logits", lambda lm, rows: passes.append(len(rows)) or real(lm, rows))
    model = windowed(torch.bfloat16)
    assert prove_packing(model).ok
    all_passes = passes.copy()
    passes.clear()
    proof = prove_packing(model, alone=True)
    assert proof.ok and proof.layout == "cu_seq_lens" and "one text = on the stock path" in proof.reason
    assert set(passes) == {1} and 2 * len(passes) < len(all_passes)
    with monkeypatch.context() as patch:
        around_packed(patch, lengths=None)
        assert prove_packing(model, alone=True).layout == "cu_seq_lens" != prove_packing(model).layout


def test_a_fault_of_one_texts_attention_is_seen(monkeypatch: Patch) -> None:
    """Alone a text is left to stock attention, but for what that cannot do."""
    real, model = packed_attention._eager, PACKED["softcap dropped"][0](torch.float32)
    assert prove_packing(model, alone=True).layout == "cu_seq_lens"
    for changes in ({"softcap": None}, {"scaling": 0.3}):
        monkeypatch.setattr(
            packed_attention, "_eager", lambda q, k, v, mask, asked, c=changes: real(q, k, v, mask, replace(asked, **c))
        )
        assert "logits differ" in prove_packing(model, alone=True).reason, changes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("fault", PACKED)
def test_a_fault_of_packed_attention_is_seen(fault: str, dtype: torch.dtype, monkeypatch: Patch) -> None:
    build, changes = PACKED[fault]
    model = build(dtype)
    assert prove_packing(model, LONGEST).layout == "cu_seq_lens"
    around_packed(monkeypatch, **changes)
    proof = prove_packing(model, LONGEST)
    assert proof.layout == "rows" and "cu_seq_lens: logits differ" in proof.reason
    assert packing.installed(model) == "rows"


def test_what_costs_too_much_is_not_tried_and_it_is_said(monkeypatch: Patch) -> None:
    assert "not tried" not in prove_packing(windowed(torch.float32), LONGEST).reason
    assert "not tried" not in prove_packing(windowed(torch.float32), WINDOW).reason
    monkeypatch.setattr(setting, "LONG_ROW_PRODUCTS", 1)
    proof = prove_packing(windowed(torch.float32), LONGEST)
    assert proof.ok and f"rows longer than the window of {WINDOW} were not tried" in proof.reason


def test_a_proof_in_16_bits_leaves_weights_and_dtypes_as_they_were() -> None:
    model = plain_peft.adapt(windowed(torch.bfloat16), "all-linear")
    before = {n: (p.data_ptr(), p.dtype, p.shape) for n, p in (*model.named_parameters(), *model.named_buffers())}
    prove_packing(model, LONGEST)
    prove_fused(model, packed=True, longest=LONGEST)
    after = {n: (p.data_ptr(), p.dtype, p.shape) for n, p in (*model.named_parameters(), *model.named_buffers())}
    assert after == before
