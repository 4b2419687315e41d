"""What `layers/experts` stands on: transformers' experts interface, and PEFT's wrapper of a parameter."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig
from transformers.integrations import moe

from halfbyte.upstream import transformers as upstream
from halfbyte.upstream.peft import EXPERT_LORA
from tests import small_models

KINDS = ("mixtral", "qwen3_moe", "gpt_oss")


def experts_of(model: Any) -> list[Any]:
    return [m for m in model.modules() if hasattr(m, "is_transposed") and hasattr(m, "config")]


def test_a_registered_function_is_called_with_the_modules_own_arguments_and_more() -> None:
    asked = []

    def ours(self: Any, hidden_states: Any, top_k_index: Any, top_k_weights: Any, *, more: Any = None) -> Any:
        asked.append((hidden_states.shape, top_k_index.shape, top_k_weights.shape, more))
        return torch.zeros_like(hidden_states)

    moe.ALL_EXPERTS_FUNCTIONS.register("seam_test", ours)
    for kind in KINDS:
        asked.clear()
        model = small_models.build(kind)
        model.set_experts_implementation("seam_test")
        assert upstream.experts_implementation(model)[""] == "seam_test"
        modules = experts_of(model)
        assert {m.config._experts_implementation for m in modules} == {"seam_test"}
        model(torch.arange(6)[None])
        assert asked == [((6, 64), (6, 2), (6, 2), None)] * len(modules)
        modules[0](torch.zeros(1, 64), torch.zeros(1, 2, dtype=torch.long), torch.zeros(1, 2), more=3)
        assert asked[-1][-1] == 3
        model.set_experts_implementation(None)
        assert upstream.experts_implementation(model)[""] in ("grouped_mm", "eager")
        assert "experts_implementation" not in str(model.config.to_dict())


def test_the_flags_of_an_experts_module() -> None:
    flags = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts", "down_proj")
    for kind in KINDS:
        (first, *_) = experts_of(small_models.build(kind))
        assert all(hasattr(first, flag) for flag in flags)
        assert (first._apply_gate.__func__ is moe._default_apply_gate) == (kind != "gpt_oss")


@pytest.mark.skipif(not EXPERT_LORA.there, reason=EXPERT_LORA.reason or "there")
def test_how_peft_wraps_two_parameters_of_one_module() -> None:
    """The first parameter has the inner wrapper; A is (E r, in), B (out, r E), where experts are fastest."""
    config = LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj", "experts.gate_up_proj"])
    model = peft.get_peft_model(small_models.build("mixtral"), config)
    outer = model.base_model.model.model.layers[0].mlp.experts
    assert (outer.parameter_name, outer.base_layer.parameter_name) == ("down_proj", "gate_up_proj")
    assert type(outer).__name__ == type(outer.base_layer).__name__ == "ParamWrapper"
    inner, width = outer.base_layer, outer.get_base_layer().gate_up_proj.shape[1]
    assert inner.lora_A["default"].weight.shape == (4 * 2, 64) and inner.lora_B["default"].weight.shape == (
        width,
        2 * 4,
    )
    a, b = (torch.randn_like(m["default"].weight) for m in (inner.lora_A, inner.lora_B))
    inner.lora_A["default"].weight.data, inner.lora_B["default"].weight.data = a, b
    expert = b.view(width, 2, 4)[:, :, 3] @ a.view(4, 2, 64)[3] * inner.scaling["default"]
    assert torch.allclose(inner.get_delta_weight("default")[3], expert, atol=1e-6)
