"""A Llama-like model as a tape: embedding aside, a token's whole way from hidden state to logits.

What is recognised is structure, not names of classes: norms, attention projections (one or three), output projection,
a gated MLP (its two inner projections in one or apart), and where the norms stand. What a model does beside that is not
looked for: `writing/writer.py` compares logits with the model's own before a token is used.
Source: transformers' modeling files of Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3, Phi-3, Granite.
Cost: tens of milliseconds to write; LoRA is copied in the compute dtype.

Letters: M texts, H query heads, K key heads, T max_tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from halfbyte.layers import fuse, norm_gate, sight
from halfbyte.layers.decoding import head as eight_bits
from halfbyte.layers.decoding import linears
from halfbyte.layers.decoding.linears import Unsupported
from halfbyte.layers.decoding.tape import CachedAttention, Int8Head, Int16Vectors, Tape, TextAdapters, Vectors
from halfbyte.models import structure
from halfbyte.quant import bnb, policy

if TYPE_CHECKING:
    from halfbyte.types import Config, Model

_NORMS = {"input_layernorm", "post_attention_layernorm"}
_ATTENTION = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "q_norm", "k_norm"}
_SANDWICH = _NORMS | {"pre_feedforward_layernorm", "post_feedforward_layernorm"}
# Rotary embeddings that are another function of the position when a text is longer.
_CHANGING_ROPES = {"dynamic", "longrope"}


@dataclass
class Decoder:
    """A model's tape with its buffers.

    Args:
        hidden: (M, D) fp32, the embedding of the tokens, divided by `shrunk`: Granite multiplies what is added to it,
            so here nothing is, and norms see the same but for eps. divided: what logits are divided by.
        logits: (M, V) fp32. positions: (M,) of the tokens.
        keys, values: of each layer (M, K, T, d). ends: the number of operations after each layer.
        ropes: cos and sin (T, R) with the buffers (M, R) that a token's row goes to.
    """

    tape: Tape
    hidden: Tensor
    logits: Tensor
    positions: Tensor
    final_cap: float
    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)
    ends: list[int] = field(default_factory=list)
    ropes: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    shrunk: float = 1.0
    divided: float = 1.0
    places: Tensor | None = None  # (M,) int64: whose cache each vector reads and writes; None: its own
    normed: Tensor | None = None  # (M, D..) fp32, what the head reads; there after `body` operations
    body: int = 0
    rough: range | None = None  # operations of the head in 8 bits; those after are the whole head

    def fill(self, layer: int, keys: Tensor, values: Tensor, lengths: list[int]) -> None:
        """Take over a layer's cache of the prompts: (M, K, L, d), padded on the left."""
        for m, length in enumerate(lengths):
            n = min(length, keys.shape[2])
            self.keys[layer][m, :, length - n : length] = keys[m, :, keys.shape[2] - n :]
            self.values[layer][m, :, length - n : length] = values[m, :, values.shape[2] - n :]

    def step(
        self, embedded: Tensor, before: list[int], enter: Callable[[int], None] | None = None, *, whole: bool = False
    ) -> Tensor:
        """Logits (M, V) after one more token of each text.

        Args:
            embedded: (M, D). before: tokens of each text before this one. enter: called before each layer, where a base
                is streamed. whole: all logits are wanted, also of a decoder for the largest.
        """
        self._enter(embedded, before)
        end = None if self.rough is None else self.rough.start if whole else self.rough.stop
        if enter is None:
            self.tape.run(0, end)
        else:
            for layer, (first, last) in enumerate(zip([0, *self.ends[:-1]], self.ends, strict=True)):
                enter(layer)
                self.tape.run(first, last)
            self.tape.run(self.ends[-1], end)
        return self.whole() if whole else self.capped()

    def read(self, embedded: Tensor, positions: Sequence[int], places: Sequence[int]) -> Tensor:
        """What the head would read (n, D) of n <= M tokens at these positions of the texts in these places: those of
        one text in their order, none of them left out. A view, to be used before the next call."""
        assert self.places is not None and self.normed is not None
        self.tape.used = len(positions)
        self.places[: len(places)] = torch.tensor(places)
        self._enter(embedded, positions)
        self.tape.run(0, self.body)
        return self.normed[: len(positions), : self.hidden.shape[1]]

    def _enter(self, embedded: Tensor, positions: Sequence[int]) -> None:
        n = len(positions)
        self.hidden[:n] = embedded
        if self.shrunk != 1.0:
            self.hidden[:n] /= self.shrunk
        self.positions[:n] = torch.tensor(positions)
        for table, row in self.ropes:
            torch.index_select(table, 0, self.positions, out=row)

    def whole(self) -> Tensor:
        """The logits (M, V) of the last step by the whole head; the largest is as it was."""
        if self.rough is not None:
            self.tape.run(self.rough.stop)
        return self.capped()

    def capped(self) -> Tensor:
        """The logits (M, V) as they are now."""
        logits = self.logits if self.divided == 1.0 else self.logits / self.divided
        return self.final_cap * torch.tanh(logits / self.final_cap) if self.final_cap else logits


