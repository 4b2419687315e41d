"""Which tensor of a checkpoint is held how, and the bytes that it takes: every room asks here, none decides itself."""

from collections.abc import Iterable
from typing import Literal

from halfbyte.models.tensors import TensorSpec
from halfbyte.quant import formats
from halfbyte.recipe.schema import Quant


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a dotted tensor or module name holds one of `patterns` as a run of whole dotted parts.

    `mlp.down_proj` matches `model.layers.0.mlp.down_proj.weight`; `down` does not.
    """
    dotted = f".{name}."
    return any(f".{pattern.strip('.')}." in dotted for pattern in patterns)


def encoding(spec: TensorSpec, quant: Quant) -> Literal["quantised", "compute", "fp32"]:
    """How one tensor is held: in the recipe's number format, in the compute dtype, or in fp32."""
    if matches(spec.name, quant.fp32_modules):
        return "fp32"
    if not quant.quantises or matches(spec.name, quant.skip_modules):
        return "compute"
    return "quantised" if spec.role in ("linear", "expert") else "compute"


def encoded_bytes(spec: TensorSpec, quant: Quant, compute_itemsize: int) -> int:
    """Resident bytes of one tensor under the policy; `compute_itemsize` is 2 for bf16/fp16 and 4 for fp32."""
    held = encoding(spec, quant)
    if held == "quantised":
        return formats.of(quant).nbytes(spec.out_in, quant)
    return spec.numel * (4 if held == "fp32" else compute_itemsize)
