"""One decoder layer as operations of a tape: norms, attention, recurrent layers, MLP, by the names that `PARTS` has.

What: Llama's names unless a line says others. A layer that has any other part with weights is not written. Before
attention and MLP stands a norm, or behind them, or both, or neither; a parallel layer's both read what comes in.
Source: transformers' modeling files.

Letters: M texts, H query heads, K key heads, d numbers of a head.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from halfbyte.layers import formulas, norm_gate, sight
from halfbyte.layers.decoding import linears
from halfbyte.layers.decoding.decoder import Decoder
from halfbyte.layers.decoding.linears import Unsupported
from halfbyte.layers.decoding.operands import CachedAttention, NormFormula
from halfbyte.layers.decoding.recurrent import Gate, MixerWriter, gated
from halfbyte.layers.decoding.tape import Vectors
from halfbyte.types import Config

_QK_NORMS = "q_norm", "k_norm", "q_layernorm", "k_layernorm"
RELU = 4  # of the tape's gate, beside the activations of `norm_gate`


@dataclass(frozen=True)
class LayerParts:
    """What a layer's parts are called; empty: there is none.

    qkv: the projection of all three, where there is one; `together`: head by head. gate: of a gated MLP; first, last:
    of any; mlp: empty where these are the layer's own. before, after: norms of attention and MLP. parallel: whether
    both read what comes in, or the field of the config that says so. neighbours: rotary turns neighbours, not halves.
    mixer: a recurrent layer in attention's place, or beside it.
    """

    attention: str = "self_attn"
    qkv: str = ""
    out: str = "o_proj"
    mlp: str = "mlp"
    gate: str = ""
    first: str = "up_proj"
    last: str = "down_proj"
    before: tuple[str, str] = ("input_layernorm", "post_attention_layernorm")
    after: tuple[str, str] = ("", "")
    parallel: bool | str = False
    together: bool = False
    neighbours: bool = False
    mixer: str = ""


LLAMA = LayerParts(gate="gate_proj")
_BEHIND = ("post_attention_layernorm", "post_feedforward_layernorm")
SANDWICH = replace(LLAMA, before=("input_layernorm", "pre_feedforward_layernorm"), after=_BEHIND)
_NEOX = LayerParts("attention", "query_key_value", "dense", "mlp", "", "dense_h_to_4h", "dense_4h_to_h", together=True)
_ONE = ("input_layernorm", "")
_MAMBA = replace(LLAMA, mlp="feed_forward", before=("input_layernorm", "pre_ff_layernorm"), mixer="mamba")
PARTS: dict[str, LayerParts] = {
    "gpt2": LayerParts("attn", "c_attn", "c_proj", "mlp", "", "c_fc", "c_proj", ("ln_1", "ln_2")),
    "gpt_neox": replace(_NEOX, parallel="use_parallel_residual"),
    "bloom": replace(_NEOX, attention="self_attention"),
    "falcon": replace(_NEOX, attention="self_attention", before=_ONE, parallel=True, together=False),
    "mpt": LayerParts("attn", "Wqkv", "out_proj", "ffn", "", before=("norm_1", "norm_2")),
    "opt": LayerParts("self_attn", "", "out_proj", "", "", "fc1", "fc2", ("self_attn_layer_norm", "final_layer_norm")),
    "phi": LayerParts(out="dense", first="fc1", last="fc2", before=_ONE, parallel=True),
    "starcoder2": LayerParts(first="c_fc", last="c_proj"),
    "nemotron": LayerParts(),
    "stablelm": replace(LLAMA, parallel="use_parallel_residual"),
    "cohere": replace(LLAMA, before=_ONE, parallel=True, neighbours=True),
    "glm4": replace(LLAMA, after=("post_self_attn_layernorm", "post_mlp_layernorm"), neighbours=True),
    **dict.fromkeys(("olmo2", "olmo3"), replace(LLAMA, before=("", ""), after=_BEHIND)),
    "lfm2": LayerParts("self_attn", "", "out_proj", "feed_forward", "w1", "w3", "w2", ("operator_norm", "ffn_norm"),
                       mixer="conv"),
    "qwen3_5_text": replace(LLAMA, mixer="linear_attn"),
    "olmo_hybrid": replace(LLAMA, mixer="linear_attn"),
    "granitemoehybrid": LayerParts(mlp="shared_mlp", first="input_linear", last="output_linear", mixer="mamba"),
    **dict.fromkeys(("bamba", "falcon_h1"), _MAMBA),
}  # fmt: skip


def formula_of(module: nn.Module, d: int, dtype: torch.dtype) -> NormFormula:
    """What the norm of vectors (d,) computes."""
    known = formulas.norm_of(module)
    if known is None or module.weight.shape != (d,):
        raise Unsupported(f"{type(module).__name__} is no norm that is known")
    eps, kind, bias = known
    return NormFormula(module.weight.data.to(dtype), eps, kind, None if bias is None else bias.data.to(dtype))


def _weighty(module: nn.Module) -> set[str]:
    """The parts that have weights."""
    return {name for name, child in module.named_children() if any(True for _ in child.parameters())}


@dataclass
class LayerWriter:
    """Writes one decoder layer into a decoder's tape.

    Args:
        rope: cos and sin (M, R). slopes: (H,) of ALiBi, if any. beside: a decoder whose caches and states are used,
            those of its first `shared` texts. count: of caches that there will be.
    """

    decoder: Decoder
    layer: nn.Module
    config: Config
    rope: tuple[Tensor, Tensor]
    slopes: Tensor | None
    beside: Decoder | None
    shared: int | None
    count: int

    def __post_init__(self) -> None:
        layer, config = self.layer, self.config
        self.tape, self.hidden = self.decoder.tape, self.decoder.hidden
        there, kind = _weighty(layer), str(config.model_type)
        self.parts = parts = PARTS.get(kind, SANDWICH if SANDWICH.before[1] in there else LLAMA)
        if kind == "olmo_hybrid" and parts.mixer not in there:
            self.parts = parts = PARTS["olmo2"]
        self.parallel = getattr(config, parts.parallel) if isinstance(parts.parallel, str) else parts.parallel
        self.before = parts.before
        if self.parallel and getattr(layer, parts.before[1] or "_", None) is None:
            self.before = (parts.before[0], "")
        self.mixer = getattr(layer, parts.mixer, None) if parts.mixer in there else None
        self.attention = getattr(layer, parts.attention, None) if parts.attention in there else None
        wanted = (
            ({*self.before, *parts.after} - {""})
            | ({parts.attention, parts.mixer} & there if self.mixer is not None else {parts.attention})
            | ({parts.mlp} if parts.mlp else {parts.first, parts.last})
        )
        # one token's logits hardly show what is done to its values alone, so the proof may not see these
        buffers = {name for name, _ in layer.named_buffers(recurse=False)}
        if there != wanted or buffers:
            raise Unsupported(f"{type(layer).__name__} has {', '.join(sorted(there | buffers))}")
        allowed = {"q_proj", "k_proj", "v_proj", "qkv_proj", *_QK_NORMS, parts.qkv, parts.out}
        if self.attention is not None and (more := _weighty(self.attention) - allowed):
            raise Unsupported(f"{type(layer).__name__} has {', '.join(sorted(more))}")
        odd = getattr(config, "clip_qkv", None), getattr(config, "new_decoder_architecture", False)
        if any(odd) or not getattr(config, "do_layer_norm_before", True) or not getattr(config, "parallel_attn", True):
            raise Unsupported(f"a variant of {kind}")

    def write(self) -> None:
        first, second = self.before
        x = y = self._normed(first)
        if self.parallel and second:
            y = self._normed(second)
        if self.mixer is not None:
            decoder, factor = self.decoder, float(getattr(self.layer, "ssm_out_multiplier", 1.0))
            state = partial(self._memory, "states", self.tape.state)
            mixer = MixerWriter(self.tape, self.mixer, x, state, decoder.positions, decoder.places, factor)
            self._add(*mixer.write(), self.parts.after[0], factor)
        if self.attention is not None:
            self._attention(self.attention, x)
        self._mlp(y if self.parallel else self._normed(second, x))

    def _memory(self, kind: str, make: Callable[..., Tensor], *sizes: int) -> Tensor:
        """The next of the decoder's keys, values or states: those of `beside`, or of these sizes."""
        there: list[Tensor] = getattr(self.decoder, kind)
        there.append(make(*sizes) if self.beside is None else getattr(self.beside, kind)[len(there)][: self.shared])
        return there[-1]

    def _normed(self, name: str, to: Vectors | None = None) -> Vectors:
        """hidden by the norm of this name, or as it is, to where products read it."""
        to = to or self.tape.vectors(self.hidden.shape[1])
        formula = None
        if name:
            formula = formula_of(getattr(self.layer, name), self.hidden.shape[1], self.tape.dtype)
            formula = replace(formula, eps=formula.eps / self.decoder.residual_multiplier**2)
        self.tape.norm(self.hidden, to, formula)
        self.tape.then()
        return to

    def _add(self, module: nn.Module, x: Vectors, norm: str, factor: float = 1.0) -> None:
        """hidden += module(x), normalised by the layer's part of this name. factor: that x was multiplied by."""
        hidden, tape = self.hidden, self.tape
        if factor != 1.0 and getattr(module, "bias", None) is not None:
            raise Unsupported("a multiplier of a projection with biases")
        if not norm:
            linears.write(tape, x, [(module, hidden)], add=True)
            return
        out = tape.buffer(*hidden.shape)
        linears.write(tape, x, [(module, out)])
        tape.add_norm(out, hidden, formula_of(getattr(self.layer, norm), hidden.shape[1], tape.dtype))
        tape.then()

    def _attention(self, module: nn.Module, x: Vectors) -> None:
        tape, config = self.tape, self.config
        parts, heads = self.parts, int(config.num_attention_heads)
        d = int(getattr(module, "head_dim", 0) or module.head_size)
        fused = parts.qkv or ("qkv_proj" if hasattr(module, "qkv_proj") else "")
        key_heads = int(getattr(config, "num_key_value_heads", None) or heads)
        if fused:
            width = linears.Linear(tape, getattr(module, fused)).shape[0]
            key_heads = (width // d - heads) // 2
        is_gated = bool(parts.mixer) and linears.Linear(tape, module.q_proj).shape[0] == 2 * heads * d
        queries = heads * d * (1 + is_gated)
        qkv = tape.buffer(tape.m, queries + 2 * key_heads * d)
        outs = qkv.split([queries, key_heads * d, key_heads * d], dim=1)
        norms = self._qk_norms(module, d)
        if fused:
            linears.write(tape, x, [(getattr(module, fused), qkv)])
        elif norms and len(norms[0].weight) != d:  # over all heads
            raw = [tape.buffer(tape.m, out.shape[1]) for out in outs[:2]]
            linears.write(
                tape, x, list(zip((module.q_proj, module.k_proj, module.v_proj), (*raw, outs[2]), strict=True))
            )
            for each, out, norm in zip(raw, outs, norms, strict=False):
                tape.add_norm(each, out, norm, add=False)
            tape.then()
            norms = []
        else:
            linears.write(tape, x, list(zip((module.q_proj, module.k_proj, module.v_proj), outs, strict=True)))
        scale = next(s for n in ("scaling", "inv_norm_factor", "softmax_scale") if (s := getattr(module, n, None)))
        together = parts.together or (config.model_type == "falcon" and not config.multi_query)
        q_norm, k_norm = norms or (None, None)
        # Falcon-H1's: of what queries, keys and values are made of, of keys, and of what comes out
        inner = float(getattr(self.layer, "attention_in_multiplier", 1.0))
        factor = inner * float(getattr(self.layer, "attn_out_multiplier", 1.0))
        if inner != 1.0 and getattr(module.q_proj, "bias", None) is not None:
            raise Unsupported("a multiplier of a projection with biases")
        keys, values = (self._memory(kind, tape.cache, key_heads, d, self.count) for kind in ("keys", "values"))
        attention = CachedAttention(
            qkv, keys, values, self.decoder.positions, heads, key_heads, d,
            float(scale) * inner**2 * float(getattr(module, "key_multiplier", 1.0)),
            float(getattr(module, "attn_logit_softcapping", None) or 0.0), self._window(module),
            q_norm, k_norm, self.decoder.places, self.slopes, together, parts.neighbours, is_gated,
        )  # fmt: skip
        out, to = tape.buffer(tape.m, heads * d), tape.vectors(heads * d)
        tape.attend(attention, *self.rope, out)
        tape.then()
        if is_gated or factor != 1.0:
            gated(tape, out, heads, to, Gate(qkv[:, d:], 2 * d, sigmoid=True) if is_gated else None, factor=factor)
        else:
            tape.norm(out, to, None)
            tape.then()
        self._add(getattr(module, parts.out), to, parts.after[0], factor)

    def _qk_norms(self, module: nn.Module, d: int) -> list[NormFormula]:
        pair = [norm for name in _QK_NORMS if (norm := getattr(module, name, None)) is not None]
        formulas = [formula_of(norm, len(norm.weight), self.tape.dtype) for norm in pair]
        if any(f.kind.centred or f.bias is not None for f in formulas):
            raise Unsupported("layer norms of queries and keys")
        return formulas

    def _window(self, module: nn.Module) -> int:
        sees = sight.of(module)
        if sees is None or not sees.causal:  # not our attention: only where there is nothing to be known
            kinds = set(getattr(self.config, "layer_types", None) or ())
            if getattr(self.config, "sliding_window", None) or kinds - {"full_attention", "linear_attention", "conv"}:
                raise Unsupported("windows that were not looked at")
            return 0
        if sees.causal < sees.tokens and not sees.slides:
            raise Unsupported("a mask of no known kind")
        return sees.causal if sees.slides else 0

    def _mlp(self, x: Vectors) -> None:
        tape, parts = self.tape, self.parts
        mlp = getattr(self.layer, parts.mlp) if parts.mlp else self.layer
        kind = _activation(mlp)
        both = getattr(mlp, "gate_up_proj", None) or getattr(mlp, "input_linear", None)
        first = both or getattr(mlp, parts.first)
        is_gated = bool(parts.gate or both)
        if is_gated and kind not in norm_gate.ACTIVATIONS.values():
            raise Unsupported(f"the activation of {type(mlp).__name__}")
        inner = linears.Linear(tape, first).shape[0] // (2 if both else 1)
        g = tape.buffer(tape.m, (2 if is_gated else 1) * inner)
        to = tape.vectors(inner)
        if both or not is_gated:
            linears.write(tape, x, [(first, g)])
        else:
            linears.write(tape, x, [(getattr(mlp, parts.gate), g[:, :inner]), (first, g[:, inner:])])
        of_gate, factor = (float(getattr(mlp, f"{name}_multiplier", 1.0)) for name in ("gate", "down"))  # Falcon-H1's
        if (of_gate, factor) != (1.0, 1.0):
            if kind != norm_gate.SILU or getattr(getattr(mlp, parts.gate), "bias", None) is not None:
                raise Unsupported("multipliers of an MLP with biases, or with another activation than SiLU")
            gated(tape, g[:, inner:], 1, to, Gate(g, inner, of_gate), factor=factor)
        else:
            tape.gate(g[:, :inner], g[:, inner:] if is_gated else None, inner, kind, to)
            tape.then()
        self._add(getattr(mlp, parts.last), to, parts.after[1], factor)


def _activation(mlp: nn.Module) -> int:
    """The activation among the parts of an MLP, or of one whose formula shows it."""
    for child in mlp.children():
        if isinstance(child, nn.ReLU):
            return RELU
        if (kind := formulas.activation_kind(child)) is not None:
            return kind
    if (formula := formulas.gated_mlp(mlp)) is not None:
        return formula.activation
    raise Unsupported(f"the activation of {type(mlp).__name__}")
