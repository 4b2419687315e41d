"""The only door to bitsandbytes: which tensor gets which encoding, and a Linear4bit that is safe to train.

Why: on CPUs with AVX512-BF16 an eval forward of `bitsandbytes.nn.Linear4bit` repacks its weight in place; every later
training step then runs a kernel without autograd, and all LoRA gradients silently become None
(`bitsandbytes/nn/modules.py`, `Linear4bit.forward`). `make_safe` turns that repacking off on each instance, always.
Source: QLoRA, arXiv:2305.14314; NF4 in its appendix E.
Cost: none at run time; a base is quantised by bitsandbytes itself while transformers loads it.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from halfbyte.errors import BaseModelError
from halfbyte.models.tensors import NESTED_BLOCK, TensorSpec, nf4_bytes
from halfbyte.quant import nf4_cpu

if TYPE_CHECKING:
    import torch

    from halfbyte.recipe.schema import Quant

Encoding = Literal["4bit", "compute", "fp32"]
# Subclasses of nn.Linear in transformers whose forward is the plain product, and which its loader leaves in 16 bits.
PLAIN_LINEARS = frozenset(("FalconLinear",))


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a dotted tensor or module name holds one of `patterns` as a run of whole dotted parts.

    `mlp.down_proj` matches `model.layers.0.mlp.down_proj.weight`; `down` does not.
    """
    dotted = f".{name}."
    return any(f".{pattern.strip('.')}." in dotted for pattern in patterns)


def encoding(spec: TensorSpec, quant: Quant) -> Encoding:
    """The policy: how one tensor of a checkpoint is held in memory. Every room asks here, none decides on its own."""
    if matches(spec.name, quant.fp32_modules):
        return "fp32"
    if quant.type == "none" or matches(spec.name, quant.skip_modules):
        return "compute"
    return "4bit" if spec.role in ("linear", "expert") else "compute"


def encoded_bytes(spec: TensorSpec, quant: Quant, compute_itemsize: int) -> int:
    """Resident bytes of one tensor under the policy; `compute_itemsize` is 2 for bf16/fp16 and 4 for fp32."""
    kind = encoding(spec, quant)
    if kind == "4bit":
        return nf4_bytes(spec.numel, quant.block_size, quant.double_quant)
    return spec.numel * (4 if kind == "fp32" else compute_itemsize)


def bnb_config(quant: Quant, compute_dtype: torch.dtype, head_names: Iterable[str] = ()) -> Any | None:
    """`BitsAndBytesConfig` for `from_pretrained`, or None for `quant.type: none`.

    Args:
        head_names: modules that transformers would skip by default (the output head); naming any module of one's own
            replaces that default (`transformers/quantizers/base.py`, `get_modules_to_not_convert`), so both are given.
    """
    if quant.type == "none":
        return None
    from transformers import BitsAndBytesConfig

    skip = [*quant.skip_modules, *quant.fp32_modules]
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant.type,
        bnb_4bit_use_double_quant=quant.double_quant,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=[*head_names, *skip] if skip else None,
    )


