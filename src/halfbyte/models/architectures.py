"""From a config alone to the list of tensors, for the architectures that are met most: what a header would say.

Why: `halfbyte plan llama-2-70b` must answer without the model and without a network, and transformers, which knows
every architecture, costs seconds to import.
What: a `Layout` for each family names its tensors as transformers does, with a letter for each size.
Source: `transformers/models/*/modeling_*.py`; a test builds each family there on the meta device and compares.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from halfbyte.errors import SourceError
from halfbyte.models.tensors import Facts, TensorSpec, facts_of, spec_of
from halfbyte.types import ConfigFile

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
    return [spec_of(name, shape, dtype, config) for name, shape in _named(_layout(config), config, sizes)]


@dataclass(frozen=True)
class Layout:
    """The names of a family's tensors, and a letter for each of their sizes.

    V vocabulary, D hidden, N the embedding's width (D but in OPT), I the MLP's width, G two of them, A all query heads,
    K all key heads, Q both and the values, H one head, T 3 D, F 4 D, P positions, O the two more that OPT has.
    `linears`, `norms` and `head_norms` are of one layer, `outer_norms` and `more` around the layers. Linears whose name
    matches `biased` have a bias. `tied`: what the architecture does with its head unless the config says.
    """

    embedding: str
    layers: str
    outer_norms: str
    linears: str
    norms: str = "input_layernorm post_attention_layernorm"
    biased: str = ""
    norm_bias: bool = True
    head_norms: str = ""
    more: str = ""
    head: str = "lm_head"
    head_bias: bool = False
    tied: bool = False


def _named(layout: Layout, config: ConfigFile, f: Facts) -> Iterator[tuple[str, tuple[int, ...]]]:
    wide, narrow = f.heads * f.head_size, f.key_heads * f.head_size
    sizes = {"V": f.vocab, "D": f.hidden, "I": f.intermediate, "A": wide, "K": narrow, "H": f.head_size}
    sizes |= {"Q": wide + 2 * narrow, "G": 2 * f.intermediate, "T": 3 * f.hidden, "F": 4 * f.hidden}
    sizes |= {"N": int(config.get("word_embed_proj_dim") or f.hidden), "P": f.positions, "O": f.positions + 2}

    def tensors(prefix: str, names: str, biased: str = "") -> Iterator[tuple[str, tuple[int, ...]]]:
        words = names.split()
        for name, letters in zip(words[::2], words[1::2], strict=True):
            shape = tuple(sizes[letter] for letter in letters)
            yield f"{prefix}{name}.weight", shape
            if biased and re.search(biased, name):  # GPT-2's Conv1D is stored (in, out)
                yield f"{prefix}{name}.bias", shape[-1:] if f.model_type == "gpt2" else shape[:1]

    def norms(prefix: str, names: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        return tensors(prefix, " ".join(f"{name} D" for name in names.split()), "." if layout.norm_bias else "")

    yield from tensors("", f"{layout.embedding} VN {layout.more}")
    for n in range(f.layers):
        yield from tensors(f"{layout.layers}.{n}.", layout.linears, layout.biased)
        yield from tensors(f"{layout.layers}.{n}.", layout.head_norms)
        yield from norms(f"{layout.layers}.{n}.", layout.norms)
    yield from norms("", layout.outer_norms)
    if layout.head_bias or not config.get("tie_word_embeddings", layout.tied):
        yield from tensors("", f"{layout.head} VN", "." if layout.head_bias else "")


def _layout(config: ConfigFile) -> Layout:
    """The layout of the config's family, with what other values of the config change."""
    kind = config["model_type"]
    layout = FAMILIES[kind]
    if layout == FAMILIES["llama"]:
        biased = [r"\.[qkv]_proj"] if config.get("attention_bias", kind == "qwen2") else []
        biased += ["o_proj"] if biased and kind != "qwen2" else []
        biased += ["mlp"] if config.get("mlp_bias") else []
        more = " pre_feedforward_layernorm post_feedforward_layernorm" if kind in ("gemma2", "gemma3_text") else ""
        heads = "self_attn.q_norm H self_attn.k_norm H" if kind in ("qwen3", "gemma3_text") else ""
        tied = kind.startswith("gemma")
        return replace(layout, norms=layout.norms + more, biased="|".join(biased), head_norms=heads, tied=tied)
    if kind == "gpt_neox" and not config.get("attention_bias", True):
        return replace(layout, biased="mlp")
    if kind == "falcon":
        new = config.get("new_decoder_architecture", False)
        norms = (
            "ln_attn ln_mlp" if new else layout.norms if not config.get("parallel_attn", True) else "input_layernorm"
        )
        keys = "QD" if new or config.get("multi_query", True) else "TD"
        linears = layout.linears.replace("QD", keys)
        return replace(layout, norms=norms, linears=linears, biased="." if config.get("bias") else "")
    if kind == "opt":
        has_last = config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False)
        narrow = config.get("word_embed_proj_dim") not in (None, config.get("hidden_size"))
        more = " model.decoder.project_out ND model.decoder.project_in DN" if narrow else ""
        return replace(layout, outer_norms=layout.outer_norms if has_last else "", more=layout.more + more)
    return layout


