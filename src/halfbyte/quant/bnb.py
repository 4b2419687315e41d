"""bitsandbytes' layers, made safe to train.

Why: on CPUs with AVX512-BF16 an eval forward of `bitsandbytes.nn.Linear4bit` repacks its weight in place; every later
training step then runs a kernel without autograd, and all LoRA gradients silently become None
(`bitsandbytes/nn/modules.py`, `Linear4bit.forward`). `formats.settle` turns that repacking off on each instance.
What an 8-bit layer needs is told in `int8.py`.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from halfbyte.quant import experts, formats
from halfbyte.recipe.schema import Quant
from halfbyte.types import Model


def _classes(*names: str) -> tuple[type, ...]:
    """bitsandbytes' own layers; none where nobody has imported it, which takes seconds: then there is no such layer."""
    layers = sys.modules.get("bitsandbytes.nn")
    return () if layers is None else tuple(getattr(layers, name) for name in names)


def linears_4bit(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every `bitsandbytes.nn.Linear4bit` of a model, with its name."""
    kinds = _classes("Linear4bit")
    return [(name, module) for name, module in model.named_modules() if isinstance(module, kinds)]


def quantised_linears(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Every quantised linear layer of a model, with its name; also where it holds nothing yet."""
    kinds, modules = _classes("Linear4bit", "Linear8bitLt"), model.named_modules()
    return [(name, module) for name, module in modules if isinstance(module, kinds) or formats.is_quantised(module)]


def forget_deserialising(model: Model) -> None:
    """Let a model that was opened pre-quantised be saved again. transformers keeps the conversions of a load and
    reverts them in `save_pretrained`, but cannot revert this one (`core_model_loading.py`, `ConversionOps.reverse_op`);
    without it the tensors are written as they are held."""

    def is_lasting(conversion: object) -> bool:
        ops = {type(op).__name__ for op in getattr(conversion, "operations", ())}
        return not ops & {"Bnb4bitDeserialize", "Bnb8bitDeserialize", "Deserialize"}

    if conversions := getattr(model, "_weight_conversions", None):
        model._weight_conversions = list(filter(is_lasting, conversions))


def set_compute_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Make every 4-bit layer multiply in `dtype`, forward and backward. The backward dequantises to `quant_state.dtype`
    and the forward to the input's dtype (`MatMul4Bit` in `bitsandbytes/autograd/_functions.py`): unless the two are one
    dtype, forward and backward use different weights."""
    for _, module in linears_4bit(model):
        module.compute_dtype, module.compute_type_is_set = dtype, True
        if module.weight.quant_state is not None:
            module.weight.quant_state.dtype = dtype
    for _, stack in experts.stacks(model):
        stack.compute_dtype = dtype


def state_tensors(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """(owner, attribute) of each tensor that quantised weights need beside their codes."""
    for module in model.modules():
        yield from formats.of_module(module).beside(module)
    for _, stack in experts.stacks(model):
        yield from formats.of_module(stack.holder).beside(stack.holder)


def held_tensors(model: nn.Module, *, buffers: bool = True) -> list[torch.Tensor]:
    """Parameters, buffers, and the scales and tables of quantised weights; each storage once, without empty ones."""
    beside = (getattr(*each) for each in state_tensors(model))
    parts = (*(p.data for p in model.parameters()), *beside, *(model.buffers() if buffers else ()))
    return list({t.data_ptr(): t for t in parts if t.device.type != "meta" and t.numel()}.values())


def resident_bytes(model: nn.Module) -> int:
    """Bytes of every parameter with the scales and tables of quantised weights; no buffers."""
    return sum(t.nbytes for t in held_tensors(model, buffers=False))


def quantised_linear(weight: torch.Tensor, device: str = "cpu") -> Any:
    """A safe Linear4bit (NF4, double quantisation) that holds one (out, in) weight and computes in its dtype."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], False, weight.dtype, quant_type="nf4", device="meta")
    layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
    layer.support_avx512bf16_for_cpu = False
    return layer


def shape_of(weight: torch.Tensor) -> tuple[int, ...]:
    """The shape of the matrix that a parameter stands for, also where its bytes are codes in a shape of their own."""
    state = getattr(weight, "quant_state", None)
    return tuple(weight.shape if state is None else state.shape)


def planned_bytes(model: nn.Module, quant: Quant) -> int:
    """`resident_bytes` of an empty model on the meta device whose quantised layers are there but hold nothing yet."""
    linears = [module for _, module in quantised_linears(model)]
    within = {id(module.weight) for module in linears}
    stacks = [stack for _, stack in experts.stacks(model)]
    within |= {id(stack) for stack in stacks}
    shapes = [(m.out_features, m.in_features) for m in linears] + [tuple(stack.shape) for stack in stacks]
    codes = sum(formats.of(quant).nbytes(shape, quant) for shape in shapes)
    return codes + sum(p.nbytes for p in model.parameters() if id(p) not in within)