def decoder(
    model: Model, texts: int, max_tokens: int, *, adapters: TextAdapters | None = None, beside: Decoder | None = None,
    largest: bool = False, reads: bool = False,
) -> Decoder:  # fmt: skip
    """Write the tape of a model for so many texts of up to `max_tokens` tokens. Raises Unsupported, saying why.

    Args:
        adapters: which adapter each text uses, at each step as it is then; None for the active one.
        beside: a decoder for more texts, of the same max_tokens, whose caches are used: those of its first texts.
        largest: only the largest logit will be looked at; then the others may be rough (`head.py`).
        reads: for `Decoder.read`, of any tokens of the texts in `beside`.
    """
    try:
        return _written(model, texts, max_tokens, adapters, beside, largest, reads)
    except (AttributeError, IndexError, TypeError) as why:  # a part that has another name, or none
        raise Unsupported(f"{type(structure.causal_lm(model)).__name__} is not built like Llama: {why}") from why


def _written(
    model: Model,
    texts: int,
    max_tokens: int,
    adapters: TextAdapters | None,
    beside: Decoder | None,
    largest: bool,
    reads: bool,
) -> Decoder:
    lm = structure.causal_lm(model)
    body, config = structure.body(lm), lm.config.get_text_config()
    head, norm = lm.get_output_embeddings(), getattr(body, "norm", None)
    dtype = next(lm.get_input_embeddings().parameters()).dtype
    if (
        not isinstance(getattr(head, "weight", None), Tensor)
        or norm is None
        or not isinstance(getattr(body, "rotary_emb", None), nn.Module)
    ):
        raise Unsupported(f"{type(lm).__name__} is not built like Llama")
    max_tokens = -(-max_tokens // 64) * 64
    try:
        tape = Tape(dtype, texts, max_tokens, adapters)
    except ValueError as error:
        raise Unsupported(str(error)) from error
    layers = structure.decoder_layers(body)
    sight.look(body, max_tokens)
    d = layers[0].input_layernorm.weight.shape[0] if hasattr(layers[0], "input_layernorm") else 0
    made = Decoder(
        tape,
        hidden=tape.buffer(texts, d),
        logits=tape.buffer(texts, head.weight.shape[0]),
        positions=tape.buffer(texts, dtype=torch.int64),
        final_cap=float(getattr(config, "final_logit_softcapping", 0) or 0),
        shrunk=_shrunk(config),
        divided=float(getattr(config, "logits_scaling", 1.0)),
        places=tape.buffer(texts, dtype=torch.int64) if reads else None,
    )
    ropes: dict[str | None, tuple[Tensor, Tensor]] = {}
    for number, layer in enumerate(layers):
        kind = _rope_kind(config, number)
        if kind not in ropes:
            ropes[kind] = _ropes(made, body.rotary_emb, config, kind, max_tokens)
        caches = None if beside is None else _first(beside, number, None if reads else texts)
        _Layer(made, layer, config, ropes[kind], caches, 2 * len(layers)).write()
        made.ends.append(len(tape))
    _head(made, norm, head, _eight(layers, head, dtype) if largest else None)
    return made


def _shrunk(config: Config) -> float:
    return float(getattr(config, "residual_multiplier", 1.0))


def _eight(layers: list[nn.Module], head: nn.Module, dtype: torch.dtype) -> Int8Head | None:
    """The head in 8 bits, where that is worth its memory."""
    others = sum(t.nbytes for layer in layers for t in bnb.held_tensors(layer))
    worth = policy.head_in_eight_bits(head.weight.nbytes, others)
    return eight_bits.of(head, dtype) if worth else None


def _head(made: Decoder, norm: nn.Module, head: nn.Module, eight: Int8Head | None) -> None:
    tape, hidden = made.tape, made.hidden
    x = tape.vectors(hidden.shape[1])
    whole = None if eight is None else tape.int16_vectors(x, hidden.shape[1])
    _norm(tape, norm, hidden, x, whole, made.shrunk)
    made.normed, made.body = x.plain, len(tape)
    if eight is not None and whole is not None:
        first, before = len(tape), tape.before
        tape.largest(head.weight.data, eight, x.plain, whole, made.logits)
        tape.then()
        made.rough, tape.before = range(first, len(tape)), before  # the whole head needs no more than that one
    linears.write(tape, x, [(head, made.logits)])


def _first(other: Decoder, layer: int, texts: int | None) -> tuple[Tensor, Tensor]:
    return other.keys[layer][:texts], other.values[layer][:texts]


def _rope_kind(config: Config, number: int) -> str | None:
    """The layer type whose rotary embedding layer `number` uses, where a model has several."""
    types = getattr(config, "layer_types", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    return types[number] if types and types[number] in parameters else None


def _ropes(
    made: Decoder, rotary: nn.Module, config: Config, kind: str | None, max_tokens: int
) -> tuple[Tensor, Tensor]:
    """Buffers (M, R) of cos and sin, with their tables (T, R) noted."""
    parameters = getattr(config, "rope_parameters", None) or {}
    parameters = parameters[kind] if kind is not None else parameters
    if parameters.get("rope_type") in _CHANGING_ROPES:
        raise Unsupported(f"rotary embedding of type {parameters['rope_type']}")
    at, like = torch.arange(max_tokens)[None], torch.zeros(1, dtype=torch.float32)
    tables = rotary(like, at) if kind is None else rotary(like, at, kind)
    if not all(isinstance(table, Tensor) and table.is_floating_point() for table in tables):
        raise Unsupported("a rotary embedding that is no cos and sin")
    rows = []
    for table in tables:
        rows.append(made.tape.buffer(made.tape.m, table.shape[-1]))
        made.ropes.append((table[0].float().contiguous(), rows[-1]))
    return rows[0], rows[1]


def _norm_facts(module: nn.Module, d: int) -> tuple[Tensor, float, bool]:
    one_plus = fuse.is_one_plus(type(module))
    if one_plus is None or module.weight.shape != (d,):
        raise Unsupported(f"{type(module).__name__} is no RMS norm")
    eps = float(getattr(module, "variance_epsilon", 0.0) or getattr(module, "eps", 0.0))
    return module.weight.data, eps, one_plus


def _norm(
    tape: Tape, module: nn.Module, x: Tensor, to: Vectors, whole: Int16Vectors | None = None, shrunk: float = 1.0
) -> None:
    weight, eps, one_plus = _norm_facts(module, x.shape[1])
    tape.norm(x, to, weight.to(tape.dtype), eps / shrunk**2, one_plus, whole)
    tape.then()


class _Layer:
    """One decoder layer on its way into a tape."""

    def __init__(
        self,
        made: Decoder,
        layer: nn.Module,
        config: Config,
        rope: tuple[Tensor, Tensor],
        caches: tuple[Tensor, Tensor] | None = None,
        count: int = 2,
    ) -> None:
        """caches: those of another tape; None: new ones, of `count` in all."""
        self.caches, self.count = caches, count
        self.made, self.tape, self.layer, self.config, self.rope = made, made.tape, layer, config, rope
        parts = {name for name, child in layer.named_children() if any(True for _ in child.parameters())}
        self.is_sandwich = parts == _SANDWICH | {"self_attn", "mlp"}
        if not self.is_sandwich and parts != _NORMS | {"self_attn", "mlp"}:
            raise Unsupported(f"{type(layer).__name__} has {', '.join(sorted(parts))}")
        # one token's logits hardly show what is done to its values alone, so the proof may not see these
        inside = {name for name, _ in layer.self_attn.named_children()} - _ATTENTION
        if more := inside | {name for name, _ in layer.named_buffers(recurse=False)}:
            raise Unsupported(f"{type(layer).__name__} has {', '.join(sorted(more))}")

    def write(self) -> None:
        layer, tape, hidden = self.layer, self.tape, self.made.hidden
        d = hidden.shape[1]
        x = tape.vectors(d)
        _norm(tape, layer.input_layernorm, hidden, x, shrunk=self.made.shrunk)
        self._attention(x)
        before = layer.pre_feedforward_layernorm if self.is_sandwich else layer.post_attention_layernorm
        _norm(tape, before, hidden, x, shrunk=self.made.shrunk)
        self._mlp(x)

    def _onto(self, module: nn.Module, x: Vectors, norm: nn.Module) -> None:
        """hidden += module(x), normalised in a sandwich."""
        hidden = self.made.hidden
        if not self.is_sandwich:
            linears.write(self.tape, x, [(module, hidden)], add=True)
            return
        out = self.tape.buffer(*hidden.shape)
        linears.write(self.tape, x, [(module, out)])
        weight, eps, one_plus = _norm_facts(norm, hidden.shape[1])
        self.tape.add_norm(out, hidden, weight.to(self.tape.dtype), eps, one_plus)
        self.tape.then()

    def _attention(self, x: Vectors) -> None:
        tape, module, config = self.tape, self.layer.self_attn, self.config
        d = int(module.head_dim)
        heads, key_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        qkv = tape.buffer(tape.m, (heads + 2 * key_heads) * d)
        if hasattr(module, "qkv_proj"):
            linears.write(tape, x, [(module.qkv_proj, qkv)])
        else:
            ends = (0, heads * d, (heads + key_heads) * d, qkv.shape[1])
            outs = [qkv[:, a:b] for a, b in pairwise(ends)]
            linears.write(tape, x, list(zip((module.q_proj, module.k_proj, module.v_proj), outs, strict=True)))
        keys, values = self.caches or (tape.cache(key_heads, d, self.count), tape.cache(key_heads, d, self.count))
        self.made.keys.append(keys)
        self.made.values.append(values)
        norms: list[Tensor | None] = []
        eps, one_plus = 0.0, False
        for name in ("q_norm", "k_norm"):
            norm = getattr(module, name, None)
            if norm is None:
                norms.append(None)
                continue
            weight, eps, one_plus = _norm_facts(norm, d)
            norms.append(weight.to(tape.dtype).contiguous())
        attention = CachedAttention(
            qkv, keys, values, self.made.positions, heads, key_heads, d, float(module.scaling),
            float(getattr(module, "attn_logit_softcapping", None) or 0.0), self._window(module), norms[0], norms[1],
            eps, one_plus, self.made.places,
        )  # fmt: skip
        out, to = tape.buffer(tape.m, heads * d), tape.vectors(heads * d)
        tape.attend(attention, *self.rope, out)
        tape.then()
        tape.norm(out, to, None)
        tape.then()
        self._onto(module.o_proj, to, self.layer.post_attention_layernorm)

    def _window(self, module: nn.Module) -> int:
        seen = sight.of(module)
        if seen is None or not seen.causal:  # not our attention: only where there is nothing to be known
            kinds = set(getattr(self.config, "layer_types", None) or ["full_attention"])
            if getattr(self.config, "sliding_window", None) or kinds != {"full_attention"}:
                raise Unsupported("windows that were not looked at")
            return 0
        if seen.causal < seen.tokens and not seen.slides:
            raise Unsupported("a mask of no known kind")
        return seen.causal if seen.slides else 0

    def _mlp(self, x: Vectors) -> None:
        tape, mlp = self.tape, self.layer.mlp
        kind = norm_gate.ACTIVATIONS.get(fuse.activation_of(mlp))
        if kind is None:
            raise Unsupported(f"activation {fuse.activation_of(mlp)}")
        if hasattr(mlp, "gate_up_proj"):
            inner = linears.Linear(tape, mlp.gate_up_proj).shape[0] // 2
            both = tape.buffer(tape.m, 2 * inner)
            linears.write(tape, x, [(mlp.gate_up_proj, both)])
        elif hasattr(mlp, "gate_proj") and hasattr(mlp, "up_proj"):
            inner = linears.Linear(tape, mlp.gate_proj).shape[0]
            both = tape.buffer(tape.m, 2 * inner)
            linears.write(tape, x, [(mlp.gate_proj, both[:, :inner]), (mlp.up_proj, both[:, inner:])])
        else:
            raise Unsupported(f"{type(mlp).__name__} is no gated MLP")
        to = tape.vectors(inner)
        tape.gate(both[:, :inner], both[:, inner:], inner, kind, to)
        tape.then()
        self._onto(mlp.down_proj, to, self.layer.post_feedforward_layernorm if self.is_sandwich else self.layer)
