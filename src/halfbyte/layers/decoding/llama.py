"""A Llama-like model as a tape: embedding aside, a token's whole way from hidden state to logits.

What is recognised is structure, not names of classes: norms, attention projections (one or three), output projection,
a gated MLP (its two inner projections in one or apart), and where the norms stand (`models/families.py` has their
names). What a model does beside that is not looked for: `writing/writer.py` compares logits with the model's own before
a token is used.
Source: transformers' modeling files of Llama, Mistral, Qwen2, Qwen3, Gemma 2, Gemma 3, Phi-3, Granite.
Cost: tens of milliseconds to write; LoRA is copied in the compute dtype.

Letters: M texts, H query heads, K key heads, T max_tokens of a cache.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from halfbyte.layers import fuse, norm_gate, sight
from halfbyte.layers.decoding import head as int8_heads
from halfbyte.layers.decoding import linears
from halfbyte.layers.decoding.linears import Unsupported
from halfbyte.layers.decoding.tape import CachedAttention, Int8Head, Int16Vectors, Tape, TextAdapters, Vectors
from halfbyte.models import families, structure
from halfbyte.quant import bnb, policy
from halfbyte.types import Config, Model

# Rotary embeddings that are another function of the position when a text is longer.
_CHANGING_ROPES = {"dynamic", "longrope"}


@dataclass
class Decoder:
    """A model's tape with its buffers.

    Args:
        hidden: (M, D) fp32, the embedding of the tokens, divided by `residual_multiplier`: Granite multiplies by it
            what is added, so here nothing is, and norms see the same but for eps.
        logits_divisor: what logits are divided by.
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
    residual_multiplier: float = 1.0
    logits_divisor: float = 1.0
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
        if self.residual_multiplier != 1.0:
            self.hidden[:n] /= self.residual_multiplier
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
        logits = self.logits if self.logits_divisor == 1.0 else self.logits / self.logits_divisor
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
        return _write(model, texts, max_tokens, adapters, beside, largest, reads)
    except (AttributeError, IndexError, TypeError) as why:  # a part that has another name, or none
        raise Unsupported(f"{type(structure.causal_lm(model)).__name__} is not built like Llama: {why}") from why


