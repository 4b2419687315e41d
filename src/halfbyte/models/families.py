"""Every architecture that is known, described once: how its layers are built, and what its tensors are called.

Why: fusing (`layers/fuse.py`), planning (`plan/layer.py`), decoding (`layers/decoding/llama.py`) and the list of
tensors from a config alone (`describe.py`) read the same line. A new architecture is a line in `FAMILIES`.
What no line says is seen on the modules themselves: which formula a norm computes, what a mask lets a layer see.
Source: `transformers/models/*/modeling_*.py`; tests build each family there and compare tensors, kept bytes, gradients.
Cost: none; no torch.
"""

from dataclasses import dataclass, replace
from typing import Literal

MlpKind = Literal["gated", "gated_stock", "formula", "one", "relu", "experts"]
AttentionKind = Literal["flash", "window", "eager", "alibi", "padded"]
FusedPart = Literal["attention", "layer", "mlp"]

GATED_MLP_PARTS = frozenset({"gate_proj", "up_proj", "down_proj", "act_fn"})


@dataclass(frozen=True)
class Layout:
    """The names of a family's tensors, and a letter for each of their sizes.

    V vocabulary, D hidden, N the embedding's width (D but in OPT), I the MLP's width, G two of them, A all query heads,
    K all key heads, Q both and the values, H one head, T 3 D, F 4 D, P positions, O the two more that OPT has.
    `linears` and `norms` are of one layer, `outer_norms` and `more` around the layers. Linears whose name matches
    `biased` have a bias. `tied`: what the architecture does with its head unless the config says.
    """

    embedding: str
    layers: str
    outer_norms: str
    linears: str
    norms: str = "input_layernorm post_attention_layernorm"
    biased: str = ""
    norm_bias: bool = True
    more: str = ""
    head: str = "lm_head"
    head_bias: bool = False
    tied: bool = False


@dataclass(frozen=True)
class Family:
    """How an architecture's layer is built.

    Args:
        layout: its tensors; None where they do not follow from the config alone.
        classes: what the names of its classes begin with, where their forwards are Llama's, so that the engine's own
            may take their place (`fused_part`).
        norms: that keep an input of their own; four are a sandwich. rms: they are RMS norms, else layer norms.
        qk_norms: queries and keys are normed, head by head.
        mlp: `gated` by the engine's kernel or by stock code (`gated_stock`); `formula`: GELU written as a formula
            (keeps four tensors); `one`: keeps its input; `relu`: keeps its output, which the next linear reads;
            `experts`: those of a mixture by `layers/experts` (its input and the inner product of each of a token's
            experts), beside them what is shared by stock code.
        attention: `flash` keeps no scores; `eager` (softcap) keeps them for each pair of tokens of an example, `alibi`
            and `padded` for each pair of a row, where `layers/by_mask.py` has no kernel. `flash` becomes `window` where
            a layer's window is shorter than a row: that layer takes each example by torch's kernel, with a mask, and of
            a `fused_qkv` projection keeps all for its values.
        parallel: attention and MLP read one normed input.
        own_sums: a layer is not x + f(norm(x)) twice. post_norms: it norms behind attention and MLP, not before.
        dropout_modules: what it drops of the residual stream goes through modules, which the engine's kernel takes.
        shared_gate: what shared experts give is multiplied by a gate of its own, which keeps it.
        gated_attention: what attention returns is multiplied by a gate, and both are kept.
        stock_gate: what stands between an expert's two stacks is the model's own code.
        encoder: it sees to both sides, and has no head of a language model.
    """

    layout: Layout | None = None
    classes: str = ""
    norms: int = 2
    rms: bool = True
    qk_norms: bool = False
    mlp: MlpKind = "gated"
    attention: AttentionKind = "flash"
    fused_qkv: bool = False
    parallel: bool = False
    own_sums: bool = False
    post_norms: bool = False
    dropout_modules: bool = False
    shared_gate: bool = False
    gated_attention: bool = False
    stock_gate: bool = False
    encoder: bool = False

    def fused_classes(self) -> dict[str, FusedPart]:
        """Class -> which part of a layer it is, of those whose forward is: attention: project, (norm q and k,) rotate
        both halves, attend, project; layer: x + attention(norm(x)), and of that x + mlp(norm(x)); mlp: down(act(gate)
        * up)."""
        if not self.classes:
            return {}
        names: dict[str, FusedPart] = {f"{self.classes}MLP": "mlp"} if self.mlp == "gated" else {}
        if self.attention == "flash":
            names[f"{self.classes}Attention"] = "attention"
            if self.norms == 2 and not self.own_sums:
                names[f"{self.classes}DecoderLayer"] = "layer"
        return names


