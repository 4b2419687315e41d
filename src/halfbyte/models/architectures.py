"""From a config alone to the list of tensors, for the architectures that are met most: what a header would say.

Why: `halfbyte plan llama-2-70b` must answer without the model and without a network, and transformers, which knows
every architecture, costs seconds to import.
What: the `Layout` of a family (`families.py`) names its tensors as transformers does, with a letter for each size.
Source: a test builds each family in transformers on the meta device and compares.
"""

import re
from collections.abc import Iterator
from dataclasses import replace

from halfbyte.errors import SourceError
from halfbyte.models.families import FAMILIES, LLAMA, Layout, layout_of
from halfbyte.models.tensors import Facts, TensorSpec, facts_of, spec_of
from halfbyte.types import ConfigFile

_DTYPES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}


def tensors_of(config: ConfigFile) -> list[TensorSpec]:
    """The tensors of a model as its checkpoint would list them; a tied head once, as the embedding. Raises SourceError:
    the architecture has no layout in `FAMILIES`, or the config lacks what the list follows from."""
    kind = str(config.get("model_type", ""))
    if layout_of(kind) is None:
        raise SourceError(
            f"the tensors of the architecture {kind or '(config.json has no model_type)'!r} are not known from its "
            f"config alone. Known: {', '.join(sorted(filter(layout_of, FAMILIES)))}.",
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
        if FAMILIES[f.model_type].qk_norms:
            yield from tensors(f"{layout.layers}.{n}.", "self_attn.q_norm H self_attn.k_norm H")
        yield from norms(f"{layout.layers}.{n}.", layout.norms)
    yield from norms("", layout.outer_norms)
    if layout.head_bias or not config.get("tie_word_embeddings", layout.tied):
        yield from tensors("", f"{layout.head} VN", "." if layout.head_bias else "")


def _layout(config: ConfigFile) -> Layout:
    """The layout of the config's family, with what other values of the config change."""
    kind = config["model_type"]
    family, layout = FAMILIES[kind], layout_of(kind)
    assert layout is not None
    if layout.linears == LLAMA.linears:
        biased = [layout.biased or "self_attn"] if config.get("attention_bias", bool(layout.biased)) else []
        biased += ["mlp"] if config.get("mlp_bias") else []
        more = " pre_feedforward_layernorm post_feedforward_layernorm" if family.norms == 4 else ""
        return replace(layout, norms=layout.norms + more, biased="|".join(biased))
    if kind == "gpt_neox" and not config.get("attention_bias", True):
        return replace(layout, biased="mlp")
    if kind == "falcon":
        new = config.get("new_decoder_architecture", False)
        norms = "ln_attn ln_mlp" if new else "input_layernorm" if config.get("parallel_attn", True) else layout.norms
        keys = "QD" if new or config.get("multi_query", True) else "TD"
        linears = layout.linears.replace("QD", keys)
        return replace(layout, norms=norms, linears=linears, biased="." if config.get("bias") else "")
    if kind == "opt":
        has_last = config.get("do_layer_norm_before", True) and not config.get("_remove_final_layer_norm", False)
        narrow = config.get("word_embed_proj_dim") not in (None, config.get("hidden_size"))
        more = " model.decoder.project_out ND model.decoder.project_in DN" if narrow else ""
        return replace(layout, outer_norms=layout.outer_norms if has_last else "", more=layout.more + more)
    return layout