FAMILIES: dict[str, Layout] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "granite", "smollm3", "gemma", "gemma2", "gemma3_text"),
        Layout(
            "model.embed_tokens", "model.layers", "model.norm",
            "self_attn.q_proj AD self_attn.k_proj KD self_attn.v_proj KD self_attn.o_proj DA "
            "mlp.gate_proj ID mlp.up_proj ID mlp.down_proj DI", norm_bias=False,
        ),
    ),
    "gpt_neox": Layout(
        "gpt_neox.embed_in", "gpt_neox.layers", "gpt_neox.final_layer_norm",
        "attention.query_key_value TD attention.dense DD mlp.dense_h_to_4h ID mlp.dense_4h_to_h DI",
        biased=".", head="embed_out",
    ),
    "falcon": Layout(
        "transformer.word_embeddings", "transformer.h", "transformer.ln_f",
        "self_attention.query_key_value QD self_attention.dense DD mlp.dense_h_to_4h ID mlp.dense_4h_to_h DI",
        tied=True,
    ),
    "opt": Layout(
        "model.decoder.embed_tokens", "model.decoder.layers", "model.decoder.final_layer_norm",
        "self_attn.k_proj DD self_attn.v_proj DD self_attn.q_proj DD self_attn.out_proj DD fc1 ID fc2 DI",
        norms="self_attn_layer_norm final_layer_norm", biased=".", tied=True,
        more="model.decoder.embed_positions OD",  # a padded sequence starts after two places
    ),
    "phi3": Layout(
        "model.embed_tokens", "model.layers", "model.norm",
        "self_attn.o_proj DA self_attn.qkv_proj QD mlp.gate_up_proj GD mlp.down_proj DI", norm_bias=False,
    ),
    "phi": Layout(
        "model.embed_tokens", "model.layers", "model.final_layernorm",
        "self_attn.q_proj DD self_attn.k_proj KD self_attn.v_proj KD self_attn.dense DD mlp.fc1 ID mlp.fc2 DI",
        norms="input_layernorm", biased=".", head_bias=True,
    ),
    "gpt2": Layout(
        "transformer.wte", "transformer.h", "transformer.ln_f",
        "attn.c_attn DT attn.c_proj DD mlp.c_fc DI mlp.c_proj ID",
        norms="ln_1 ln_2", biased=".", tied=True, more="transformer.wpe PD",
    ),
    "gptj": Layout(
        "transformer.wte", "transformer.h", "transformer.ln_f",
        "attn.k_proj DD attn.v_proj DD attn.q_proj DD attn.out_proj DD mlp.fc_in ID mlp.fc_out DI",
        norms="ln_1", biased="mlp", head_bias=True,
    ),
    "bloom": Layout(
        "transformer.word_embeddings", "transformer.h", "transformer.word_embeddings_layernorm transformer.ln_f",
        "self_attention.query_key_value TD self_attention.dense DD mlp.dense_h_to_4h FD mlp.dense_4h_to_h DF",
        biased=".", tied=True,
    ),
    "mpt": Layout(
        "transformer.wte", "transformer.blocks", "transformer.norm_f",
        "attn.Wqkv TD attn.out_proj DD ffn.up_proj FD ffn.down_proj DF",
        norms="norm_1 norm_2", norm_bias=False, tied=True,
    ),
}  # fmt: skip
