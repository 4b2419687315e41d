"""Which tensor of a checkpoint is held how, and the bytes that it takes: every room asks here, none decides itself."""

import re
from collections.abc import Iterable
from typing import Literal

from halfbyte.errors import BaseModelError
from halfbyte.models.tensors import TensorSpec
from halfbyte.quant import formats
from halfbyte.recipe.schema import Quant
from halfbyte.upstream.transformers import has_experts_interface

# Model types whose code keeps experts in parameters and does not run them through transformers' experts interface, so
# nothing of ours could dequantise one expert: the tensors, and what `quant.skip_modules` calls them.
_ALL = r"expert"
_FIXED = {
    "llama4": (_ALL, "experts"), "llama4_text": (_ALL, "experts"), "dbrx": (_ALL, "experts"),
    "longcat_flash": (_ALL, "experts"), "step3p7": (_ALL, "experts"),
    "jetmoe": (r"(input|output)_linear", "input_linear,output_linear"),
    "inkling_text": (r"shared_expert", "shared_experts"),
}  # fmt: skip
FIXED_EXPERTS = {kind: v for kind, v in _FIXED.items() if v[0] != _ALL or not has_experts_interface(kind)}


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a dotted tensor or module name holds one of `patterns` as a run of whole dotted parts. `mlp.down_proj`
    matches `model.layers.0.mlp.down_proj.weight`; `down` does not."""
    dotted = f".{name}."
    return any(f".{pattern.strip('.')}." in dotted for pattern in patterns)


def encoding(spec: TensorSpec, quant: Quant) -> Literal["quantised", "compute", "fp32"]:
    """How one tensor is held: in the recipe's number format, in the compute dtype, or in fp32."""
    if matches(spec.name, quant.fp32_modules):
        return "fp32"
    if not quant.quantises or matches(spec.name, quant.skip_modules):
        return "compute"
    return "quantised" if spec.role in ("linear", "expert") and formats.of(quant).takes(spec) else "compute"


def head_in_eight_bits(head_bytes: int, others_bytes: int) -> bool:
    """Whether decoding holds the head in 8 bits besides: where it is a sixteenth of what a token reads, or more."""
    return 15 * head_bytes >= others_bytes


def encoded_bytes(spec: TensorSpec, quant: Quant, compute_itemsize: int) -> int:
    """Resident bytes of one tensor under the policy; `compute_itemsize` is 2 for bf16/fp16 and 4 for fp32."""
    encoded = encoding(spec, quant)
    if encoded == "quantised":
        return formats.of(quant).nbytes_of(spec, quant)
    return spec.numel * (4 if encoded == "fp32" else compute_itemsize)


def check_experts(model_type: str, specs: Iterable[TensorSpec], quant: Quant) -> None:
    """Refuse a mixture whose experts cannot be held in few bits; by its type and tensors, before anything is loaded.
    Raises BaseModelError: naming the modules that can be left as they are."""
    experts = [s for s in specs if s.role == "expert" and encoding(s, quant) == "quantised"]
    if experts and formats.of(quant).rounds_inputs(quant):
        raise BaseModelError(
            f"quant.llm_int8_threshold is for linear layers, and the experts of a {model_type} are none.",
            fix="quant.llm_int8_threshold: null, which rounds no activations",
        )
    pattern, modules = FIXED_EXPERTS.get(model_type, ("", ""))
    fixed = [s for s in experts if pattern and re.search(pattern, s.name)]
    if fixed:
        numel = sum(s.numel for s in fixed)
        raise BaseModelError(
            f"transformers' code of a {model_type} computes with all its experts at once, so quant.type {quant.type} "
            f"cannot hold them: {len(fixed)} tensors such as {fixed[0].name} {fixed[0].shape}, {numel / 1e9:.3f} "
            "billion weights.",
            fix=f"leave them in 16 bits ({2 * numel / 1e9:.1f} GB): --set 'quant.skip_modules=[{modules}]'",
        )
