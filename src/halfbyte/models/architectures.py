"""From a config alone to the list of tensors, for the architectures that are met most: what a header would say.

Why: `halfbyte plan llama-2-70b` must answer without the model and without a network, and transformers, which knows
every architecture, costs seconds to import.
What: one function for each family names its tensors as transformers does; families that differ in details share one.
Source: `transformers/models/*/modeling_*.py`; a test builds each family there on the meta device and compares.
Cost: a list of a few hundred entries; no torch.

Letters: V vocabulary, D hidden, I the MLP's width, H query heads, K key heads, d head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from halfbyte.errors import SourceError
from halfbyte.models.tensors import Facts, TensorSpec, facts_of, spec_of

if TYPE_CHECKING:
    from halfbyte.types import ConfigFile

Named = Iterator[tuple[str, tuple[int, ...]]]
_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def tensors_of(config: ConfigFile) -> list[TensorSpec]:
    """The tensors of a model as its checkpoint would list them; a tied head once, as the embedding.

    Raises:
        SourceError: the architecture is not in `FAMILIES`, or the config lacks what the list follows from.
    """
    kind = str(config.get("model_type", ""))
    if kind not in FAMILIES:
        raise SourceError(
            f"the tensors of the architecture {kind or '(config.json has no model_type)'!r} are not known from its "
            f"config alone. Known: {', '.join(sorted(FAMILIES))}.",
            fix="download the model's .safetensors files (their headers are enough) and give their folder, or give its "
            "hub id: hf download ORG/NAME",
        )
    sizes = facts_of(config, [])
    lacking = [name for name in ("hidden", "layers", "vocab", "heads") if not getattr(sizes, name)]
    if lacking:
        raise SourceError(
            f"the config of a {kind} gives no {', '.join(lacking)} (a positive number), so its tensors do not follow.",
            fix="use the config.json that belongs to the model",
        )
    dtype = _DTYPES.get(str(config.get("dtype") or config.get("torch_dtype") or ""), "BF16")
    return [spec_of(name, shape, dtype, config) for name, shape in FAMILIES[kind](config, sizes)]


def _llama(config: ConfigFile, f: Facts) -> Named:
    """Llama and what is built like it: projections and a gated MLP, RMS norms, perhaps biases and norms of q and k."""
    kind = f.model_type
    qkv_bias = bool(config.get("attention_bias", kind == "qwen2"))
    out_bias = qkv_bias and kind != "qwen2"
    mlp_bias = bool(config.get("mlp_bias", False))
    norms = ["input_layernorm", "post_attention_layernorm"]
    if kind in ("gemma2", "gemma3_text"):
        norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm"]
    yield "model.embed_tokens.weight", (f.vocab, f.hidden)
    for n in range(f.layers):
        layer = f"model.layers.{n}"
        wide, narrow = f.heads * f.head_size, f.key_heads * f.head_size
        for name, out in (("q_proj", wide), ("k_proj", narrow), ("v_proj", narrow)):
            yield from _linear(f"{layer}.self_attn.{name}", out, f.hidden, bias=qkv_bias)
        yield from _linear(f"{layer}.self_attn.o_proj", f.hidden, wide, bias=out_bias)
        if kind in ("qwen3", "gemma3_text"):
            yield f"{layer}.self_attn.q_norm.weight", (f.head_size,)
            yield f"{layer}.self_attn.k_norm.weight", (f.head_size,)
        for name in ("gate_proj", "up_proj"):
            yield from _linear(f"{layer}.mlp.{name}", f.intermediate, f.hidden, bias=mlp_bias)
        yield from _linear(f"{layer}.mlp.down_proj", f.hidden, f.intermediate, bias=mlp_bias)
        yield from ((f"{layer}.{name}.weight", (f.hidden,)) for name in norms)
    yield "model.norm.weight", (f.hidden,)
    yield from _head(config, f, "lm_head", tied=kind.startswith("gemma"))


def _phi3(config: ConfigFile, f: Facts) -> Named:
    yield "model.embed_tokens.weight", (f.vocab, f.hidden)
    for n in range(f.layers):
        layer = f"model.layers.{n}"
        wide = f.heads * f.head_size
        yield f"{layer}.self_attn.o_proj.weight", (f.hidden, wide)
        yield f"{layer}.self_attn.qkv_proj.weight", (wide + 2 * f.key_heads * f.head_size, f.hidden)
        yield f"{layer}.mlp.gate_up_proj.weight", (2 * f.intermediate, f.hidden)
        yield f"{layer}.mlp.down_proj.weight", (f.hidden, f.intermediate)
        yield f"{layer}.input_layernorm.weight", (f.hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (f.hidden,)
    yield "model.norm.weight", (f.hidden,)
    yield from _head(config, f, "lm_head")


def _phi(config: ConfigFile, f: Facts) -> Named:
    yield "model.embed_tokens.weight", (f.vocab, f.hidden)
    for n in range(f.layers):
        layer = f"model.layers.{n}"
        narrow = f.key_heads * f.head_size
        for name, out in (("q_proj", f.hidden), ("k_proj", narrow), ("v_proj", narrow), ("dense", f.hidden)):
            yield from _linear(f"{layer}.self_attn.{name}", out, f.hidden, bias=True)
        yield from _linear(f"{layer}.mlp.fc1", f.intermediate, f.hidden, bias=True)
        yield from _linear(f"{layer}.mlp.fc2", f.hidden, f.intermediate, bias=True)
        yield from _norm(f"{layer}.input_layernorm", f.hidden)
    yield from _norm("model.final_layernorm", f.hidden)
    yield from _linear("lm_head", f.vocab, f.hidden, bias=True)


def _gpt2(config: ConfigFile, f: Facts) -> Named:
    yield "transformer.wte.weight", (f.vocab, f.hidden)
    yield "transformer.wpe.weight", (f.positions, f.hidden)
    for n in range(f.layers):
        layer = f"transformer.h.{n}"
        yield from _norm(f"{layer}.ln_1", f.hidden)
        for name, shape in (("attn.c_attn", (f.hidden, 3 * f.hidden)), ("attn.c_proj", (f.hidden, f.hidden))):
            yield from _conv1d(f"{layer}.{name}", *shape)
        yield from _norm(f"{layer}.ln_2", f.hidden)
        yield from _conv1d(f"{layer}.mlp.c_fc", f.hidden, f.intermediate)
        yield from _conv1d(f"{layer}.mlp.c_proj", f.intermediate, f.hidden)
    yield from _norm("transformer.ln_f", f.hidden)
    yield from _head(config, f, "lm_head", tied=True)


def _gptj(config: ConfigFile, f: Facts) -> Named:
    yield "transformer.wte.weight", (f.vocab, f.hidden)
    for n in range(f.layers):
        layer = f"transformer.h.{n}"
        yield from _norm(f"{layer}.ln_1", f.hidden)
        yield from ((f"{layer}.attn.{name}_proj.weight", (f.hidden, f.hidden)) for name in ("k", "v", "q", "out"))
        yield from _linear(f"{layer}.mlp.fc_in", f.intermediate, f.hidden, bias=True)
        yield from _linear(f"{layer}.mlp.fc_out", f.hidden, f.intermediate, bias=True)
    yield from _norm("transformer.ln_f", f.hidden)
    yield from _linear("lm_head", f.vocab, f.hidden, bias=True)


def _gpt_neox(config: ConfigFile, f: Facts) -> Named:
    bias = bool(config.get("attention_bias", True))
    yield "gpt_neox.embed_in.weight", (f.vocab, f.hidden)
    for n in range(f.layers):
        layer = f"gpt_neox.layers.{n}"
        yield from _norm(f"{layer}.input_layernorm", f.hidden)
        yield from _norm(f"{layer}.post_attention_layernorm", f.hidden)
        yield from _linear(f"{layer}.attention.query_key_value", 3 * f.hidden, f.hidden, bias=bias)
        yield from _linear(f"{layer}.attention.dense", f.hidden, f.hidden, bias=bias)
        yield from _linear(f"{layer}.mlp.dense_h_to_4h", f.intermediate, f.hidden, bias=True)
        yield from _linear(f"{layer}.mlp.dense_4h_to_h", f.hidden, f.intermediate, bias=True)
    yield from _norm("gpt_neox.final_layer_norm", f.hidden)
    yield from _head(config, f, "embed_out")


def _bloom(config: ConfigFile, f: Facts) -> Named:
    yield "transformer.word_embeddings.weight", (f.vocab, f.hidden)
    yield from _norm("transformer.word_embeddings_layernorm", f.hidden)
    for n in range(f.layers):
        layer = f"transformer.h.{n}"
        yield from _norm(f"{layer}.input_layernorm", f.hidden)
        yield from _linear(f"{layer}.self_attention.query_key_value", 3 * f.hidden, f.hidden, bias=True)
        yield from _linear(f"{layer}.self_attention.dense", f.hidden, f.hidden, bias=True)
        yield from _norm(f"{layer}.post_attention_layernorm", f.hidden)
        yield from _linear(f"{layer}.mlp.dense_h_to_4h", 4 * f.hidden, f.hidden, bias=True)
        yield from _linear(f"{layer}.mlp.dense_4h_to_h", f.hidden, 4 * f.hidden, bias=True)
    yield from _norm("transformer.ln_f", f.hidden)
    yield from _head(config, f, "lm_head", tied=True)


def _falcon(config: ConfigFile, f: Facts) -> Named:
    bias = bool(config.get("bias", False))
    new = bool(config.get("new_decoder_architecture", False))
    parallel = bool(config.get("parallel_attn", True))
    fused = (f.heads + 2 * f.key_heads) * f.head_size if new or config.get("multi_query", True) else 3 * f.hidden
    yield "transformer.word_embeddings.weight", (f.vocab, f.hidden)
    for n in range(f.layers):
        layer = f"transformer.h.{n}"
        yield from _linear(f"{layer}.self_attention.query_key_value", fused, f.hidden, bias=bias)
        yield from _linear(f"{layer}.self_attention.dense", f.hidden, f.hidden, bias=bias)
        yield from _linear(f"{layer}.mlp.dense_h_to_4h", f.intermediate, f.hidden, bias=bias)
        yield from _linear(f"{layer}.mlp.dense_4h_to_h", f.hidden, f.intermediate, bias=bias)
        names = ["ln_attn", "ln_mlp"] if new else ["input_layernorm"]
        if not new and not parallel:
            names.append("post_attention_layernorm")
        for name in names:
            yield from _norm(f"{layer}.{name}", f.hidden)
    yield from _norm("transformer.ln_f", f.hidden)
    yield from _head(config, f, "lm_head", tied=True)


def _mpt(config: ConfigFile, f: Facts) -> Named:
    yield "transformer.wte.weight", (f.vocab, f.hidden)
    for n in range(f.layers):
        layer = f"transformer.blocks.{n}"
        yield f"{layer}.norm_1.weight", (f.hidden,)
        yield f"{layer}.attn.Wqkv.weight", (3 * f.hidden, f.hidden)
        yield f"{layer}.attn.out_proj.weight", (f.hidden, f.hidden)
        yield f"{layer}.norm_2.weight", (f.hidden,)
        yield f"{layer}.ffn.up_proj.weight", (4 * f.hidden, f.hidden)
        yield f"{layer}.ffn.down_proj.weight", (f.hidden, 4 * f.hidden)
    yield "transformer.norm_f.weight", (f.hidden,)
    yield from _head(config, f, "lm_head", tied=True)


def _opt(config: ConfigFile, f: Facts) -> Named:
    top = "model.decoder"
    narrow = int(config.get("word_embed_proj_dim") or f.hidden)
    before = bool(config.get("do_layer_norm_before", True))
    yield f"{top}.embed_tokens.weight", (f.vocab, narrow)
    yield f"{top}.embed_positions.weight", (f.positions + 2, f.hidden)  # two places that a padded sequence starts after
    if narrow != f.hidden:
        yield f"{top}.project_out.weight", (narrow, f.hidden)
        yield f"{top}.project_in.weight", (f.hidden, narrow)
    if before and not config.get("_remove_final_layer_norm", False):
        yield from _norm(f"{top}.final_layer_norm", f.hidden)
    for n in range(f.layers):
        layer = f"{top}.layers.{n}"
        for name in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _linear(f"{layer}.self_attn.{name}", f.hidden, f.hidden, bias=True)
        yield from _norm(f"{layer}.self_attn_layer_norm", f.hidden)
        yield from _linear(f"{layer}.fc1", f.intermediate, f.hidden, bias=True)
        yield from _linear(f"{layer}.fc2", f.hidden, f.intermediate, bias=True)
        yield from _norm(f"{layer}.final_layer_norm", f.hidden)
    yield from _head(config, f, "lm_head", tied=True, width=narrow)


def _linear(name: str, out: int, inner: int, *, bias: bool) -> Named:
    yield f"{name}.weight", (out, inner)
    if bias:
        yield f"{name}.bias", (out,)


def _conv1d(name: str, inner: int, out: int) -> Named:
    """GPT-2's linear layer, stored (in, out)."""
    yield f"{name}.weight", (inner, out)
    yield f"{name}.bias", (out,)


def _norm(name: str, width: int) -> Named:
    yield f"{name}.weight", (width,)
    yield f"{name}.bias", (width,)


def _head(config: ConfigFile, f: Facts, name: str, *, tied: bool = False, width: int = 0) -> Named:
    """The output head where it has a weight of its own; `tied` is what the architecture does unless its config says."""
    if not config.get("tie_word_embeddings", tied):
        yield f"{name}.weight", (f.vocab, width or f.hidden)


FAMILIES: dict[str, Callable[[ConfigFile, Facts], Named]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "granite", "smollm3"), _llama),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _llama),
    "phi3": _phi3, "phi": _phi, "gpt2": _gpt2, "gptj": _gptj, "gpt_neox": _gpt_neox, "bloom": _bloom, "falcon": _falcon,
    "mpt": _mpt, "opt": _opt,
}  # fmt: skip