def _write(
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
    has_head, rotary = isinstance(getattr(head, "weight", None), Tensor), getattr(body, "rotary_emb", None)
    if not has_head or norm is None or not isinstance(rotary, nn.Module):
        raise Unsupported(f"{type(lm).__name__} is not built like Llama")
    dtype = next(lm.get_input_embeddings().parameters()).dtype
    max_tokens = -(-max_tokens // 64) * 64
    try:
        tape = Tape(dtype, texts, max_tokens, adapters)
    except ValueError as error:
        raise Unsupported(str(error)) from error
    layers = structure.decoder_layers(body)
    sight.look(body, max_tokens)
    decoder = Decoder(
        tape,
        hidden=tape.buffer(texts, norm.weight.shape[0]),
        logits=tape.buffer(texts, head.weight.shape[0]),
        positions=tape.buffer(texts, dtype=torch.int64),
        final_cap=float(getattr(config, "final_logit_softcapping", 0) or 0),
        residual_multiplier=float(getattr(config, "residual_multiplier", 1.0)),
        logits_divisor=float(getattr(config, "logits_scaling", 1.0)),
        places=tape.buffer(texts, dtype=torch.int64) if reads else None,
    )
    ropes: dict[str | None, tuple[Tensor, Tensor]] = {}
    for number, layer in enumerate(layers):
        kind = _rope_kind(config, number)
        if kind not in ropes:
            ropes[kind] = _ropes(decoder, rotary, config, kind)
        if beside is not None:
            shared = None if reads else texts
            decoder.keys.append(beside.keys[number][:shared])
            decoder.values.append(beside.values[number][:shared])
        _LayerWriter(decoder, layer, config, ropes[kind], caches=2 * len(layers)).write()
        decoder.ends.append(len(tape))
    _write_head(decoder, norm, head, _int8_head(layers, head, dtype) if largest else None)
    return decoder


def _int8_head(layers: list[nn.Module], head: nn.Module, dtype: torch.dtype) -> Int8Head | None:
    """The head in 8 bits, where that is worth its memory."""
    others = sum(t.nbytes for layer in layers for t in bnb.held_tensors(layer))
    worth = policy.head_in_eight_bits(head.weight.nbytes, others)
    return int8_heads.of(head, dtype) if worth else None


def _write_head(decoder: Decoder, norm: nn.Module, head: nn.Module, int8_head: Int8Head | None) -> None:
    tape, hidden = decoder.tape, decoder.hidden
    x = tape.vectors(hidden.shape[1])
    integers = None if int8_head is None else tape.int16_vectors(x, hidden.shape[1])
    _write_norm(decoder, norm, x, integers)
    decoder.normed, decoder.body = x.plain, len(tape)
    if int8_head is not None and integers is not None:
        first, before = len(tape), tape.before
        tape.largest(head.weight.data, int8_head, x.plain, integers, decoder.logits)
        tape.then()
        decoder.rough, tape.before = range(first, len(tape)), before  # the whole head needs no more than that one
    linears.write(tape, x, [(head, decoder.logits)])


def _rope_kind(config: Config, number: int) -> str | None:
    """The layer type whose rotary embedding layer `number` uses, where a model has several."""
    types = getattr(config, "layer_types", None)
    parameters = getattr(config, "rope_parameters", None) or {}
    return types[number] if types and types[number] in parameters else None


def _ropes(decoder: Decoder, rotary: nn.Module, config: Config, kind: str | None) -> tuple[Tensor, Tensor]:
    """Buffers (M, R) of cos and sin, with their tables (T, R) noted."""
    tape, parameters = decoder.tape, getattr(config, "rope_parameters", None) or {}
    parameters = parameters[kind] if kind is not None else parameters
    if parameters.get("rope_type") in _CHANGING_ROPES:
        raise Unsupported(f"rotary embedding of type {parameters['rope_type']}")
    positions, like = torch.arange(tape.max_tokens)[None], torch.zeros(1, dtype=torch.float32)
    tables = rotary(like, positions) if kind is None else rotary(like, positions, kind)
    if not all(isinstance(table, Tensor) and table.is_floating_point() for table in tables):
        raise Unsupported("a rotary embedding that is no cos and sin")
    rows = []
    for table in tables:
        rows.append(tape.buffer(tape.m, table.shape[-1]))
        decoder.ropes.append((table[0].float().contiguous(), rows[-1]))
    return rows[0], rows[1]


def _norm_of(module: nn.Module, d: int, dtype: torch.dtype) -> tuple[Tensor, float, bool]:
    """(weight (d,), eps, whether the factor is 1 + weight) of an RMS norm."""
    eps, one_plus = fuse.rms_norm_kind(module)
    if one_plus is None or module.weight.shape != (d,):
        raise Unsupported(f"{type(module).__name__} is no RMS norm")
    return module.weight.data.to(dtype), eps, one_plus


def _write_norm(decoder: Decoder, norm: nn.Module, to: Vectors, integers: Int16Vectors | None = None) -> None:
    """hidden, normalised, to where products read it."""
    tape, hidden = decoder.tape, decoder.hidden
    weight, eps, one_plus = _norm_of(norm, hidden.shape[1], tape.dtype)
    tape.norm(hidden, to, weight, eps / decoder.residual_multiplier**2, one_plus, integers)
    tape.then()


class _LayerWriter:
    """Writes one decoder layer into a tape."""

    def __init__(
        self, decoder: Decoder, layer: nn.Module, config: Config, rope: tuple[Tensor, Tensor], caches: int
    ) -> None:
        """caches: how many the model has; one of its own for keys and values each, where the decoder has none yet."""
        self.decoder, self.tape, self.caches = decoder, decoder.tape, caches
        self.layer, self.config, self.rope = layer, config, rope
        parts = {name for name, child in layer.named_children() if any(True for _ in child.parameters())}
        norms = parts - {"self_attn", "mlp"}
        self.is_sandwich = norms == families.SANDWICH_NORMS
        if not {"self_attn", "mlp"} <= parts or norms not in (families.NORMS, families.SANDWICH_NORMS):
            raise Unsupported(f"{type(layer).__name__} has {', '.join(sorted(parts))}")
        # one token's logits hardly show what is done to its values alone, so the proof may not see these
        inside = {name for name, _ in layer.self_attn.named_children()} - families.ATTENTION_PARTS
        if more := inside | {name for name, _ in layer.named_buffers(recurse=False)}:
            raise Unsupported(f"{type(layer).__name__} has {', '.join(sorted(more))}")

    def write(self) -> None:
        layer = self.layer
        x = self.tape.vectors(self.decoder.hidden.shape[1])
        _write_norm(self.decoder, layer.input_layernorm, x)
        self._attention(x)
        before = layer.pre_feedforward_layernorm if self.is_sandwich else layer.post_attention_layernorm
        _write_norm(self.decoder, before, x)
        self._mlp(x)

    def _add(self, module: nn.Module, x: Vectors, norm: str) -> None:
        """hidden += module(x), in a sandwich normalised by the layer's part of this name."""
        hidden = self.decoder.hidden
        if not self.is_sandwich:
            linears.write(self.tape, x, [(module, hidden)], add=True)
            return
        out = self.tape.buffer(*hidden.shape)
        linears.write(self.tape, x, [(module, out)])
        weight, eps, one_plus = _norm_of(getattr(self.layer, norm), hidden.shape[1], self.tape.dtype)
        self.tape.add_norm(out, hidden, weight, eps, one_plus)
        self.tape.then()

    def _attention(self, x: Vectors) -> None:
        tape, module, config, decoder = self.tape, self.layer.self_attn, self.config, self.decoder
        d = int(module.head_dim)
        heads, key_heads = int(config.num_attention_heads), int(config.num_key_value_heads)
        qkv = tape.buffer(tape.m, (heads + 2 * key_heads) * d)
        if hasattr(module, "qkv_proj"):
            linears.write(tape, x, [(module.qkv_proj, qkv)])
        else:
            outs = qkv.split([heads * d, key_heads * d, key_heads * d], dim=1)
            linears.write(tape, x, list(zip((module.q_proj, module.k_proj, module.v_proj), outs, strict=True)))
        number = len(decoder.ends)
        if len(decoder.keys) == number:
            decoder.keys.append(tape.cache(key_heads, d, self.caches))
            decoder.values.append(tape.cache(key_heads, d, self.caches))
        norms: dict[str, Tensor] = {}
        eps, one_plus = 0.0, False
        for name in ("q_norm", "k_norm"):
            if (norm := getattr(module, name, None)) is not None:
                weight, eps, one_plus = _norm_of(norm, d, tape.dtype)
                norms[name] = weight.contiguous()
        attention = CachedAttention(
            qkv, decoder.keys[number], decoder.values[number], decoder.positions, heads, key_heads, d,
            float(module.scaling), float(getattr(module, "attn_logit_softcapping", None) or 0.0), self._window(module),
            norms.get("q_norm"), norms.get("k_norm"), eps, one_plus, decoder.places,
        )  # fmt: skip
        out, to = tape.buffer(tape.m, heads * d), tape.vectors(heads * d)
        tape.attend(attention, *self.rope, out)
        tape.then()
        tape.norm(out, to, None)
        tape.then()
        self._add(module.o_proj, to, "post_attention_layernorm")

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
        self._add(mlp.down_proj, to, "post_feedforward_layernorm")