def fused_part(name: str) -> FusedPart | None:
    """The part of a layer that a class of this name is, if the engine has its forward."""
    return next((part for family in FAMILIES.values() if (part := family.fused_classes().get(name))), None)


def layout_of(model_type: object) -> Layout | None:
    """How a family's tensors are called; None where that is not known."""
    family = FAMILIES.get(str(model_type))
    return family.layout if family is not None else None


LLAMA = Layout(
    "model.embed_tokens", "model.layers", "model.norm",
    "self_attn.q_proj AD self_attn.k_proj KD self_attn.v_proj KD self_attn.o_proj DA "
    "mlp.gate_proj ID mlp.up_proj ID mlp.down_proj DI", norm_bias=False,
)  # fmt: skip
_GEMMA = replace(LLAMA, tied=True)

# An architecture that is not here is counted as the stock gated kind: an estimate, and the plan says so.
UNKNOWN, UNKNOWN_MIXTURE = Family(mlp="gated_stock"), Family(mlp="experts")
FAMILIES: dict[str, Family] = {
    "llama": Family(LLAMA, "Llama"),
    "mistral": Family(LLAMA, "Mistral"),
    "qwen2": Family(replace(LLAMA, biased=r"\.[qkv]_proj"), "Qwen2"),
    "qwen3": Family(LLAMA, "Qwen3", qk_norms=True),
    "gemma": Family(_GEMMA, "Gemma"),
    "gemma2": Family(_GEMMA, "Gemma2", norms=4, attention="eager"),
    "gemma3_text": Family(_GEMMA, "Gemma3", norms=4, qk_norms=True),
    "granite": Family(LLAMA, "Granite", own_sums=True),
    "smollm3": Family(LLAMA, mlp="gated_stock"),
    **{f"olmo{n}": Family(classes=f"Olmo{n}", qk_norms=True, own_sums=True, post_norms=True) for n in (2, 3)},
    "starcoder2": Family(classes="Starcoder2", rms=False, mlp="one"),
    "nemotron": Family(classes="Nemotron", rms=False, mlp="one"),
    "stablelm": Family(classes="StableLm", rms=False, own_sums=True),
    # Hybrids; which of their layers are recurrent is seen in the list of tensors.
    "lfm2": Family(mlp="gated_stock", qk_norms=True),
    "qwen3_5_text": Family(mlp="gated_stock", qk_norms=True, gated_attention=True),
    **dict.fromkeys(("granitemoehybrid", "falcon_h1"), UNKNOWN),
    # Encoders: norms behind both halves in BERT's kind, before them in ModernBERT's.
    **dict.fromkeys(
        ("bert", "roberta", "xlm-roberta"),
        Family(rms=False, mlp="formula", own_sums=True, post_norms=True, dropout_modules=True, encoder=True),
    ),
    "modernbert": Family(classes="ModernBert", rms=False, mlp="gated_stock", fused_qkv=True, encoder=True),
    "deberta-v2": Family(rms=False, mlp="formula", attention="eager", own_sums=True, post_norms=True, encoder=True),
    "mixtral": UNKNOWN_MIXTURE,
    "gpt_oss": Family(mlp="experts", attention="eager", stock_gate=True),  # sinks: a score more, none in fp32
    "qwen2_moe": Family(mlp="experts", shared_gate=True),
    **dict.fromkeys(("qwen3_moe", "olmoe"), Family(mlp="experts", qk_norms=True)),
    "phi3": Family(
        Layout(
            "model.embed_tokens", "model.layers", "model.norm",
            "self_attn.o_proj DA self_attn.qkv_proj QD mlp.gate_up_proj GD mlp.down_proj DI", norm_bias=False,
        ),
        mlp="gated_stock", fused_qkv=True,
    ),
    "gpt2": Family(
        Layout(
            "transformer.wte", "transformer.h", "transformer.ln_f",
            "attn.c_attn DT attn.c_proj DD mlp.c_fc DI mlp.c_proj ID",
            norms="ln_1 ln_2", biased=".", tied=True, more="transformer.wpe PD",
        ),
        rms=False, mlp="formula", dropout_modules=True,
    ),
    "phi": Family(
        Layout(
            "model.embed_tokens", "model.layers", "model.final_layernorm",
            "self_attn.q_proj DD self_attn.k_proj KD self_attn.v_proj KD self_attn.dense DD mlp.fc1 ID mlp.fc2 DI",
            norms="input_layernorm", biased=".", head_bias=True,
        ),
        classes="Phi", norms=1, rms=False, mlp="formula", parallel=True, dropout_modules=True,
    ),
    "gptj": Family(
        Layout(
            "transformer.wte", "transformer.h", "transformer.ln_f",
            "attn.k_proj DD attn.v_proj DD attn.q_proj DD attn.out_proj DD mlp.fc_in ID mlp.fc_out DI",
            norms="ln_1", biased="mlp", head_bias=True,
        ),
        norms=1, rms=False, mlp="formula", parallel=True,
    ),
    "gpt_neox": Family(
        Layout(
            "gpt_neox.embed_in", "gpt_neox.layers", "gpt_neox.final_layer_norm",
            "attention.query_key_value TD attention.dense DD mlp.dense_h_to_4h ID mlp.dense_4h_to_h DI",
            biased=".", head="embed_out",
        ),
        classes="GPTNeoX", norms=1, rms=False, mlp="one", dropout_modules=True,
    ),
    "opt": Family(
        Layout(
            "model.decoder.embed_tokens", "model.decoder.layers", "model.decoder.final_layer_norm",
            "self_attn.k_proj DD self_attn.v_proj DD self_attn.q_proj DD self_attn.out_proj DD fc1 ID fc2 DI",
            norms="self_attn_layer_norm final_layer_norm", biased=".", tied=True,
            more="model.decoder.embed_positions OD",  # a padded sequence starts after two places
        ),
        rms=False, mlp="relu",
    ),
    "bloom": Family(
        Layout(
            "transformer.word_embeddings", "transformer.h", "transformer.word_embeddings_layernorm transformer.ln_f",
            "self_attention.query_key_value TD self_attention.dense DD mlp.dense_h_to_4h FD mlp.dense_4h_to_h DF",
            biased=".", tied=True,
        ),
        rms=False, mlp="one", attention="alibi",
    ),
    "mpt": Family(
        Layout(
            "transformer.wte", "transformer.blocks", "transformer.norm_f",
            "attn.Wqkv TD attn.out_proj DD ffn.up_proj FD ffn.down_proj DF",
            norms="norm_1 norm_2", norm_bias=False, tied=True,
        ),
        rms=False, mlp="one", attention="alibi",
    ),
    "falcon": Family(
        Layout(
            "transformer.word_embeddings", "transformer.h", "transformer.ln_f",
            "self_attention.query_key_value QD self_attention.dense DD mlp.dense_h_to_4h ID mlp.dense_4h_to_h DI",
            tied=True,
        ),
        norms=1, rms=False, mlp="one", attention="padded", parallel=True,
    ),
}  # fmt: skip
