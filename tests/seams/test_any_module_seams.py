"""What `quantize_model` stands on in torch, transformers, bitsandbytes and accelerate."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from accelerate.utils import BnbQuantizationConfig
from accelerate.utils import load_and_quantize_model as theirs
from torch import nn
from transformers import BertConfig, BertForMaskedLM, ViTConfig, ViTForImageClassification

import halfbyte


def test_accelerates_arguments_are_ours_in_the_same_order() -> None:
    assert list(inspect.signature(theirs).parameters) == list(
        inspect.signature(halfbyte.load_and_quantize_model).parameters
    )


def test_every_field_of_accelerates_configuration_is_known() -> None:
    assert {field.name for field in dataclasses.fields(BnbQuantizationConfig)} == {
        "load_in_8bit", "llm_int8_threshold", "load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant",
        "bnb_4bit_compute_dtype", "torch_dtype", "skip_modules", "keep_in_fp32_modules",
    }  # fmt: skip
    assert halfbyte.BnbQuantizationConfig is BnbQuantizationConfig


def test_accelerates_hook_is_on_a_modules_own_forward_and_keeps_its_signature() -> None:
    layer = nn.Linear(2, 2)
    signature = inspect.signature(layer.forward)
    add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert inspect.signature(layer.forward) == signature
    layer._hf_hook.execution_device = "meta"  # where inputs go; its weights stay
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
        layer.forward(torch.zeros(1, 2))  # past torch's own hooks, as PEFT before 0.21 calls what it adapts


def test_torchs_encoder_asks_these_attributes_before_its_fast_path() -> None:
    """It takes the linears' weights without calling them: seen by a hook-free layer whose forward is never called."""

    class Called(nn.Linear):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            type(self).calls += 1
            return super().forward(x)

    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    layer.linear1.__class__ = Called
    encoder = nn.TransformerEncoder(layer, 1).eval()
    x, mask = torch.randn(2, 3, 8), torch.tensor([[False] * 3, [False, False, True]])
    with torch.no_grad():
        encoder(x, src_key_padding_mask=mask)
        assert Called.calls == 0
        encoder.layers[0].activation_relu_or_gelu, encoder.use_nested_tensor = 0, False
        encoder(x, src_key_padding_mask=mask)
    assert Called.calls == 1


def test_a_transformers_model_names_its_body_and_computes_its_buffers_again() -> None:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    model: Any = ViTForImageClassification(ViTConfig(image_size=8, patch_size=4, **sizes))
    assert (
        isinstance(getattr(model, model.base_model_prefix), nn.Module) and model.classifier not in model.vit.modules()
    )
    with torch.device("meta"):
        bert: Any = BertForMaskedLM(
            BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
        )
    embeddings = bert.bert.embeddings
    assert {"position_ids", "token_type_ids"} <= embeddings._non_persistent_buffers_set
    for parameter in bert.parameters():
        parameter._is_hf_initialized = True  # then `_init_weights` leaves it, even on the meta device
    embeddings.position_ids = torch.full(embeddings.position_ids.shape, -1)
    with torch.no_grad():
        bert._init_weights(embeddings)
    assert embeddings.position_ids.tolist() == [list(range(512))]
    assert bert.cls.predictions.decoder is bert.get_output_embeddings()


def test_packed_weights_become_a_layers_parameter_without_a_copy() -> None:
    layer: Any = bnb.nn.Linear4bit(64, 8, bias=False, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(torch.randn(8, 64), requires_grad=False, quant_type="nf4").to("cpu")
    state = {name.removeprefix("weight."): t for name, t in layer.state_dict().items() if name != "weight"}
    codes = layer.weight.data
    made: Any = bnb.nn.Params4bit.from_prequantized(codes, dict(state), device="cpu", module=layer)
    assert made.data_ptr() == codes.data_ptr() and made.quant_state.absmax.data_ptr() == state["absmax"].data_ptr()
    eight: Any = bnb.nn.Int8Params(torch.zeros(4, 8, dtype=torch.int8), requires_grad=False, SCB=torch.ones(4))
    assert eight.SCB is not None and eight.CB is None and not eight.has_fp16_weights
