"""What other programs call the layers of a language model. Under names that they do not have an adapter may be served
without effect and without an error, so what is not in these lists is refused.

Source: vLLM 0.33, `model_executor/models` (where a class mounts its language model, `SupportsLoRA`,
`packed_modules_mapping`); mlx-lm d78bf58e, `mlx_lm/models`. `tests/export/test_names.py` reads both where they are.
"""

from collections.abc import Iterable
from typing import Literal

from halfbyte.errors import ExportError
from halfbyte.models.lora_sites import split_at_layer

Program = Literal["transformers", "vllm", "mlx"]

_LLAMA = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
_FUSED = "q_proj k_proj v_proj o_proj down_proj"  # gate and up are one matrix here and two there
_LFM2 = "q_proj k_proj v_proj out_proj in_proj w1 w2 w3"
_QWEN3_5 = f"{_LLAMA} in_proj_qkv in_proj_z in_proj_b in_proj_a out_proj"
_GEMMA4 = f"{_LLAMA} per_layer_input_gate per_layer_projection"
# Of a language model: its type -> the linear layers that both programs have under transformers' names.
_LEAVES = {
    **dict.fromkeys(("llama", "mistral", "ministral3", "qwen2", "qwen3", "gemma2", "gemma3_text", "granite"), _LLAMA),
    "phi3": "qkv_proj o_proj gate_up_proj down_proj", "glm4": _FUSED, "lfm2": _LFM2, "qwen3_5_text": _QWEN3_5,
    "gemma4_text": _GEMMA4,
}  # fmt: skip
_BESIDE = "language_model.model.layers"
# Of a checkpoint with towers: its type -> where the program has the layers of its language model.
_WHOLE: dict[Program, dict[str, str]] = {
    "vllm": {
        **dict.fromkeys(("gemma3", "gemma4", "mistral3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"), _BESIDE),
        **dict.fromkeys(("llava", "lfm2_vl", "glm4v"), _BESIDE),
        **dict.fromkeys(("smolvlm", "idefics3"), "model.text_model.layers"),
    },
    "mlx": dict.fromkeys(("gemma3", "gemma4", "mistral3", "qwen2_vl", "qwen3_vl", "qwen3_5", "lfm2_vl"), _BESIDE),
}
_RENAMED = {("vllm", "lfm2"): ("conv.", "short_conv.")}


def names_for(program: Program, kind: str, whole: str | None, modules: Iterable[str]) -> dict[str, str]:
    """The name in a program of each module that an adapter changes.

    Args:
        kind: `model_type` of the language model. whole: of the checkpoint that it is the half of, if it is one.
        modules: under the names of transformers.

    Raises:
        ExportError: the program has no such architecture, or no such layer; names what it has.
    """
    layers = "model.layers" if whole is None else _WHOLE[program].get(whole)
    leaves = _LEAVES.get(kind, "").split()
    if not leaves or layers is None:
        there = ", ".join(sorted({*_LEAVES, *_WHOLE[program]}))
        raise ExportError(
            f"which layers {program} has in a {whole or kind}, and under which names, is not known here.",
            fix=f"halfbyte merge RUN, which needs no names; known are {there}",
        )
    named, strange = dict[str, str](), list[str]()
    for module in modules:
        stack, inner = split_at_layer(module)
        number = module[len(stack) + 1 :].partition(".")[0]
        if not inner or inner[-1] not in leaves:
            strange.append(module)
        there = ".".join(inner).replace(*_RENAMED.get((program, kind), ("", "")))
        named[module] = f"{layers}.{number}.{there}"
    if strange:
        raise ExportError(
            f"{program} has no layer in a {whole or kind} that is called {strange[0]} ({len(strange)} of the adapter's "
            f"{len(named)}); it would be served without them.",
            fix=f"train on some of {', '.join(leaves)}, or halfbyte merge RUN",
        )
    return named