def encode(
    values: torch.Tensor, quant: Quant, name: str, *, pool: Executor | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """One matrix in 4 bits, and what a checkpoint holds beside it, as bitsandbytes writes them.

    Args:
        values: bf16, fp16 or fp32, on the CPU; its dtype is what the weight is later dequantised to.
        name: what an error calls the tensor.

    Returns:
        packed: (ceil(n / 2), 1) uint8.
        parts: `absmax`, `quant_map`, `quant_state.bitsandbytes__nf4` and with double quantisation `nested_*`.

    Raises:
        BaseModelError: NaN or Inf among the values: they would turn a whole block into nonsense.
    """
    import torch

    flat = values.detach().reshape(-1)
    array = (flat.view(torch.uint16) if flat.dtype == torch.bfloat16 else flat).numpy()
    codes, scales, bad = nf4_cpu.quantise(array, quant.type, quant.block_size, pool=pool)
    if bad >= 0:
        raise not_finite(flat[bad : bad + quant.block_size], bad, tuple(values.shape), name)
    parts = scales_of(torch.from_numpy(scales), values.shape, values.dtype, quant)
    return torch.from_numpy(codes).unsqueeze(1), parts


def not_finite(block: torch.Tensor, start: int, shape: tuple[int, ...], name: str) -> BaseModelError:
    """The error that names the first NaN or Inf of a block, which begins at element `start` of the tensor."""
    where = int((~block.isfinite()).nonzero()[0])
    at = tuple(int(i) for i in np.unravel_index(start + where, shape))
    return BaseModelError(
        f"{name} holds {block[where].item()} at {at}; a weight that is not finite cannot be quantised.",
        fix="download the checkpoint again, or use another revision: this one is broken",
    )


def scales_of(absmax: torch.Tensor, shape: Any, dtype: torch.dtype, quant: Quant) -> dict[str, torch.Tensor]:
    """What a checkpoint holds beside the packed codes of a weight with these block scales (blocks,) fp32."""
    import bitsandbytes.functional as bnb_f
    import torch

    kept: dict[str, Any] = {
        "shape": torch.Size(shape),
        "dtype": dtype,
        "blocksize": quant.block_size,
        "code": bnb_f.get_4bit_type(quant.type, device="cpu"),
        "quant_type": quant.type,
    }
    if quant.double_quant:  # as `bitsandbytes.functional.quantize_4bit` does it
        offset = absmax.mean()
        absmax, nested = bnb_f.quantize_blockwise(absmax - offset, blocksize=NESTED_BLOCK)
        kept |= {"offset": offset, "state2": nested}
    parts: dict[str, torch.Tensor] = bnb_f.QuantState(absmax=absmax, **kept).as_dict(packed=True)
    return parts


def linears_4bit(model: torch.nn.Module) -> list[tuple[str, Any]]:
    """Every `bitsandbytes.nn.Linear4bit` of a model, with its name."""
    import bitsandbytes as bnb

    return [(name, module) for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]


def plain_linears(model: Any, exempt: Iterable[str]) -> list[tuple[str, Any]]:
    """(name, module) of what transformers passes over: it puts `nn.Linear` itself into 4 bits, not Falcon's own
    subclass of it, whose forward is the same product. Modules named by `exempt` and the output head are not meant.
    """
    from torch import nn

    patterns = tuple(exempt)
    return [
        (name, module)
        for name, module in model.named_modules()
        if type(module).__name__ in PLAIN_LINEARS
        and isinstance(module, nn.Linear)
        and module is not model.get_output_embeddings()
        and not matches(name, patterns)
    ]


def replace_plain_linears(model: Any, settings: Any, exempt: Iterable[str], *, pre_quantised: bool) -> None:
    """On an empty model, as transformers' `replace_with_bnb_linear` does it for `nn.Linear`; `settings` is a
    `BitsAndBytesConfig`. A checkpoint's packed weights are bytes: pre-quantised layers wait for those."""
    for name, module in plain_linears(model, exempt):
        made = _empty_linear4bit(
            module,
            settings.bnb_4bit_compute_dtype,
            double_quant=settings.bnb_4bit_use_double_quant,
            kind=settings.bnb_4bit_quant_type,
        )
        if pre_quantised:
            made.weight.data = made.weight.data.to(settings.bnb_4bit_quant_storage)
        made.source_cls = type(module)
        made.requires_grad_(False)
        model.set_submodule(name, made)


def quantise_plain_linears(model: Any, quant: Quant, dtype: torch.dtype) -> list[str]:
    """Put plain linears of a loaded model into 4 bits, one at a time, on this instance. Returns the names."""
    found = plain_linears(model, (*quant.skip_modules, *quant.fp32_modules)) if quant.type != "none" else []
    if not found:
        return []
    import bitsandbytes as bnb
    from torch import nn

    for name, module in found:
        made = _empty_linear4bit(module, dtype, double_quant=quant.double_quant, kind=quant.type)
        values = made.weight.__dict__  # block size, type and module, as Linear4bit chose them
        made.weight = bnb.nn.Params4bit(module.weight.data, requires_grad=False, **values).to(module.weight.device)
        if module.bias is not None:
            made.bias = nn.Parameter(module.bias.data, requires_grad=False)
        made.train(module.training)
        model.set_submodule(name, made)
    return [name for name, _ in found]


def _empty_linear4bit(module: Any, dtype: torch.dtype, *, double_quant: bool, kind: str) -> Any:
    """A `Linear4bit` on the meta device with the sizes of a linear layer."""
    import bitsandbytes as bnb
    import torch

    with torch.device("meta"):
        return bnb.nn.Linear4bit(
            module.in_features,
            module.out_features,
            module.bias is not None,
            dtype,
            compress_statistics=double_quant,
            quant_type=kind,
        )


def make_safe(model: torch.nn.Module) -> int:
    """Keep an eval forward from repacking 4-bit weights in place. Returns how many layers were made safe.

    A weight that an earlier eval forward has already repacked is unpacked again by reading the layer's state dict once
    (bitsandbytes' own inverse, `Linear4bit._save_to_state_dict`).
    """
    layers = linears_4bit(model)
    for _, module in layers:
        module.support_avx512bf16_for_cpu = False
        if getattr(module.weight.quant_state, "packing_format_for_cpu", False):
            module.state_dict()
    return len(layers)


def forget_deserialising(model: Any) -> None:
    """Let a model that was opened pre-quantised be saved again.

    transformers keeps the conversions of a load and reverts them in `save_pretrained`, but cannot revert this one
    (`core_model_loading.py`, `ConversionOps.reverse_op`); without it the tensors are written as they are held.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions:
        model._weight_conversions = [
            entry
            for entry in conversions
            if not any(type(op).__name__ == "Bnb4bitDeserialize" for op in getattr(entry, "operations", ()))
        ]


def set_compute_dtype(model: torch.nn.Module, dtype: torch.dtype) -> list[str]:
    """Make every 4-bit layer multiply in `dtype`, forward and backward. Returns the names whose dtype changed.

    The backward dequantises to `quant_state.dtype` and the forward to the input's dtype (`MatMul4Bit` in
    `bitsandbytes/autograd/_functions.py`): unless the two are one dtype, forward and backward use different weights.
    """
    changed = []
    for name, module in linears_4bit(model):
        state = module.weight.quant_state
        if module.compute_dtype != dtype or (state is not None and state.dtype != dtype):
            changed.append(name)
        module.compute_dtype = dtype
        module.compute_type_is_set = True
        if state is not None:
            state.dtype = dtype
    return changed


def resident_bytes(model: torch.nn.Module) -> int:
    """Bytes of every parameter (each storage once) with the scales and code tables of 4-bit weights; no buffers."""
    seen: set[int] = set()
    total = 0

    def add(tensor: Any) -> None:
        nonlocal total
        if tensor is not None and tensor.device.type != "meta" and tensor.data_ptr() not in seen:
            seen.add(tensor.data_ptr())
            total += tensor.numel() * tensor.element_size()

    for parameter in model.parameters():
        add(parameter)
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            for tensor in (state.absmax, state.code, getattr(state, "offset", None)):
                add(tensor)
            state = state.state2 if getattr(state, "nested", False) else None
    return total


def quantised_linear(weight: torch.Tensor, device: str = "cpu") -> Any:
    """A safe Linear4bit (NF4, double quantisation) that holds one (out, in) weight and computes in its dtype."""
    import bitsandbytes as bnb

    made = bnb.nn.Linear4bit(weight.shape[1], weight.shape[0], False, weight.dtype, quant_type="nf4", device="meta")
    made.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4").to(device)
    made.support_avx512bf16_for_cpu = False
    return made


def planned_bytes(model: torch.nn.Module, quant: Quant) -> int:
    """`resident_bytes` of an empty model on the meta device whose 4-bit layers are there but hold nothing yet."""
    in_4bit = {id(module.weight) for _, module in linears_4bit(model)}
    return sum(
        nf4_bytes(p.numel(), quant.block_size, quant.double_quant) if id(p) in in_4bit else p.numel() * p.element_size()
        for p in model.parameters()
    )


def is_4bit(module: Any) -> bool:
    """Whether a module is a `bitsandbytes.nn.Linear4bit` whose weight is quantised."""
    return getattr(getattr(module, "weight", None), "quant_state", None) is not None
