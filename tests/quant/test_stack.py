"""One expert of a stack against numpy: codes and scales as QLoRA and LLM.int8 define them."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from halfbyte.quant import formats
from halfbyte.quant.stack import ExpertStack
from halfbyte.recipe.schema import Quant
from tests.quant.test_dequantise import CODES, ROUNDING

SHAPE = (37, 24, 40)  # 15 blocks an expert, 555 in all: experts begin and end within the nested blocks of 256


def stack_of(values: torch.Tensor, quant: Quant, dtype: torch.dtype) -> ExpertStack:
    encoder = formats.of(quant).encoder(quant, tuple(values.shape), dtype, "experts")
    codes = torch.from_numpy(encoder.codes(0, values.reshape(-1)))
    return formats.of(quant).stack({"": codes, **encoder.parts()}, tuple(values.shape), quant, dtype)


def by_definition(stack: Any) -> np.ndarray:
    """All experts in fp64, (E, a, b)."""
    codes = stack.data.numpy()
    if hasattr(stack, "SCB"):
        return codes.astype(np.float64) * (stack.SCB.numpy().astype(np.float64) / 127).reshape(*SHAPE[:2], 1)
    state = stack.quant_state
    flat = codes.reshape(-1)
    values = np.array(CODES[state.quant_type])[np.stack([flat >> 4, flat & 15], 1).reshape(-1)]
    scales = state.absmax.numpy()
    if state.nested:
        outer = state.state2.absmax.numpy().astype(np.float64)[np.arange(len(scales)) // 256]
        scales = state.state2.code.numpy().astype(np.float64)[scales] * outer + float(state.offset)
    return (values.reshape(-1, 64) * scales.astype(np.float64)[:, None]).reshape(SHAPE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "double"), [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False), ("int8", False)]
)
def test_an_expert_is_what_its_format_defines(kind: str, double: bool, dtype: torch.dtype) -> None:
    values = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).to(dtype)
    quant = Quant(type=kind, double_quant=double) if kind != "int8" else Quant(type="int8")
    stack = stack_of(values, quant, dtype)
    wanted = by_definition(stack)
    for e in (0, 1, 16, 17, 36):
        got = stack.expert(e, dtype)
        assert (got.shape, got.dtype) == (SHAPE[1:], dtype)
        allowed = np.abs(wanted[e]) * (ROUNDING[dtype] + 4 * 2.0**-24) + 1e-37
        assert (np.abs(got.double().numpy() - wanted[e]) <= allowed).all()
        assert torch.equal(stack[torch.tensor(e)], got)
        into = torch.empty(SHAPE[1:], dtype=dtype)
        assert stack.expert(e, dtype, out=into) is into
        assert torch.equal(into, got)


def test_a_stack_is_a_frozen_parameter_of_its_module_with_the_shape_of_its_weights() -> None:
    stack = stack_of(torch.randn(SHAPE), Quant(type="nf4"), torch.float32)
    module = nn.Module()
    module.gate_up_proj = stack
    assert [(name, p.shape, p.ndim, p.requires_grad) for name, p in module.named_parameters()] == [
        ("gate_up_proj", SHAPE, 3, False)
    ]
    assert len(stack) == SHAPE[0]
    assert stack.nbytes == math.prod(SHAPE) // 2  # of the codes
    with pytest.raises(IndexError):
        stack.expert(37, torch.float32)


def test_experts_that_share_a_block_are_refused() -> None:
    encoder = formats.of(Quant()).encoder(Quant(), (4, 3, 40), torch.float32, "experts")
    codes = torch.from_numpy(encoder.codes(0, torch.randn(480)))
    with pytest.raises(ValueError, match="whole blocks"):
        formats.of(Quant()).stack({"": codes, **encoder.parts()}, (4, 3, 40), Quant(), torch.float32)
